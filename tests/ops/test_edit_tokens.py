"""``edit_tokens`` against a plain statement of it, and blocks against the published loops."""

import math

import pytest
import torch

from pydllm import ops
from pydllm._backend.errors import BackendError
from tests.ops.test_unmask import MASK, integers, numbers

BACKENDS = ["torch", "triton", "cuda"]
WRITTEN = ("x", "step_map", "nfe", "post_steps", "complete")
SIZES = [(1, 1), (2, 9), (31, 40), (32, 64), (33, 40), (128, 140), (129, 129)]


def make(batch, rows, slots, seed, dtype=torch.float32):
    """Ragged windows; a token in two agrees with what is there; scores are full of ties."""
    generator = torch.Generator().manual_seed(seed)
    x = integers(batch, slots, low=0, high=4, seed=seed)
    share = torch.rand(batch, 1, generator=generator)  # of masks: none in many, all in some
    x[torch.rand(batch, slots, generator=generator) < 1.6 * share - 0.5] = MASK
    token = integers(batch, rows, low=0, high=4, seed=seed + 1)
    token[torch.rand(batch, rows, generator=generator) < 0.05] = MASK
    score = integers(batch, rows, low=0, high=9, seed=seed + 2) / 8
    places = torch.rand(batch, rows, generator=generator)
    for place, value in ((0.3, math.nan), (0.2, math.inf), (0.15, -math.inf), (0.1, -0.0)):
        score[(places < place) & (torch.arange(batch)[:, None] % 3 == 0)] = value
    start = integers(batch, low=0, high=slots - rows + 1, seed=seed + 3)
    outside = integers(batch, low=-3, high=slots + 3, seed=seed + 4)
    start = torch.where(torch.arange(batch) % 5 == 0, outside, start)
    length = integers(batch, low=0, high=rows + 1, seed=seed + 5)
    first = start + integers(batch, low=-2, high=rows + 1, seed=seed + 6).clamp(max=4)
    return {
        "x": x,
        "step_map": torch.full((batch, slots), -1, dtype=torch.int32),
        "nfe": numbers(integers(batch, low=0, high=90, seed=seed)),
        "post_steps": numbers(integers(batch, low=0, high=4, seed=seed + 7)),
        "complete": torch.rand(batch, generator=generator) < 0.1,
        "token": token,
        "score": score.to(dtype),
        "start": numbers(start),
        "length": numbers(length),
        "editable_from": numbers(first),
    }


def expect(case, *, threshold, edit_threshold, min_tokens, max_post_steps, confirm):
    """Everything after the step, one Python number at a time."""
    tensors = {name: case[name].tolist() for name in case}
    x, steps, nfe, post, complete = (tensors[name] for name in WRITTEN)
    counts = []
    for b in range(len(x)):
        at = {
            j: tensors["start"][b] + j
            for j in range(tensors["length"][b])
            if 0 <= tensors["start"][b] + j < len(x[b]) and not complete[b]
        }
        own = [j for j, place in at.items() if place >= tensors["editable_from"][b]]
        score = [-math.inf if math.isnan(s) else s for s in tensors["score"][b]]
        masks = [j for j in own if x[b][at[j]] == MASK]
        good = [j for j in masks if score[j] > threshold]
        if len(good) < min_tokens:
            good = sorted(masks, key=lambda j: (-score[j], j))[:min_tokens]
        edits = []
        if edit_threshold is not None:
            for j in own:
                token = tensors["token"][b][j]
                differs = x[b][at[j]] not in (MASK, token) and token != MASK
                if differs and score[j] > edit_threshold:
                    edits.append(j)
        if at and not masks:
            post[b] += 1
            if confirm and post[b] > max_post_steps:
                edits, complete[b] = [], True
        for j in good + edits:
            x[b][at[j]], steps[b][at[j]] = tensors["token"][b][j], nfe[b]
        left = sum(x[b][at[j]] == MASK for j in own)
        if at and not masks and not edits:
            complete[b] = True
        if at and not confirm and left == 0 and post[b] >= max_post_steps:
            complete[b] = True
        nfe[b] += bool(at)
        counts.append((left, len(good), len(edits)))
    state = (torch.tensor(x), numbers(steps), numbers(nfe), numbers(post), torch.tensor(complete))
    return state, [numbers(column) for column in zip(*counts, strict=True)]


OPTIONS = [
    {"threshold": 0.5, "edit_threshold": 0.5, "min_tokens": 1, "max_post_steps": 2},
    {"threshold": 0.875, "edit_threshold": 0.0, "min_tokens": 3, "max_post_steps": 0},
    {"threshold": 1.0, "edit_threshold": None, "min_tokens": 1, "max_post_steps": 1},
    {"threshold": 0.0, "edit_threshold": 0.75, "min_tokens": 200, "max_post_steps": 16},
]


@pytest.mark.parametrize("confirm", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_equals_its_statement(backend, confirm):
    seen = torch.zeros(3, dtype=torch.int64)
    for index, (rows, slots) in enumerate(SIZES):
        dtype = (torch.float32, torch.float16)[index % 2]
        # The interpreter takes its time: half of the pairs.
        for option in OPTIONS if backend != "triton" else OPTIONS[index % 2 :: 2]:
            case = make(60, rows, slots, 10 * index, dtype)
            option = option | {"confirm": confirm}
            state, counts = expect(case, **option)
            got = ops.edit_tokens(**case, mask_id=MASK, backend=backend, **option)
            assert all(map(torch.equal, got, counts))
            for name, value in zip(WRITTEN, state, strict=True):
                assert torch.equal(case[name], value), name
            seen += torch.stack(tuple(got)).sum(1)
    assert (seen > 100).all()


def tables(seed, *, cyclic):
    """Logits of a block, by the block itself, so that blocks can recur; or by the step as well."""

    def logits(step, block):
        key = (seed, *block) if cyclic else (seed, step, *block)
        generator = torch.Generator().manual_seed(hash(key) % 2**62)
        rows = 3 * torch.randn(len(block), 12, generator=generator, dtype=torch.float64)
        rows[:, 0] = -math.inf  # the mask
        return rows

    return logits


def hub(model, x, prompt, *, threshold, edit_threshold, least, budget):
    """LLaDA2.1's own ``generate`` on one block; its forwards."""
    step = post = 0
    while True:
        masked = [j for j in range(len(x)) if x[j] == 0]
        if not masked:
            post += 1
        if post > budget:
            return step
        p, token = model(step, x).softmax(-1).max(-1)
        step += 1
        sure = [j for j in masked if p[j] > threshold]
        if masked and len(sure) < least:
            sure = sorted(masked, key=lambda j: (-p[j].item(), j))[:least]
        edits = [
            j
            for j in range(prompt, len(x))
            if j not in masked and p[j] > edit_threshold and token[j] != x[j]
        ]
        for j in sure + edits:
            x[j] = token[j].item()
        if not masked and not edits:
            return step


def sglang(model, x, prompt, *, threshold, edit_threshold, least, budget):
    """SGLang's JointThreshold on one block; ``least`` is 1 there."""
    step = post = 0
    while True:
        p, token = model(step, x).softmax(-1).max(-1)
        step += 1
        masked = [j for j in range(len(x)) if x[j] == 0]
        chosen = [j for j in masked if p[j] > threshold]
        if masked and not chosen:
            chosen = [max(masked, key=lambda j: (p[j].item(), -j))]
        if not masked:
            post += 1
            if post > budget:
                return step
        for j in range(prompt, len(x)):
            if j not in masked and p[j] > edit_threshold and token[j] != x[j]:
                chosen.append(j)
        if not chosen:
            return step
        for j in chosen:
            x[j] = token[j].item()


def diffusers(model, x, prompt, *, threshold, edit_threshold, least, budget):
    """The block refinement pipeline on one block: the step over the budget writes as well."""
    step = post = 0
    while True:
        masked = [j for j in range(len(x)) if x[j] == 0]
        post += not masked
        p, token = model(step, x).softmax(-1).max(-1)
        step += 1
        sure = [j for j in masked if p[j] > threshold]
        if masked and len(sure) < least:
            sure = sorted(masked, key=lambda j: (-p[j].item(), j))[:least]
        edits = []
        for j in range(prompt, len(x)):
            if j not in masked and p[j] > edit_threshold and token[j] != x[j]:
                edits.append(j)
        for j in sure + edits:
            x[j] = token[j].item()
        if (not masked and not edits) or post > budget:
            return step


LOOPS = {
    "hub": (hub, lambda budget: {"max_post_steps": budget}),
    "sglang": (sglang, lambda budget: {"max_post_steps": budget, "confirm": True}),
    "diffusers": (diffusers, lambda budget: {"max_post_steps": budget + 1}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_blocks_equal_the_published_loops(name):
    """A batch of blocks at a time, each against the loop of the code; tokens and forwards."""
    published, ending = LOOPS[name]
    rows, blocks, by_budget = 8, 40, 0
    for case in range(12):
        budget, least = (0, 1, 2, 16)[case % 4], 1 if name == "sglang" else 1 + case % 3
        low, edit = (0.5, 0.3, 0.9)[case % 3], (0.0, 0.4, 0.8)[case // 3 % 3]
        models = [tables(1000 * case + b, cyclic=case % 2 == 0) for b in range(blocks)]
        prompt = integers(blocks, low=0, high=rows, seed=case)
        x = integers(blocks, rows, low=1, high=12, seed=case)
        x[torch.arange(rows) >= prompt[:, None]] = 0
        wanted, forwards = x.tolist(), []
        given = {"threshold": low, "edit_threshold": edit, "least": least, "budget": budget}
        for b in range(blocks):
            forwards.append(published(models[b], wanted[b], prompt[b].item(), **given))
        zero = numbers(torch.zeros(blocks))
        state = [zero.clone(), zero.clone(), zero.bool()]  # forwards, post steps, complete
        steps = torch.full_like(x, -1, dtype=torch.int32)
        for step in range(rows + budget + 2):
            logits = torch.stack([m(step, row) for m, row in zip(models, x.tolist(), strict=True)])
            p, token = logits.softmax(-1).max(-1)
            left = ops.edit_tokens(
                x,
                steps,
                *state,
                token,
                p,
                mask_id=0,
                start=zero,
                length=zero + rows,
                editable_from=numbers(prompt),
                threshold=low,
                edit_threshold=edit,
                min_tokens=least,
                **ending(budget),
            ).remaining
            assert not (state[2] & (left > 0)).any()
        assert x.tolist() == wanted and state[0].tolist() == forwards and state[2].all()
        by_budget += int((state[1] > budget - (name == "hub")).sum())
    assert by_budget > 25  # blocks that still changed when the budget ended them


def test_a_sequence_does_not_depend_on_the_others_and_nan_stays_in_its_row():
    option = OPTIONS[0]
    together, alone = make(20, 9, 12, 3), make(20, 9, 12, 3)
    together["score"][:10] = math.nan
    got = ops.edit_tokens(**together, mask_id=MASK, **option)
    for b in range(10, 20):
        case = {name: value[b : b + 1] for name, value in alone.items()}
        one = ops.edit_tokens(**case, mask_id=MASK, **option)
        assert [int(t) for t in one] == [int(t[b]) for t in got]
        assert all(torch.equal(case[name][0], together[name][b]) for name in WRITTEN)


def test_opcheck_and_compile():
    case = make(3, 9, 12, 1)
    order = (*(case[name] for name in (*WRITTEN, "token", "score")), MASK)
    order += tuple(case[name] for name in ("start", "length", "editable_from"))
    order += (0.5, 0.25, 1, 2, False, "torch")
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in order]
    torch.library.opcheck(torch.ops.pydllm.edit_tokens.default, tuple(copies))
    eager = {name: value.clone() for name, value in case.items()}
    expected = ops.edit_tokens(**eager, mask_id=MASK, **OPTIONS[0])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(**tensors):
        return ops.edit_tokens(**tensors, mask_id=MASK, **OPTIONS[0])

    assert all(map(torch.equal, run(**case), expected))
    assert all(torch.equal(case[name], eager[name]) for name in WRITTEN)
    empty = {name: value[:0] for name, value in case.items()}
    assert all(t.shape == (0,) for t in ops.edit_tokens(**empty, mask_id=MASK, **OPTIONS[0]))


# The text that is replaced in reference/edit_tokens.py, and what by.
MUTANTS = {
    "a mask at the threshold is filled": ("(score > limit)", "(score >= limit)"),
    "a token at the threshold is replaced": ("(score > edit_limit)", "(score >= edit_limit)"),
    "tokens of the prompt are replaced": ("edit = own & ", "edit = inside & "),
    "masks of the prompt are filled": ("masked = own & ", "masked = inside & "),
    "masks are edited": (" & (before != mask_id)", ""),
    "an edit writes a mask": (" & (token != mask_id)", ""),
    "post steps start again": (
        "post_steps += takes_part & ~had_mask",
        "post_steps += takes_part & ~had_mask\n    post_steps *= ~had_mask",
    ),
    "the closing step writes": (" & ~closing[:, None]", ""),
    "the budget is one less": ("post_steps < max_post_steps", "post_steps + 1 < max_post_steps"),
    "a step that only fills ends": ("(~had_mask & ~edit.any(1))", "~edit.any(1)"),
    "the last best mask": ("(row < min_tokens)", "(row < min_tokens - 1)"),
    "complete windows go on": (" & ~complete[:, None]", ""),
    "ties from the right": ("0 - score, torch.nan", "0 - score - row * 1e-9, torch.nan"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, monkeypatch):
    """The statement above fails for each planted bug."""
    from pathlib import Path

    from pydllm import reference

    old, new = MUTANTS[name]
    source = Path(reference.__file__).with_name("edit_tokens.py").read_text()
    assert source.count(old) == 1
    room = {}
    exec(source.replace(old, new), room)
    differs = False
    for index, (rows, slots) in enumerate(SIZES[1:3]):
        for option in OPTIONS:
            for confirm in (False, True):
                given = option | {"confirm": confirm}
                case = make(60, rows, slots, 10 * index, torch.float64)
                state, counts = expect(case, **given)
                if given["edit_threshold"] is None:
                    given = given | {"edit_threshold": math.inf}
                got = room["edit_tokens"](**case, mask_id=MASK, **given)
                same = all(torch.equal(case[n], v) for n, v in zip(WRITTEN, state, strict=True))
                differs |= not (same and all(map(torch.equal, got, counts)))
    assert differs


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"threshold": 1.5}, ValueError, r"threshold: expected a number in \[0, 1\], got 1.5"),
        ({"edit_threshold": -0.5}, ValueError, "edit_threshold: expected a number in"),
        ({"min_tokens": 0}, ValueError, "min_tokens: expected an int of at least 1, got 0"),
        ({"max_post_steps": -1}, ValueError, "max_post_steps: expected an int of at least 0"),
        ({"token": torch.ones(3, 20).long()}, ValueError, "token: expected windows of at most 12"),
        ({"score": torch.ones(3, 9).double(), "backend": "triton"}, RuntimeError, "got torch.fl"),
        ({"score": torch.ones(3, 9, requires_grad=True)}, ValueError, "requires_grad"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(change, error, message):
    case = make(3, 9, 12, 1) | {"mask_id": MASK} | OPTIONS[0] | change
    if "token" in change:
        case["score"] = torch.ones(3, 20)
    before = {name: case[name].clone() for name in WRITTEN}
    with pytest.raises(error, match=message):
        ops.edit_tokens(**case)
    assert all(torch.equal(case[name], before[name]) for name in WRITTEN)


def test_a_window_beyond_the_kernel_is_refused_before_anything_is_written():
    case = make(1, 1025, 1025, 0)
    before = case["x"].clone()
    limits = {"mask_id": MASK, "threshold": 0.5, "edit_threshold": 0.5, "max_post_steps": 1}
    with pytest.raises(BackendError, match="windows of up to 1024 positions, got 1025"):
        ops.edit_tokens(**case, **limits, backend="triton")
    assert torch.equal(case["x"], before)
