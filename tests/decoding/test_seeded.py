"""Blocks that begin at the prompt's end, seeds, causal contexts: against loops without a cache."""

import json

import pytest
import torch

import pydllm
from pydllm.demo import MODELS
from pydllm.demo.task import held_out_problems
from tests.models.plain import RECENT, random_plain, write_checkpoint

MASK, EOS = 60, (59, 57)
FAMILIES = {
    "fast-dllm-v2": RECENT["fast-dllm-v2"] | {"tie_word_embeddings": False},
    "nemotron": RECENT["nemotron"],
    "a2d-bd3lm": RECENT["a2d-bd3lm"],
}
LENGTHS = (3, 8, 9, 17)


def make(folder, name, seed, scale):
    plain = random_plain(FAMILIES[name], seed=seed)
    head = "diffusion_head.weight" if name == "nemotron" else "lm_head.weight"
    plain.weights[head][list(EOS)] *= scale
    return pydllm.load(write_checkpoint(folder, plain), device="cpu", dtype=torch.float64), plain


def prompts(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 57, (n,), generator=generator).tolist() for n in LENGTHS]


def likely(logits):
    """Tokens and probabilities; the mask is not predicted."""
    logits = logits.clone()
    logits[..., MASK] = -torch.inf
    return logits.softmax(-1).max(-1)


def restated(name, plain, block, prompt, new, threshold, per_step, part=None):
    """Tokens and forwards of one prompt, block by block, every forward anew.

    ``part``: positions that are filled at a time, from left to right.
    """
    p, nfe, part = len(prompt), 0, part or block
    at_prompt = name != "fast-dllm-v2"
    start = p if at_prompt else p // block * block
    offset = -p % block if at_prompt else 0
    x = list(prompt)
    while start < p + new:
        x += [MASK] * (start + block - len(x))
        kept = None
        if name == "nemotron":
            _, logits, kept = plain(torch.tensor(x[:start]), causal=True)
        elif name == "fast-dllm-v2" and start:
            _, logits, _ = plain(torch.tensor(x[:start]), block=block)
        if name != "a2d-bd3lm" and start:
            nfe += 1
            if start >= p:
                x[start] = int(likely(logits[-1])[1])
        while MASK in x[start:]:
            first = start + x[start:].index(MASK)
            first = (first - start) // part * part
            if start + first >= p + new or any(token in EOS for token in x[p : start + first]):
                break  # nothing that is wanted is left
            ids = torch.tensor(x)
            if name == "nemotron":
                rows = plain(ids[start:], start, kept)[1]
            else:
                rows = plain(ids, block=block, offset=offset)[1]
                if name == "fast-dllm-v2":
                    rows = torch.cat((rows[:1], rows[:-1]))
                rows = rows[start:]
            prob, token = likely(rows)
            prob = prob.masked_fill(ids[start:] != MASK, -1)
            prob[first + part :] = -1
            best = prob.argsort(descending=True, stable=True)
            if threshold is None:
                taken = [int(i) for i in best[:per_step] if prob[i] > 0]
            else:
                taken = [int(i) for i in best if prob[i] >= threshold or i == best[0]]
                taken = [i for i in taken if x[start + i] == MASK]
            for i in taken:
                x[start + i] = int(token[i])
            nfe += 1
        start += block
        if any(token in EOS for token in x[p:start]):
            break
    x = [EOS[0] if token == MASK else token for token in x]
    fresh = (x[p:] + [EOS[0]] * new)[:new]
    end = next((i for i, token in enumerate(fresh) if token in EOS), new)
    return prompt + fresh[: end + 1] + [EOS[0]] * (new - end - 1), nfe


ALGORITHMS = {
    "static": (lambda size: pydllm.Static(block_length=size), None, 1),
    "static-3": (lambda size: pydllm.Static(block_length=size, tokens_per_step=3), None, 3),
    "threshold": (lambda size: pydllm.Threshold(threshold=0.4, block_length=size), 0.4, None),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_batches_are_the_loops(tmp_path, name, algorithm):
    """Ragged prompts together and one after the other: tokens and forwards of each."""
    build, threshold, per_step = ALGORITHMS[algorithm]
    ended = 0
    for seed, scale in enumerate((0.0, 1.0, 1.6)):
        model, plain = make(tmp_path / str(seed), name, seed, scale)
        block = model.spec.block_size
        rows = prompts(seed)
        expected = [restated(name, plain, block, row, 18, threshold, per_step) for row in rows]
        ended += sum(any(t in EOS for t in x[-18:]) for x, _ in expected)
        for max_batch in (None, 2, 1):
            got = pydllm.generate(model, rows, build(block), max_new_tokens=18, max_batch=max_batch)
            for row, (tokens, nfe) in enumerate(expected):
                assert got.sequences[row].tolist() == tokens, (seed, max_batch, row)
                assert int(got.nfe[row]) == nfe, (seed, max_batch, row)
    assert 0 < ended < 12


@pytest.mark.parametrize("name, part", [("fast-dllm-v2", 4), ("fast-dllm-v2", 2), ("nemotron", 2)])
@pytest.mark.parametrize("threshold", [None, 0.4])
def test_parts_of_blocks(tmp_path, name, part, threshold):
    """Sub-blocks: the model's block is forwarded, a part of it is decided."""
    if threshold is None:
        algorithm = pydllm.Static(block_length=part)
    else:
        algorithm = pydllm.Threshold(threshold=threshold, block_length=part)
    model, plain = make(tmp_path, name, part, 1.2)
    block, rows = model.spec.block_size, prompts(part)
    expected = [restated(name, plain, block, row, 18, threshold, 1, part) for row in rows]
    for max_batch in (None, 2):
        got = pydllm.generate(model, rows, algorithm, max_new_tokens=18, max_batch=max_batch)
        for row, (tokens, nfe) in enumerate(expected):
            assert got.sequences[row].tolist() == tokens, (max_batch, row)
            assert int(got.nfe[row]) == nfe, (max_batch, row)


@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_steps_and_samples(tmp_path, name):
    """Replayed steps and other batches draw the same tokens."""
    model, _ = make(tmp_path, name, 1, 1.0)
    algorithm = pydllm.Static(block_length=model.spec.block_size, tokens_per_step=2)
    options = {"max_new_tokens": 14, "temperature": 1.0, "seed": 5}
    rows = prompts(7)
    together = pydllm.generate(model, rows, algorithm, **options)
    recorded = pydllm.generate(model, rows, algorithm, graph=True, **options)
    for row, prompt in enumerate(rows):
        alone = pydllm.generate(model, [prompt], algorithm, request_ids=[row], **options)
        for other in (recorded.sequences[row], alone.sequences[0]):
            assert torch.equal(together.sequences[row], other)
    assert torch.equal(together.nfe, recorded.nfe)


BASELINES = {
    "one": lambda size: None,
    "two, random": lambda size: pydllm.Static(block_length=size, tokens_per_step=2, score="random"),
    "threshold": lambda size: pydllm.Threshold(threshold=0.4, block_length=size),
}


@pytest.mark.parametrize(
    "name, part, baseline, temperature",
    [
        ("a2d-bd3lm", None, "one", 0.0),
        ("fast-dllm-v2", None, "one", 0.0),
        ("fast-dllm-v2", 4, "one", 0.8),
        ("fast-dllm-v2", None, "two, random", 0.0),
        ("fast-dllm-v2", 4, "threshold", 0.0),
        ("nemotron", None, "one", 0.0),
        ("nemotron", 2, "two, random", 0.8),
        ("nemotron", None, "threshold", 0.8),
    ],
)
def test_freedave_keeps_the_tokens(tmp_path, name, part, baseline, temperature):
    """Ragged prompts, whole blocks and parts of them: a baseline's tokens in fewer forwards."""
    model, _ = make(tmp_path, name, 1, 1.2)
    size, rows = part or model.spec.block_size, prompts(1)
    options = {"max_new_tokens": 18, "temperature": temperature, "seed": 3}
    algorithm = BASELINES[baseline](size)
    own = {"block_length": size} if algorithm is None else {"baseline": algorithm}
    expected = pydllm.generate(
        model, rows, algorithm or pydllm.Static(block_length=size), **options
    )
    for drafts, max_batch in ((1, None), (4, 2), ("auto", None)):
        fast = pydllm.FreeDave(draft_steps=drafts, **own)
        got = pydllm.generate(model, rows, fast, max_batch=max_batch, **options)
        for row in range(len(rows)):
            assert torch.equal(got.sequences[row], expected.sequences[row])
        assert (got.nfe <= expected.nfe).all()
        if drafts == 1:
            assert torch.equal(got.nfe, expected.nfe)
            assert torch.equal(got.step_map, expected.step_map)
        elif algorithm is None:
            assert got.nfe.sum() < expected.nfe.sum()


def test_freedave_replays_seeded_steps(tmp_path):
    model, _ = make(tmp_path, "nemotron", 1, 1.0)
    fast, rows = pydllm.FreeDave(draft_steps=4, block_length=4), prompts(7)
    expected = pydllm.generate(model, rows, fast, max_new_tokens=14)
    got = pydllm.generate(model, rows, fast, max_new_tokens=14, graph=True)
    assert torch.equal(got.nfe, expected.nfe)
    for row in range(len(rows)):
        assert torch.equal(got.sequences[row], expected.sequences[row])


REFUSED = {
    "pipelined, seeded": (
        "fast-dllm-v2",
        {},
        pydllm.FreeDave(block_length=8, mode="pipelined"),
        "mode: expected 'strict' for a model whose blocks' first tokens come from",
    ),
    "pipelined": (
        "a2d-bd3lm",
        {},
        pydllm.FreeDave(block_length=8, mode="pipelined"),
        "mode: expected 'strict' for blocks that begin at the prompt's end, got 'pipelined'",
    ),
    "forced, not seeded": (
        "a2d-bd3lm",
        {"shift_logits": True, "block_origin": "zero"},
        pydllm.Static(block_length=8, first_token="forced"),
        "first_token: expected 'window' with a block-causal model that is not seeded",
    ),
    "multi-block": ("nemotron", {}, pydllm.MultiBlock(), "MultiBlock: expected .* got 'block_cau"),
    "another block": (
        "nemotron",
        {},
        pydllm.Static(block_length=8),
        "block_length: expected 4, the block of the block-causal model, got 8",
    ),
}


@pytest.mark.parametrize("name, overrides, algorithm, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(tmp_path, name, overrides, algorithm, message):
    folder = write_checkpoint(tmp_path, random_plain(FAMILIES[name]))
    model = pydllm.load(folder, device="cpu", **overrides)
    with pytest.raises(ValueError, match=message):
        pydllm.generate(model, [[1, 2, 3]], algorithm, max_new_tokens=8)


def test_a_seed_needs_a_token_before_it(tmp_path):
    model, _ = make(tmp_path, "nemotron", 0, 1.0)
    with pytest.raises(ValueError, match="expected at least one token"):
        pydllm.generate(model, [[]], pydllm.Static(block_length=4), max_new_tokens=8)


def test_a_chat_checkpoint_stops_at_its_turns_end(tmp_path):
    """SDAR's chat models name the end of a turn in generation_config.json alone."""
    bundled = MODELS["sdar-tiny"]
    for file in bundled.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    turn, text = config["eos_token_id"], 2
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": text}))
    ends = {"eos_token_id": [turn, text]}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends))
    rows = [problem.prompt for problem in held_out_problems(3)]
    options = {"max_new_tokens": 64}
    algorithm = pydllm.Threshold(threshold=0.9, block_length=8)
    expected = pydllm.generate(pydllm.load(bundled, device="cpu"), rows, algorithm, **options)
    got = pydllm.generate(pydllm.load(tmp_path, device="cpu"), rows, algorithm, **options)
    assert torch.equal(got.nfe, expected.nfe)
    assert got.text == expected.text
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}"
        "{% endfor %}"
    )
    model = pydllm.load(tmp_path, device="cpu")
    assert model.spec.eos_ids == (text, turn)
    chats = [[{"role": "user", "content": row}] for row in rows]
    got = pydllm.generate(model, chats, algorithm, **options)
    assert got.text == expected.text
    for sequence, row in zip(got.sequences, expected.sequences, strict=True):
        end = row.tolist().index(turn)  # after it: the id that fills
        assert sequence[: end + 1].tolist() == row[: end + 1].tolist()
        assert (sequence[end + 1 :] == text).all()
