"""``unmask`` finds the ends of sequences in the launch that writes the tokens."""

import pytest
import torch

from pydllm import ops
from tests.ops.test_unmask import MASK, integers, make_case, numbers

BACKENDS = ["torch", "triton", "cuda"]
FIELDS = ("x", "step_map", "nfe")


def finish(case, before, counts, ending):
    """What an ending adds to the same step without one, one Python number at a time."""
    rows = {name: case[name].tolist() for name in FIELDS}
    remaining, accepted = (count.tolist() for count in counts)
    was_done = ending["done"].tolist()
    done = list(was_done)
    slots = case["x"].shape[1]
    eos_ids = ending["eos_ids"].tolist() if ending["eos_ids"] is not None else []
    for b in range(len(done)):
        if was_done[b]:
            for name in FIELDS:
                rows[name][b] = before[name][b].tolist()
            remaining[b], accepted[b] = -1, 0
            continue
        start, end = case["start"][b].item(), ending["end"][b].item()
        length = min(case["length"][b].item(), case["token"].shape[1])
        first = start if ending["ends_from"] is None else ending["ends_from"][b].item()
        window = [p for p in range(start, start + length) if 0 <= p < slots]
        x, steps = rows["x"][b], rows["step_map"][b]
        masks = [p for p in window if p >= first and x[p] == MASK]
        if length == 0 or (masks and not ending["last"]):
            continue
        done[b] = start + length >= end
        ends = [p for p in window if first <= p < end and x[p] in eos_ids]
        if ends:
            done[b] = True
            for p in range(ends[0] + 1, min(end, slots)):
                x[p], steps[p] = eos_ids[0], -1
    remaining = [-1 if over else count for over, count in zip(done, remaining, strict=True)]
    return (*(torch.tensor(rows[name]) for name in FIELDS), remaining, accepted, done)


def make_ending(batch, slots, seed, *, eos, ends_from, last):
    generator = torch.Generator().manual_seed(seed)
    return {
        "done": torch.rand(batch, generator=generator) < 0.2,
        "end": numbers(integers(batch, low=1, high=slots + 4, seed=seed + 1)),
        "eos_ids": torch.tensor(eos) if eos else None,
        "ends_from": numbers(integers(batch, low=0, high=slots, seed=seed + 2))
        if ends_from
        else None,
        "last": last,
    }


def check(case, ending, rule, options, backend):
    before = {name: case[name].clone() for name in FIELDS}
    plain = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    counts = ops.unmask(**plain, rule=rule, **options, backend="torch")
    expected = finish(plain, before, counts, ending)
    got = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    done = ending["done"].clone()
    told = ops.Ending(**ending | {"done": done})
    remaining, accepted = ops.unmask(**got, rule=rule, **options, ending=told, backend=backend)
    for name, wanted in zip(FIELDS, expected, strict=False):
        assert torch.equal(got[name], wanted.to(got[name].dtype)), name
    assert [remaining.tolist(), accepted.tolist(), done.tolist()] == list(expected[3:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("ends_from", [False, True])
@pytest.mark.parametrize("eos", [[], [7], [3, 11, 12, 13, 14]], ids=["none", "one", "five"])
def test_it_equals_its_plain_statement(eos, ends_from, last, backend):
    for index, (rows, slots) in enumerate([(1, 1), (3, 9), (7, 8), (32, 80), (33, 40)]):
        case = make_case(60, rows, slots, seed=10 * index)
        ending = make_ending(60, slots, 7 * index, eos=eos, ends_from=ends_from, last=last)
        quota = {"quota": numbers(integers(60, low=0, high=2 * rows + 1, seed=index))}
        for rule, options in (
            ("quota", quota),
            ("left_to_right", quota),
            ("threshold", {"threshold": 0.25}),
            ("random", quota),
        ):
            check(case, ending, rule, options, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_fill_reaches_far_behind_a_wide_window(backend):
    case = make_case(9, 300, 4000, seed=3)
    ending = make_ending(9, 4000, 5, eos=[1, 2], ends_from=True, last=True)
    ending["end"] = numbers([4000, 3999, 3000, 700, 5000, 320, 4000, 4000, 1])
    check(case, ending, "quota", {"quota": numbers([300] * 9)}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """A prompt with an end in it; the first of two new ends counts; ties go by position."""
    eos, other = 8, 9
    x = torch.tensor([[eos, 1, MASK, MASK, MASK, MASK, MASK, 0]] * 3)
    steps, nfe = torch.full((3, 8), -1, dtype=torch.int32), numbers([0, 5, 5])
    token = torch.tensor([[4, other, eos, 6], [4, 5, 6, 7], [other, 5, 6, 7]])
    ending = ops.Ending(
        torch.tensor([False, False, True]),
        numbers([7, 7, 7]),
        torch.tensor([eos, other]),
        numbers([2, 2, 2]),
    )
    window = {"start": numbers([1, 1, 1]), "length": numbers([5, 5, 5])}
    token = torch.cat((torch.zeros(3, 1, dtype=torch.int64), token), 1)
    score = torch.full(token.shape, 0.5)
    call = {**window, "mask_id": MASK, "rule": "quota", "ending": ending, "backend": backend}
    first = ops.unmask(x, steps, nfe, token, score, quota=numbers([3, 4, 9]), **call)
    # Three of four equal scores are taken from the left: a mask is left, so nobody looks yet.
    assert x[0].tolist() == [eos, 1, 4, other, eos, MASK, MASK, 0]
    assert ending.done.tolist() == [False, False, True]
    assert [n.tolist() for n in first] == [[1, 0, -1], [3, 4, 0]]
    ops.unmask(x, steps, nfe, token, score, quota=numbers([3, 4, 9]), **call)
    assert x.tolist() == [
        [eos, 1, 4, other, eos, eos, eos, 0],
        [eos, 1, 4, 5, 6, 7, MASK, 0],
        [eos, 1, MASK, MASK, MASK, MASK, MASK, 0],
    ]
    assert steps[0].tolist() == [-1, -1, 0, 0, -1, -1, -1, -1]
    assert ending.done.tolist() == [True, False, True]
    assert nfe.tolist() == [2, 6, 5]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    case = make_case(3, 5, 8, seed=2)
    window = (case["start"], case["length"], "quota", numbers([2, 1, 3]), 1, 0.0, 7)
    ending = make_ending(3, 8, 1, eos=[1, 2], ends_from=True, last=True)
    head = [case[name] for name in ("x", "step_map", "nfe", "token", "score")]
    names = ("done", "end", "eos_ids", "ends_from", "last")
    torch.library.opcheck(
        torch.ops.pydllm.unmask.default,
        (*head, MASK, *window, None, *(ending[name] for name in names), backend),
    )

    def step(tensors, done):
        told = ops.Ending(**ending | {"done": done})
        quota = numbers([9] * 3)
        return ops.unmask(**tensors, rule="quota", quota=quota, ending=told, backend=backend)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        tensors = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in case.items()}
        done = ending["done"].clone()
        counts = function(tensors, done)
        results.append((*(tensors[name] for name in FIELDS), done, *counts))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"done": torch.zeros(2, dtype=torch.bool)}, ValueError, r"ending.done: expected shape"),
        ({"done": torch.zeros(3)}, TypeError, r"ending.done: expected dtype torch.bool"),
        ({"end": torch.zeros(3)}, TypeError, r"ending.end: expected dtype torch.int32"),
        ({"ends_from": torch.zeros(1)}, ValueError, r"ending.ends_from: expected shape"),
        ({"eos_ids": torch.zeros(0, dtype=torch.int64)}, ValueError, "one or more contiguous ids"),
        ({"eos_ids": torch.arange(4)[::2]}, ValueError, "one or more contiguous ids"),
        ({"eos_ids": numbers([1])}, TypeError, r"ending.eos_ids: expected dtype torch.int64"),
    ],
)
def test_bad_endings_are_refused_before_anything_is_written(change, error, message):
    case = make_case(3, 5, 8, seed=2)
    before = {name: case[name].clone() for name in FIELDS}
    ending = make_ending(3, 8, 1, eos=[1, 2], ends_from=True, last=True) | change
    with pytest.raises(error, match=message):
        ops.unmask(**case, rule="threshold", threshold=0.5, ending=ops.Ending(**ending))
    assert all(torch.equal(case[name], before[name]) for name in FIELDS)


def test_an_ending_is_one():
    case = make_case(3, 5, 8, seed=2)
    with pytest.raises(TypeError, match="ending: expected an Ending or None, got 3"):
        ops.unmask(**case, rule="threshold", threshold=0.5, ending=3)


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_gpu_does_what_a_cpu_does(backend, last):
    for rows, slots in ((7, 8), (33, 40), (300, 4000)):
        case = make_case(60, rows, slots, seed=rows)
        ending = make_ending(60, slots, 3, eos=[7, 9], ends_from=True, last=last)
        results = []
        for device, chosen in (("cpu", "torch"), ("cuda", backend)):
            move = {
                k: v.to(device, copy=True) if isinstance(v, torch.Tensor) else v
                for k, v in case.items()
            }
            told = {
                k: v.to(device, copy=True) if isinstance(v, torch.Tensor) else v
                for k, v in ending.items()
            }
            counts = ops.unmask(
                **move, rule="threshold", threshold=0.25, ending=ops.Ending(**told), backend=chosen
            )
            results.append((*(move[name] for name in FIELDS), told["done"], *counts))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other.cpu())
