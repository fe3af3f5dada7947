"""Token editing against the published loop, on the model's own forwards of the whole sequence."""

from __future__ import annotations

import pytest
import torch

import pydllm
from tests.decoding.trajectories import EOS, MASK, random_pair, random_prompt

LENGTHS = (3, 1, 12, 8, 7, 20, 4, 9)
NEW, BLOCK = 14, 4
ALGORITHM = pydllm.Editing(threshold=0.4, edit_threshold=0.2, max_post_steps=3, block_length=BLOCK)


def decode(model, prompts, algorithm=ALGORITHM, new=NEW, **options):
    return pydllm.generate(model, prompts, algorithm, max_new_tokens=new, **options)


def published(plain, prompt, *, threshold, edit, budget, least=1, compat=None, eos=EOS):
    """The answer, the forwards and the last forward that wrote each position, without a cache.

    The loops of the hub (and dllm), SGLang and diffusers, told apart where they differ; blocks
    after an EOS count for nothing.
    """
    length = len(prompt)
    x = torch.tensor(prompt + [MASK] * (NEW + -(length + NEW) % BLOCK))
    steps, forwards = [-1] * len(x), 0
    for low in range(length // BLOCK * BLOCK, len(x), BLOCK):
        post, block = 0, range(low, low + BLOCK)
        while True:
            masked = [j for j in block if x[j] == MASK]
            if not masked and compat != "sglang":
                post += 1
            if compat is None and post > budget:
                break
            p, token = plain.logits(x[: low + BLOCK])[0].softmax(-1).max(-1)
            forwards += 1
            if not masked and compat == "sglang":
                post += 1
                if post > budget:
                    break
            fill = [j for j in masked if p[j] > threshold]
            if len(fill) < least:
                fill = sorted(masked, key=lambda j: (-p[j].item(), j))[:least]
            edits = []
            if edit is not None:
                for j in block:
                    new = j >= length and j not in masked and token[j] != x[j]
                    if new and p[j] > edit:
                        edits.append(j)
            for j in fill + edits:
                x[j], steps[j] = token[j], forwards - 1
            if not masked and not edits:
                break
            if compat == "diffusers" and post > budget:
                break
        ends = [j for j in block if length <= j < length + NEW and x[j] in eos]
        if ends:
            fill = length + NEW - ends[0] - 1
            x = torch.cat((x[: ends[0] + 1], torch.full((fill,), EOS[0])))
            steps = steps[: ends[0] + 1] + [-1] * fill
            break
    return x[: length + NEW].tolist(), forwards, steps[length : length + NEW]


SETTINGS = [
    {"threshold": 0.4, "edit": 0.2, "budget": 3},
    {"threshold": 0.6, "edit": 0.0, "budget": 1, "least": 2},
    {"threshold": 0.3, "edit": 0.3, "budget": 0},
    {"threshold": 0.95, "edit": 0.9, "budget": 16},
    {"threshold": 0.5, "edit": 0.0, "budget": 2, "compat": "sglang"},
    {"threshold": 0.5, "edit": 0.1, "budget": 2, "compat": "diffusers"},
    {"threshold": 0.5, "edit": None, "budget": 2, "compat": "diffusers"},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_ragged_batch_equals_the_published_loop(setting):
    prompts = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    names = {"edit": "edit_threshold", "budget": "max_post_steps", "least": "min_tokens"}
    given = {names.get(name, name): value for name, value in setting.items()}
    algorithm, edited, ended = pydllm.Editing(block_length=BLOCK, **given), 0, 0
    for seed in range(3):
        model, plain = random_pair(seed, block=BLOCK)
        got = decode(model, prompts, algorithm)
        filled = decode(
            model, prompts, pydllm.Threshold(threshold=setting["threshold"], block_length=BLOCK)
        )
        for row, prompt in enumerate(prompts):
            tokens, forwards, steps = published(plain, prompt, **setting)
            assert got.sequences[row].tolist() == tokens
            assert got.nfe[row] == forwards
            assert got.step_map[row].tolist() == steps
            edited += tokens != filled.sequences[row].tolist()
            ended += -1 in steps
    assert ended > 5
    assert edited > 5 or setting["edit"] in (None, 0.9)


@pytest.mark.parametrize("drafts", [1, 3, 16, "auto"])
@pytest.mark.parametrize("temperature", [0.0, [0.0, 0.5, 1.2, 0.9, 2.0]], ids=["greedy", "each"])
def test_freedave_has_its_tokens(drafts, temperature):
    """And its log-probabilities, in as many forwards or fewer."""
    prompts = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS[:5])]
    names = {"edit": "edit_threshold", "budget": "max_post_steps", "least": "min_tokens"}
    fewer = 0
    for index, setting in enumerate(SETTINGS[::2]):
        given = {names.get(name, name): value for name, value in setting.items()}
        baseline = pydllm.Editing(block_length=BLOCK, **given)
        model, _ = random_pair(index, block=BLOCK, rounded=index % 3 == 2)
        options = {"temperature": temperature, "seed": index, "logprobs": True}
        expected = decode(model, prompts, baseline, **options)
        algorithm = pydllm.FreeDave(draft_steps=drafts, baseline=baseline)
        for more in ({}, {"max_batch": 3})[: 1 + index % 2]:
            got = decode(model, prompts, algorithm, **options, **more)
            assert torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))
            assert (got.nfe <= expected.nfe).all()
            for one, other in zip(got.logprobs, expected.logprobs, strict=True):
                assert torch.allclose(one, other, atol=1e-6)
            if drafts == 1:
                assert torch.equal(got.nfe, expected.nfe)
                assert torch.equal(got.step_map, expected.step_map)
            fewer += int((got.nfe < expected.nfe).sum())
    assert fewer > 4 or drafts == 1


def replayed(plain, prompt, drafts, *, threshold, edit, budget, least=1):
    """Forwards of FreeDave over the hub's loop, from what each state of it predicts."""
    x = prompt + [MASK] * (NEW + -(len(prompt) + NEW) % BLOCK)
    forwards = 0

    def predict(ids, low):
        p, token = plain.logits(torch.tensor(ids[: low + BLOCK]))[0].softmax(-1).max(-1)
        return p.tolist(), token.tolist()

    def step(state, stats, low):
        ids, post, done = state
        if done:
            return state
        ids, (p, token) = list(ids), stats
        masked = [j for j in range(low, low + BLOCK) if ids[j] == MASK]
        post += not masked
        fill = [j for j in masked if p[j] > threshold]
        if len(fill) < least:
            fill = sorted(masked, key=lambda j: (-p[j], j))[:least]
        edits = [
            j
            for j in range(max(low, len(prompt)), low + BLOCK)
            if j not in masked and token[j] != ids[j] and p[j] > edit
        ]
        for j in fill + edits:
            ids[j] = token[j]
        left = MASK in ids[low : low + BLOCK]
        return ids, post, (not masked and not edits) or (not left and post >= budget)

    for low in range(len(prompt) // BLOCK * BLOCK, len(x), BLOCK):
        stats = predict(x, low)
        state = step((x, 0, False), stats, low)
        forwards += 1
        while not state[2]:
            forwards += 1
            stale = stats
            for _ in range(drafts):
                draft = step(state, stale, low)
                stats = predict(state[0], low)
                state = step(state, stats, low)
                if state[2] or state != draft:
                    break
        x = state[0]
        if any(token in EOS for token in x[max(low, len(prompt)) : low + BLOCK]):
            break
    return forwards


@pytest.mark.parametrize("drafts", [2, 16])
def test_freedave_takes_the_forwards_that_the_replay_says(drafts):
    prompts = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    names = {"edit": "edit_threshold", "budget": "max_post_steps", "least": "min_tokens"}
    for index, setting in enumerate(SETTINGS[:3]):
        given = {names.get(name, name): value for name, value in setting.items()}
        model, plain = random_pair(10 + index, block=BLOCK)
        baseline = pydllm.Editing(block_length=BLOCK, **given)
        for prompt in prompts:  # alone: in a batch the most that one wants is verified for all
            algorithm = pydllm.FreeDave(draft_steps=drafts, baseline=baseline)
            got = decode(model, [prompt], algorithm)
            assert got.nfe.item() == replayed(plain, prompt, drafts, **setting)


def test_a_draft_that_is_accepted_unseen_is_noticed(monkeypatch):
    """Negative control: without the comparison the answer is another."""
    from pydllm.decoding import edited_drafts

    prompts = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    model, _ = random_pair(1, block=BLOCK)
    baseline = pydllm.Editing(threshold=0.6, edit_threshold=0.2, block_length=BLOCK)
    expected = decode(model, prompts, baseline)

    def all_of_them(packed, stepped, branches):
        return torch.full((len(packed.x) // branches,), branches - 1)

    monkeypatch.setattr(edited_drafts, "_accepted_prefix", all_of_them)
    got = decode(model, prompts, pydllm.FreeDave(draft_steps=4, baseline=baseline))
    assert not torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))


def test_guidance_masks_the_prompt():
    prompts = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS[:4])]
    model, plain = random_pair(2, block=BLOCK, eos=())
    scale = 1.5

    class Guided:
        def __init__(self, length):
            self.length = length

        def logits(self, ids):
            without = ids.clone()
            without[: self.length] = MASK
            logits = (1 + scale) * plain.logits(ids)[0] - scale * plain.logits(without)[0]
            logits[:, MASK] = -torch.inf
            return (logits,)

    setting = {"threshold": 0.6, "edit": 0.4, "budget": 3}
    algorithm = pydllm.Editing(
        threshold=0.6, edit_threshold=0.4, max_post_steps=3, block_length=BLOCK
    )
    got = decode(model, prompts, algorithm, guidance=scale, ignore_eos=True)
    drafted = decode(
        model, prompts, pydllm.FreeDave(baseline=algorithm), guidance=scale, ignore_eos=True
    )
    for row, prompt in enumerate(prompts):
        tokens, forwards, _ = published(Guided(len(prompt)), prompt, **setting, eos=())
        assert got.sequences[row].tolist() == drafted.sequences[row].tolist() == tokens
        assert got.nfe[row] == forwards


def test_without_edits_it_is_thresholding():
    """Up to a score at the threshold, which only one of the two takes."""
    prompts = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    model, _ = random_pair(1, block=BLOCK)
    algorithm = pydllm.Editing(threshold=0.3, edit_threshold=None, block_length=BLOCK)
    got = decode(model, prompts, algorithm)
    expected = decode(model, prompts, pydllm.Threshold(threshold=0.3, block_length=BLOCK))
    assert torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))
    assert torch.equal(got.nfe, expected.nfe)
    assert torch.equal(got.step_map, expected.step_map)


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.8}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_ragged_batch_equals_its_sequences_alone(temperature, options):
    options = {"temperature": temperature, "seed": 3, "logprobs": True} | options
    prompts = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS[:5])]
    model, _ = random_pair(2, block=BLOCK)
    together = decode(model, prompts, **options)
    assert torch.equal(
        torch.cat(together.sequences), torch.cat(decode(model, prompts, **options).sequences)
    )
    few = decode(model, prompts, **options, max_batch=2)
    for row, prompt in enumerate(prompts):
        alone = decode(model, [prompt], request_ids=[row], **options)
        for got in (together, few):
            assert torch.equal(alone.sequences[0], got.sequences[row])
            assert torch.equal(alone.step_map[0], got.step_map[row])
            assert torch.allclose(alone.logprobs[0], got.logprobs[row], atol=1e-6)
            assert alone.nfe[0] == got.nfe[row]
        assert not (together.sequences[row] == MASK).any()
        assert together.sequences[row][: len(prompt)].tolist() == prompt
    if temperature:
        other = decode(model, prompts, **options | {"seed": 4})
        assert not torch.equal(torch.cat(other.sequences), torch.cat(together.sequences))


def test_logprobs_are_those_of_the_last_write():
    """Decoded again with every token but the last write known, the model says the same."""
    model, plain = random_pair(0, block=BLOCK, eos=())
    prompt = random_prompt(5, 4)
    seen = {}

    def remember(step):
        seen[step.index] = step.x[0].clone()

    got = decode(model, [prompt], new=BLOCK, logprobs=True, on_step=remember)
    steps = got.step_map[0].tolist()
    assert len(set(steps)) > 1
    for place, step in enumerate(steps):
        before = seen[step] if step else torch.tensor(prompt + [MASK] * BLOCK)
        logits = plain.logits(before)[0][4 + place].log_softmax(-1)
        assert got.new_tokens[0][place] == logits.argmax()
        assert abs(got.logprobs[0][place] - logits.max()) < 1e-5


def test_a_stream_says_what_no_edit_changes():
    """Text of a block comes when the block is complete."""
    from tests.decoding.test_streaming import byte_level

    model, _ = random_pair(2, block=BLOCK)
    model.tokenizer = byte_level(model)
    prompts = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS[:4])]
    run = pydllm.stream(model, prompts, ALGORITHM, max_new_tokens=40, ignore_eos=True)
    joined = [""] * len(prompts)
    for index, text in run:
        joined[index] += text
    assert joined == run.generation.text
    early = pydllm.generate(model, prompts, ALGORITHM, max_new_tokens=40, ignore_eos=True)
    assert joined == early.text


def test_a_block_is_bounded_whatever_the_model_says():
    """A model that contradicts itself at every step: the budget ends every block."""
    for compat, more in ((None, 0), ("sglang", 1), ("diffusers", 1)):
        algorithm = pydllm.Editing(
            threshold=0.0,
            edit_threshold=0.0,
            max_post_steps=5,
            block_length=BLOCK,
            compat=compat,
        )
        model, _ = random_pair(0, block=BLOCK, eos=())
        plainly, calls = model.head_stats, []

        def contrary(*args, plainly=plainly, calls=calls, **options):
            calls.append(0)
            stats = plainly(*args, **options)
            token = torch.full_like(stats.token, 2 + len(calls) % 2)
            return stats._replace(token=token)

        model.head_stats = contrary
        got = decode(model, [random_prompt(0, 8), random_prompt(1, 8)], algorithm, new=12)
        assert got.nfe.tolist() == [3 * (1 + 5 + more)] * 2


@pytest.mark.parametrize(
    ("algorithm", "block", "message"),
    [
        (pydllm.Editing(), 4, "block_length: expected 4, the block of the block-causal model"),
        (pydllm.Editing(), None, "Editing: expected a block-causal model whose rows see the whole"),
    ],
    ids=str,
)
def test_models_that_are_refused(algorithm, block, message):
    model, _ = random_pair(0, block=block)
    with pytest.raises(ValueError, match=message):
        decode(model, [[2]], algorithm)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (ALGORITHM, r"prompts\[0\]: expected no mask in a prompt with Editing"),
        (pydllm.FreeDave(baseline=ALGORITHM), "prompts: expected no mask in a prompt with Editing"),
        (pydllm.FreeDave(baseline=ALGORITHM, mode="pipelined"), "mode: expected 'strict' for Edi"),
    ],
    ids=str,
)
def test_masks_in_a_prompt_and_pipelined_drafts_are_refused(algorithm, message):
    model, _ = random_pair(0, block=BLOCK)
    with pytest.raises(ValueError, match=message):
        decode(model, [[2, MASK, 3]], algorithm)


def test_nan_ends():
    model, _ = random_pair(0, block=BLOCK)
    plainly = model.head_stats

    def broken(*args, **options):
        stats = plainly(*args, **options)
        return stats._replace(prob=stats.prob * torch.nan)

    model.head_stats = broken
    got = decode(model, [random_prompt(0, 3)])
    assert (got.sequences[0] != MASK).all()
