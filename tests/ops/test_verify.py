"""``verify`` against a walk along Python lists; integers are equal, on inputs full of ties."""

import pytest
import torch

from pydllm import ops
from tests.ops.test_draft import BACKENDS, MASK, SIZES, make_case, numbers, ranked

NAMES = ("x", "step_map", "nfe", "candidates", "token", "score", "start", "length")


def make_round(branches, rows, slots, block_size, seed=0, dtype=torch.float32, batch=8):
    """Candidates, and statistics that mostly agree with what they were drafted from."""
    case = make_case(rows, slots, seed, dtype, batch)
    options = {"mask_id": MASK, "branches": branches, "block_size": block_size}
    candidates = ops.draft(**case, **options, backend="torch")
    generator = torch.Generator().manual_seed(seed + 1)
    other = make_case(rows, slots, seed + 2, dtype, batch * branches)
    for name in ("token", "score"):
        kept = torch.rand(batch, branches, rows, generator=generator) < 0.97
        value = torch.where(kept, case[name][:, None], other[name].view(batch, branches, rows))
        case[name] = value
    case["token"][torch.rand(case["token"].shape, generator=generator) < 0.01] = MASK
    case["candidates"] = candidates
    case["step_map"] = torch.full((batch, slots), -1, dtype=torch.int32)
    case["nfe"] = torch.arange(batch, dtype=torch.int32)
    return {name: case[name] for name in NAMES}


def expected(case, block_size, drafts=3):
    """(x, step_map, nfe, candidates, branch, accepted, remaining, complete)."""
    results = [[] for _ in range(8)]
    for x, step_map, nfe, candidates, token, score, start, length in zip(
        *(case[name].tolist() for name in NAMES), strict=True
    ):

        def step(j, candidates=candidates, token=token, score=score, start=start, length=length):
            order = ranked(candidates[j], score[j], start, length, block_size)
            after = list(candidates[j])
            for position in order[:1]:
                after[position] = token[j][position - start]
            return after

        branch = 0
        while branch + 1 < len(candidates) and step(branch) != candidates[branch]:
            if step(branch) != candidates[branch + 1]:
                break
            branch += 1
        part = bool(ranked(x, score[0], start, length, None))
        new = step(branch) if part else x
        changed = [p for p, (a, b) in enumerate(zip(new, x, strict=True)) if a != b]
        left = ranked(new, score[branch], start, length, block_size)
        following = [list(new) for _ in range(drafts)]
        for number, candidate in enumerate(following):
            for position in left[:number]:
                candidate[position] = token[branch][position - start]
        masks = ranked(candidates[branch], score[branch], start, length, None)
        first = min([*masks, start + length])
        whole = first // (block_size or 1) * (block_size or 1)
        for p in changed:
            step_map[p] = nfe
        row = (new, step_map, nfe + part, following, branch, len(changed), len(left))
        for result, value in zip(results, (*row, max(whole - start, 0)), strict=True):
            result.append(value)
    return [torch.tensor(result) for result in results]


def check(case, block_size, backend):
    want = expected(case, block_size)
    case = {name: tensor.clone() for name, tensor in case.items()}
    got = ops.verify(**case, mask_id=MASK, drafts=3, block_size=block_size, backend=backend)
    values = (case["x"], case["step_map"], case["nfe"], *got)
    for value, wanted in zip(values, want, strict=True):
        assert torch.equal(value.long(), wanted)
    return got


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_longest_chain_is_followed(sizes, backend):
    branches = sizes[0]
    found = set()
    for seed, dtype in enumerate((torch.float32, torch.float16)):
        got = check(make_round(*sizes, seed=seed, dtype=dtype), sizes[3], backend)
        found |= set(got.branch.tolist())
    assert len(found) > 1 or branches == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_does_what_steps_of_unmask_do(backend):
    """The composition that serves baselines with several tokens a step gives the same."""
    case = make_round(6, 12, 12, None, seed=7)
    case["score"] = torch.rand(case["score"].shape, generator=torch.Generator().manual_seed(0))
    case["candidates"][:, 1:] = case["x"][:, None]
    case["token"] = case["token"].clamp(max=MASK - 1)
    x, score, token = case["x"].clone(), case["score"][:, 0], case["token"][:, 0]
    steps, nfe = case["step_map"].clone(), case["nfe"].clone()
    one = torch.ones_like(nfe)
    window = {"mask_id": MASK, "start": case["start"], "length": case["length"]}
    ops.unmask(x, steps, nfe, token, score, rule="quota", quota=one, **window)
    ops.verify(**case, mask_id=MASK, drafts=3, backend=backend)
    for got, wanted in zip(
        (case["x"], case["step_map"], case["nfe"]), (x, steps, nfe), strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend):
    case = {name: tensor[:0] for name, tensor in make_round(2, 4, 8, None).items()}
    assert ops.verify(**case, mask_id=MASK, drafts=3, backend=backend).branch.shape == (0,)
    case = make_round(2, 4, 8, None)
    case["x"].fill_(1)
    case["candidates"].fill_(1)
    got = check(case, None, backend)
    assert not got.accepted.any() and not got.remaining.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    case = make_round(3, 6, 9, 4)
    first = [case[n] for n in NAMES[:6]]
    arguments = (*first, MASK, case["start"], case["length"], 3, 4, backend)
    torch.library.opcheck(torch.ops.pydllm.verify.default, arguments)

    def run(case):
        return ops.verify(**case, mask_id=MASK, drafts=3, block_size=4, backend=backend)

    case = make_round(3, 6, 9, 4)
    want = expected(case, 4)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(case)
    for value, wanted in zip((case["x"], *got), (want[0], *want[3:]), strict=True):
        assert torch.equal(value.long(), wanted)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"candidates": torch.zeros(8, 9).long()}, ValueError, r"expected shape \(8, branches, 9"),
        ({"candidates": torch.zeros(8, 3, 9)}, TypeError, "candidates: expected dtype torch.int64"),
        ({"token": torch.zeros(8, 2, 6).long()}, ValueError, r"token: expected shape \(8, 3, T\)"),
        ({"nfe": numbers(1)}, ValueError, r"nfe: expected shape \(8\), got \(1,\)"),
        ({"step_map": torch.zeros(8, 9)}, TypeError, "step_map: expected dtype torch.int32"),
        ({"drafts": 0}, ValueError, r"drafts: expected an int in \[1, 32\], got 0"),
        ({"block_size": -1}, ValueError, "block_size: expected an int of at least 1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(change, error, message):
    case = make_round(3, 6, 9, 4)
    before = case["x"].clone()
    with pytest.raises(error, match=message):
        ops.verify(**({**case, "mask_id": MASK, "drafts": 3} | change))
    assert torch.equal(case["x"], before)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_capture_and_replay(backend):
    """Nothing is read on the host: a captured round gives what an eager one does."""
    case = {name: tensor.cuda() for name, tensor in make_round(8, 32, 64, 8, seed=3).items()}
    eager = {name: tensor.clone() for name, tensor in case.items()}
    ops.verify(**eager, mask_id=MASK, drafts=3, block_size=8, backend=backend)
    state = {name: tensor.clone() for name, tensor in case.items()}
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = ops.verify(**state, mask_id=MASK, drafts=3, block_size=8, backend=backend)
    graph.replay()
    torch.cuda.synchronize()
    want = expected({name: tensor.cpu() for name, tensor in case.items()}, 8)
    for value, wanted in zip((state["x"], *got), (want[0], *want[3:]), strict=True):
        assert torch.equal(value.cpu().long(), wanted)
    assert torch.equal(state["x"], eager["x"])
