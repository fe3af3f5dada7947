"""APD against a plain loop over one sequence, its limits, its caches, ends of sequence, guards."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import pydllm
from pydllm.decoding import draft_chunks, rounds
from pydllm.models import StaticCache
from tests.decoding.apd_oracle import CAUSAL, decode, gumbel
from tests.models.plain import LLADA, QWEN, random_plain, write_checkpoint

VOCAB, MASK = 13, 12
SMALL = {"vocab_size": VOCAB, "mask_token_id": MASK, "eos_token_id": 11, "pad_token_id": 10}
CONFIGS = {
    "plain": LLADA | SMALL | {"embedding_size": VOCAB, "n_layers": 2},
    "shifted": QWEN | SMALL | {"architectures": ["DreamModel"], "num_hidden_layers": 2},
    "verifier": QWEN | SMALL | {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 2},
}
NEW = 14


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """Random fp64 models by name, each as (pydllm model, plain model)."""
    made = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        plain = random_plain(config, seed)
        folder = write_checkpoint(tmp_path_factory.mktemp(name), plain)
        made[name] = (pydllm.load(folder, device="cpu", dtype=torch.float64), plain)
    return made


@pytest.fixture(autouse=True)
def no_end(trio, monkeypatch):
    """No sequence ends early, unless a test says so."""
    for model, _ in trio.values():
        monkeypatch.setattr(model, "spec", dataclasses.replace(model.spec, eos_ids=()))


def _prompts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 10, (n,), generator=generator).tolist() for n in lengths]


def _decode(model, prompts, algorithm, new=NEW, **options):
    return pydllm.generate(model, prompts, algorithm, max_new_tokens=new, **options)


def _same(one, other):
    assert torch.equal(torch.cat(one.sequences), torch.cat(other.sequences))
    assert torch.equal(one.step_map, other.step_map)
    assert torch.equal(one.nfe, other.nfe)


def _check(got, expected):
    """A generation against what the plain loop returned for each prompt."""
    for row, (tokens, steps, taken) in enumerate(expected):
        assert got.sequences[row].tolist() == tokens, row
        assert got.step_map[row].tolist() == steps, row
        assert got.nfe[row] == taken, row


# One a prompt; together with the temperatures, acceptances from none to all.
EACH = {
    "mixture": [0.3, 0.7, 1.0, 0.0, 0.95],
    "window": [1, 3, None, 2, 50],
    "lookahead": [4, None, 3, 6, 1],
}
PROMPTS = _prompts(4, 1, 9, 2, 6)


@pytest.mark.parametrize("temperature, top_p", [(0.0, None), (1.5, None), (1.5, 0.8), (0.5, 0.9)])
@pytest.mark.parametrize("emit", ["draft", "draft_then_target", "target"])
@pytest.mark.parametrize("kind", ["plain", "shifted"])
def test_it_equals_the_plain_loop(trio, kind, emit, temperature, top_p):
    (model, plain), (verifier, plain_verifier) = trio[kind], trio["verifier"]
    algorithm = pydllm.APD(verifier, **EACH, top_p=top_p, emit=emit)
    eos = (3, 11) if emit == "draft" else ()
    model.spec = dataclasses.replace(model.spec, eos_ids=eos)
    options = {"temperature": temperature, "seed": 2**40 + 3}
    got = _decode(model, PROMPTS, algorithm, **options)
    expected = [
        decode(
            plain,
            plain_verifier,
            prompt,
            new=NEW,
            mask=MASK,
            top_p=top_p,
            emit=emit,
            request=row,
            eos=eos,
            shifted=kind == "shifted",
            **options,
            **{name: values[row] for name, values in EACH.items()},
        )
        for row, prompt in enumerate(PROMPTS)
    ]
    _check(got, expected)
    # Neither a fixed number of tokens a round nor everything at once.
    assert len({rounds for _, _, rounds in expected}) > 2
    needless = torch.tensor([mixture == 1 for mixture in EACH["mixture"]])
    assert (got.verifier_nfe[needless] == 0).all()
    assert (got.verifier_nfe <= got.nfe).all()


@pytest.mark.parametrize("temperature", [0.0, 0.2, 0.7])
@pytest.mark.parametrize("emit", ["draft", "target"])
def test_the_reference_rule(trio, emit, temperature):
    """Drafts at T^2, greedy targets; the paper's rule at temperature 0."""
    (model, plain), (verifier, plain_verifier) = trio["shifted"], trio["verifier"]
    prompts = _prompts(5, 2, 7)
    options = {"mixture": 0.9, "window": 3, "lookahead": 5, "emit": emit}
    draws = {"temperature": temperature, "seed": 9}
    got = _decode(model, prompts, pydllm.APD(verifier, compat="apd", **options), **draws)
    options |= draws | {"rule": "reference", "shifted": True}
    _check(
        got,
        [
            decode(plain, plain_verifier, prompt, new=NEW, mask=MASK, request=row, **options)
            for row, prompt in enumerate(prompts)
        ],
    )
    paper = _decode(
        model, prompts, pydllm.APD(verifier, mixture=0.9, window=3, lookahead=5, emit=emit), **draws
    )
    if temperature == 0:
        _same(got, paper)
    elif temperature > 0.5:
        assert not torch.equal(torch.cat(got.sequences), torch.cat(paper.sequences))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["plain", "shifted"])
def test_left_to_right(trio, kind, temperature):
    model, plain = trio[kind]
    prompts = _prompts(3, 8, 1)
    draws = {"temperature": temperature, "seed": 4}
    for tokens, window, lookahead in ((1, None, None), (2, 1, 5), (3, 4, None), (20, None, None)):
        got = _decode(
            model,
            prompts,
            pydllm.LeftToRight(tokens_per_step=tokens, window=window, lookahead=lookahead),
            **draws,
        )
        options = draws | {"limit": tokens, "window": window, "lookahead": lookahead}
        options["shifted"] = kind == "shifted"
        _check(
            got,
            [
                decode(plain, None, prompt, new=NEW, mask=MASK, request=row, **options)
                for row, prompt in enumerate(prompts)
            ],
        )
        assert got.verifier_nfe is None
        assert (got.nfe == -(-NEW // tokens)).all()


def test_left_to_right_computes_the_head_for_its_tokens_alone(trio, monkeypatch):
    model = trio["plain"][0]
    rows = []
    head = model.head
    monkeypatch.setattr(model, "head", lambda hidden: rows.append(hidden.shape[1]) or head(hidden))
    _decode(model, _prompts(3), pydllm.LeftToRight(tokens_per_step=4, lookahead=9))
    assert rows == [4, 4, 4, 2]


def test_an_empty_prompt_of_a_model_that_is_not_shifted(trio):
    model, plain = trio["plain"]
    got = _decode(model, [[], [4]], pydllm.LeftToRight(tokens_per_step=3, window=2))
    _check(got, [decode(plain, None, p, new=NEW, mask=MASK, limit=3, window=2) for p in ([], [4])])


@pytest.mark.parametrize("emit", ["draft", "draft_then_target", "target"])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_its_limits(trio, temperature, emit):
    """Mixture 1 accepts all, beside others and alone; a lookahead of 1 is one token a forward."""
    model, verifier = trio["shifted"][0], trio["verifier"][0]
    prompts = _prompts(3, 6)
    draws = {"temperature": temperature, "seed": 1}
    for top_p in (None, 0.8):
        blocks = _decode(
            model,
            prompts,
            pydllm.LeftToRight(tokens_per_step=5, window=2, lookahead=5, top_p=top_p),
            **draws,
        )
        if emit == "draft":
            alone = pydllm.APD(None, mixture=1.0, window=2, lookahead=5, top_p=top_p)
            _same(_decode(model, prompts, alone, **draws), blocks)
            single = _decode(
                model,
                prompts,
                pydllm.LeftToRight(tokens_per_step=1, window=2, lookahead=1, top_p=top_p),
                **draws,
            )
            _same(
                _decode(
                    model,
                    prompts,
                    pydllm.APD(verifier, mixture=0.2, window=2, lookahead=1, top_p=top_p),
                    **draws,
                ),
                single,
            )
        beside = pydllm.APD(
            verifier, mixture=[1.0, 0.3], window=2, lookahead=5, top_p=top_p, emit=emit
        )
        got = _decode(model, prompts, beside, **draws)
        assert got.nfe[0] == blocks.nfe[0]
        if emit == "draft":
            assert torch.equal(got.sequences[0], blocks.sequences[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["plain", "shifted"])
def test_target_at_mixture_0_is_autoregressive_decoding(trio, kind, temperature):
    """Whatever the diffusion model, window and lookahead."""
    model, (verifier, plain) = trio[kind][0], trio["verifier"]
    prompts = _prompts(4, 1)
    expected = []
    for row, prompt in enumerate(prompts):
        x = list(prompt)
        for _ in range(NEW):
            scores = plain(torch.tensor(x), block=CAUSAL)[1][-1]
            if temperature:
                scores = scores / temperature + gumbel(VOCAB, 7, len(x), row, 0)
            scores[MASK] = -torch.inf
            x.append(scores.argmax().item())
        expected.append(x)
    for lookahead, window in ((1, None), (3, 2), (8, None), (8, 1)):
        for top_p in (None, 0.5):
            algorithm = pydllm.APD(
                verifier,
                mixture=0.0,
                window=window,
                lookahead=lookahead,
                top_p=top_p,
                emit="target",
            )
            got = _decode(model, prompts, algorithm, temperature=temperature, seed=7)
            assert [sequence.tolist() for sequence in got.sequences] == expected


def test_equal_models_accept_everything(trio):
    """The verifier's logits are the diffusion model's, moved by a constant: the coupling agrees."""
    model = trio["shifted"][0]

    class Same:
        spec = dataclasses.replace(trio["verifier"][0].spec)
        tokenizer, device, dtype = None, model.device, model.dtype
        new_cache = model.new_cache

        def forward(self, ids, start, cache, **options):
            return ids.new_zeros(*ids.shape, 1, dtype=torch.float64)

        def head(self, hidden):
            return self.logits + 8.0

    same = Same()
    head = model.head

    def remembering(hidden):
        same.logits = head(hidden)
        return same.logits

    model.head = remembering
    try:
        for mixture in (0.0, 0.4, 0.9):
            got = _decode(
                model,
                _prompts(3, 5),
                pydllm.APD(same, mixture=mixture, window=4, lookahead=5),
                temperature=0.8,
                seed=3,
            )
            assert (got.nfe == 3).all() and (got.verifier_nfe == 3).all()
    finally:
        del model.head


@pytest.mark.parametrize("kind", ["plain", "shifted"])
def test_a_wide_window_is_no_cache(trio, kind):
    model, verifier = trio[kind][0], trio["verifier"][0]
    options = {"temperature": 1.0, "seed": 6}
    uncached = _decode(
        model, PROMPTS, pydllm.APD(verifier, mixture=0.8, window=None, lookahead=6), **options
    )
    for window in (23, 10**9, [None, 23, 24, 10**9, 30]):
        _same(
            _decode(
                model,
                PROMPTS,
                pydllm.APD(verifier, mixture=0.8, window=window, lookahead=6),
                **options,
            ),
            uncached,
        )
    narrow = _decode(
        model, PROMPTS, pydllm.APD(verifier, mixture=0.8, window=1, lookahead=6), **options
    )
    assert not torch.equal(torch.cat(narrow.sequences), torch.cat(uncached.sequences))


@pytest.mark.parametrize("emit", ["draft", "draft_then_target", "target"])
@pytest.mark.parametrize("kind", ["plain", "shifted"])
def test_a_ragged_batch_equals_its_sequences_alone_and_permuted(trio, kind, emit):
    model, verifier = trio[kind][0], trio["verifier"][0]
    model.spec = dataclasses.replace(model.spec, eos_ids=(5, 6))
    options = {"temperature": 1.2, "seed": 8}
    together = _decode(model, PROMPTS, pydllm.APD(verifier, **EACH, emit=emit), **options)
    assert len(set(together.nfe.tolist())) > 1  # some left the batch before the others
    order = [3, 0, 4, 2, 1]
    each = {name: [values[row] for row in order] for name, values in EACH.items()}
    permuted = _decode(
        model,
        [PROMPTS[row] for row in order],
        pydllm.APD(verifier, **each, emit=emit),
        request_ids=order,
        **options,
    )
    for place, row in enumerate(order):
        each = {name: values[row] for name, values in EACH.items()}
        algorithm = pydllm.APD(verifier, **each, emit=emit)
        alone = _decode(model, [PROMPTS[row]], algorithm, request_ids=[row], **options)
        for other, at in ((alone, 0), (permuted, place)):
            assert torch.equal(other.sequences[at], together.sequences[row])
            assert torch.equal(other.step_map[at], together.step_map[row])
            assert other.nfe[at] == together.nfe[row]
            assert other.verifier_nfe[at] == together.verifier_nfe[row]


def test_seeds_and_request_ids(trio):
    model, verifier = trio["plain"][0], trio["verifier"][0]
    algorithm = pydllm.APD(verifier, mixture=0.5, window=4, lookahead=6)

    def tokens(**options):
        got = _decode(model, _prompts(5), algorithm, temperature=1.0, **options)
        return got.sequences[0].tolist()

    assert tokens(seed=1) == tokens(seed=1) == tokens(seed=1, request_ids=[0])
    assert len({tuple(tokens(seed=seed)) for seed in (1, 2, 2**33 + 1)}) == 3
    assert tokens(seed=1, request_ids=[7]) != tokens(seed=1)


def test_a_round_accepts_more_with_a_larger_mixture(trio):
    """A theorem for rounds that start alike, such as the first, and for no others."""
    model, verifier = trio["plain"][0], trio["verifier"][0]
    counts = []
    for mixture in [step / 20 for step in range(21)]:
        algorithm = pydllm.APD(verifier, mixture=mixture, window=None, lookahead=None)
        got = _decode(model, PROMPTS * 4, algorithm, temperature=1.0, seed=12)
        counts.append((got.step_map == 0).sum(1))
    counts = torch.stack(counts)
    assert (counts.diff(dim=0) >= 0).all()
    assert (counts[-1] == NEW).all() and (counts[0] < 4).any()


class Observed:
    """A model whose every forward is looked at; slots that should not be read hold NaN."""

    def __init__(self, model, look=lambda **call: None):
        self.model, self.look = model, look
        self.tokenizer, self.device, self.dtype = model.tokenizer, model.device, model.dtype
        self.head_stats = model.head_stats

    @property
    def spec(self):
        return self.model.spec

    def new_cache(self, batch, max_len):
        cache = self.model.new_cache(batch, max_len)
        return StaticCache(*(t.fill_(torch.nan) for t in (cache.keys, cache.values)))

    def forward(self, ids, start, cache, *, length, **options):
        for row, first in enumerate(start.tolist()):
            if length[row] == 0:  # not looked at, and kept
                continue
            cache.keys[:, row, first:], cache.values[:, row, first:] = torch.nan, torch.nan
        hidden = self.model.forward(ids, start, cache, length=length, **options)
        self.look(ids=ids, start=start, length=length, hidden=hidden)
        return hidden

    def head(self, hidden):
        assert not hidden.isnan().any()
        return self.model.head(hidden)


@pytest.mark.parametrize("emit", ["draft", "draft_then_target", "target"])
@pytest.mark.parametrize("kind", ["plain", "shifted"])
def test_stale_and_unwritten_slots_are_not_read(trio, kind, emit):
    model, verifier = trio[kind][0], trio["verifier"][0]
    options = {"temperature": 1.0, "seed": 5}
    expected = _decode(model, PROMPTS, pydllm.APD(verifier, **EACH, emit=emit), **options)
    algorithm = pydllm.APD(Observed(verifier), **EACH, emit=emit)
    _same(_decode(Observed(model), PROMPTS, algorithm, **options), expected)


def test_the_verifier_s_cache_is_teacher_forcing(trio):
    model, (verifier, plain) = trio["shifted"][0], trio["verifier"]
    text, rows, starts = [], [], []

    def look(ids, start, length, hidden):
        if int(start) != len(text):  # behind a round that ended early
            starts.append(int(start))
        text[start:] = ids[0, :length].tolist()
        expected = plain(torch.tensor(text), block=CAUSAL)[1][start:]
        torch.testing.assert_close(verifier.head(hidden)[0], expected, rtol=0, atol=1e-11)
        rows.append(int(length))

    algorithm = pydllm.APD(Observed(verifier, look), mixture=0.6, window=3, lookahead=4)
    got = _decode(model, _prompts(5), algorithm, temperature=1.0)
    assert len(starts) < got.verifier_nfe.item() <= len(rows)
    assert rows[0] == 5 + 4 - 1 and max(rows[1:]) <= 4


def test_what_the_verifier_keeps_is_what_a_fresh_forward_gives(trio, monkeypatch):
    """O13: at the end of each round, the slots before the last token's."""
    model, (verifier, _) = trio["plain"][0], trio["verifier"]
    made, checked = [], 0
    new_cache = verifier.new_cache
    monkeypatch.setattr(
        verifier, "new_cache", lambda *size: made.append(new_cache(*size)) or made[-1]
    )

    def look(step):
        nonlocal checked
        for row, prompt in enumerate(PROMPTS[:2]):
            tokens = step.x[row, : len(prompt) + NEW]
            tokens = tokens[tokens != MASK]
            known = len(tokens) - 1
            if len(tokens) == len(prompt) + NEW:  # finished; its slots may be another's
                return
            number = torch.tensor([known], dtype=torch.int32)
            fresh = new_cache(1, known)
            call = {"length": number, "kv_len": number, "commit": number}
            verifier.forward(tokens[None, :known], number * 0, fresh, **call)
            for ours, theirs in ((made[0].keys, fresh.keys), (made[0].values, fresh.values)):
                torch.testing.assert_close(ours[:, row, :known], theirs[:, 0], rtol=0, atol=1e-12)
            checked += known

    algorithm = pydllm.APD(verifier, mixture=[0.7, 0.9], window=3, lookahead=5)
    _decode(model, PROMPTS[:2], algorithm, temperature=1.0, on_step=look)
    assert checked > 20


@pytest.mark.parametrize("emit", ["draft", "draft_then_target", "target"])
def test_what_lies_far_behind_a_mismatch_is_not_computed(trio, monkeypatch, emit):
    """And pieces of any size give the same tokens."""
    model, verifier = trio["shifted"][0], trio["verifier"][0]
    heads = {"drafts": 0, "targets": 0}

    def counting(name, head):
        def count(hidden):
            heads[name] += hidden.shape[:-1].numel()
            return head(hidden)

        return count

    monkeypatch.setattr(model, "head", counting("drafts", model.head))
    monkeypatch.setattr(verifier, "head", counting("targets", verifier.head))
    options = {"mixture": 0.4, "window": 3, "lookahead": None, "emit": emit}
    results, rows = [], []
    for first, growth in ((8, 4), (1, 1), (2, 3), (NEW, 1)):
        monkeypatch.setattr(rounds, "FIRST_CHUNK", first)
        monkeypatch.setattr(draft_chunks, "_GROWTH", growth)
        monkeypatch.setattr(rounds, "next_chunk", lambda length, n=first: n)
        heads.update(drafts=0, targets=0)
        algorithm = pydllm.APD(verifier, **options)
        results.append(_decode(model, PROMPTS, algorithm, temperature=1.0, seed=4))
        rows.append(heads["drafts"])
        assert heads["targets"] <= heads["drafts"]  # the last draft of all may be free
    for other in results[1:]:
        _same(other, results[0])
        assert torch.equal(other.verifier_nfe, results[0].verifier_nfe)
    assert rows[1] < rows[2] < rows[0] < rows[3]
    # One row at a time: what is written, and where it ended.
    written = sum(int((step_map >= 0).sum()) for step_map in results[1].step_map)
    assert written <= rows[1] <= written + int(results[1].nfe.sum())


def test_the_mask_is_never_written(trio, monkeypatch):
    model, verifier = trio["plain"][0], trio["verifier"][0]
    for each in (model, verifier):
        bias = torch.zeros(VOCAB, dtype=torch.float64)
        bias[MASK] = 1e3
        monkeypatch.setattr(each, "_head_bias", bias)
    for emit in ("draft", "draft_then_target", "target"):
        for mixture in (0.0, 0.5, 1.0):
            algorithm = pydllm.APD(verifier, mixture=mixture, window=3, lookahead=5, emit=emit)
            for temperature in (0.0, 1.0):
                got = _decode(model, PROMPTS, algorithm, temperature=temperature)
                assert not (torch.cat(got.sequences) == MASK).any()


def test_what_follows_an_end_of_sequence_is_end_of_sequence(trio):
    model, (verifier, _) = trio["plain"][0], trio["verifier"]
    model.spec = dataclasses.replace(model.spec, eos_ids=(5, 6))
    prompts = [[5, *prompt] for prompt in _prompts(*[3] * 12)]  # one in the prompt ends nothing
    ended = 0
    for algorithm in (
        pydllm.APD(verifier, mixture=0.9, window=4, lookahead=6),
        pydllm.LeftToRight(tokens_per_step=3, window=4),
    ):
        got = _decode(model, prompts, algorithm, temperature=1.5)
        answers = torch.stack([sequence[4:] for sequence in got.sequences])
        for answer, steps, nfe, rate in zip(
            answers, got.step_map, got.nfe, got.tokens_per_forward, strict=True
        ):
            ends = ((answer == 5) | (answer == 6)).nonzero().flatten().tolist()
            count = ends[0] + 1 if ends else NEW
            assert (answer[count:] == 5).all() and (steps[count:] == -1).all()
            assert steps[:count].min() == 0 and steps[count - 1] == nfe - 1
            assert rate == torch.tensor(count) / nfe
            ended += 0 < count < NEW
    assert ended > 4


def test_on_step(trio):
    model, verifier = trio["plain"][0], trio["verifier"][0]
    model.spec = dataclasses.replace(model.spec, eos_ids=(5,))
    masks = []
    got = _decode(
        model,
        PROMPTS,
        pydllm.APD(verifier, **EACH),
        temperature=1.0,
        on_step=lambda step: masks.append((step.index, int((step.x == MASK).sum()))),
    )
    assert [index for index, _ in masks] == list(range(1, int(got.nfe.max()) + 1))
    left = [count for _, count in masks]
    assert left == sorted(left, reverse=True) and left[-1] == 0 and left[0] > 0


def test_logits_that_are_nan_do_not_hang_it(trio, monkeypatch):
    model, verifier = trio["plain"][0], trio["verifier"][0]
    bad = torch.full_like(model._head, torch.nan)
    for broken in (model, verifier):
        with monkeypatch.context() as patch:
            patch.setattr(broken, "_head", bad)
            for emit in ("draft", "draft_then_target", "target"):
                got = _decode(
                    model,
                    _prompts(3),
                    pydllm.APD(verifier, mixture=0.5, window=2, lookahead=4, emit=emit),
                )
                assert got.nfe <= NEW
                assert ((got.sequences[0] >= 0) & (got.sequences[0] < VOCAB)).all()


def test_rows_of_a_cache_move_into_holes():
    cache = StaticCache(*torch.arange(24.0).view(2, 1, 4, 3, 1, 1).clone())
    before = cache.keys.clone()
    taken = cache.take([0, 3])
    assert torch.equal(taken.keys, before[:, [0, 3]]) and taken.batch == 2
    assert taken.keys.data_ptr() == cache.keys.data_ptr()


@pytest.mark.parametrize("kind", ["apd", "left to right", "static"])
def test_a_temperature_for_each_prompt(trio, kind):
    model, verifier = trio["plain"][0], trio["verifier"][0]
    algorithm = {
        "apd": pydllm.APD(verifier, mixture=0.6, window=3, lookahead=4, top_p=0.9),
        "left to right": pydllm.LeftToRight(tokens_per_step=2),
        "static": pydllm.Static(block_length=7, tokens_per_step=2),
    }[kind]
    temperatures = [0.0, 1.0, 0.3, 0.0, 2.5]
    together = _decode(model, PROMPTS, algorithm, temperature=temperatures, seed=2)
    for row, temperature in enumerate(temperatures):
        options = {"temperature": temperature, "seed": 2, "request_ids": [row]}
        alone = _decode(model, [PROMPTS[row]], algorithm, **options)
        assert torch.equal(alone.sequences[0], together.sequences[row])
        assert torch.equal(alone.step_map[0], together.step_map[row])
    for bad, error in (
        ([0.5] * 4, "expected 5, one per prompt"),
        ([0.5] * 4 + [-1.0], "a number in"),
        ([0.5] * 4 + [1e-7], "0 or at least 1e-06"),
    ):
        with pytest.raises(ValueError, match=f"temperature: .*{error}"):
            _decode(model, PROMPTS, algorithm, temperature=bad)


@pytest.mark.parametrize("emit, top_p", [("draft", None), ("target", 0.8)])
def test_backends_agree(tmp_path, emit, top_p):
    made = []
    for name in ("shifted", "verifier"):
        folder = write_checkpoint(tmp_path / name, random_plain(CONFIGS[name]))
        made.append(pydllm.load(folder, device="cpu", dtype=torch.float32))
    algorithm = pydllm.APD(made[1], mixture=0.8, window=2, lookahead=4, top_p=top_p, emit=emit)
    options = {"new": 6, "temperature": 1.0, "seed": 3}
    torch_, triton = (
        _decode(made[0], _prompts(2, 3), algorithm, backend=backend, **options)
        for backend in ("torch", "triton")
    )
    _same(torch_, triton)
