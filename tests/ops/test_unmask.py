import math

import pytest
import torch

from pydllm import ops

MASK = 50
KERNELS = ["triton", "cuda"]
BACKENDS = ["torch", *KERNELS]
# (rule, option, values to try)
RULES = [
    ("quota", "quota", None),
    ("left_to_right", "quota", None),
    ("random", "quota", None),
    ("threshold", "threshold", [0.0, 0.25, 0.5, 0.9, 1.0]),
    ("factor", "factor", [0.0, 0.3, 1.0, 2.5, 1e9]),
    ("entropy", "threshold", [0.0, 0.25, 0.7, 3.0, math.inf]),
    ("entropy_bound", "bound", [0.0, 0.25, 0.7, 3.0, 40.0, math.inf]),
]
IDS = [rule for rule, _, _ in RULES]
SIZES = [(1, 1), (2, 9), (3, 3), (7, 30), (31, 40), (32, 64), (33, 40), (64, 70), (128, 128)]
LARGE = [(129, 140), (300, 320)]


def integers(*shape, low, high, seed):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def numbers(values):
    return torch.as_tensor(values, dtype=torch.int32)


def philox_word(c0, c1, c2, c3, seed):
    """The first word of Philox4x32-10, on Python integers."""
    word = 0xFFFFFFFF
    k0, k1 = seed & word, seed >> 32
    c0, c1, c2, c3 = (c & word for c in (c0, c1, c2, c3))
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & word, (a >> 32) ^ c3 ^ k1, a & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return c0


def accepted_rows(rule, masks, score, quota, limit, words, rounded):
    """The rows that a rule takes: ``masks`` in order of position, ``rounded`` to the dtype."""
    if rule == "left_to_right":
        return masks[: max(quota, 0)]
    if rule == "random":
        return sorted(masks, key=lambda j: (-words[j], j))[: max(quota, 0)]
    lower_is_better = rule in ("entropy", "entropy_bound")
    worst = math.inf if lower_is_better else -math.inf
    score = {j: worst if math.isnan(score[j]) else score[j] for j in masks}
    order = sorted(masks, key=lambda j: (score[j] if lower_is_better else -score[j], j))
    if rule == "quota":
        return order[: max(quota, 0)]
    spent, index = 0.0, 0
    for index, j in enumerate(order):
        if rule == "threshold":
            good = score[j] >= rounded(limit)
        elif rule == "entropy":
            good = score[j] <= rounded(limit)
        elif rule == "factor":
            good = score[j] >= rounded(1 - rounded(rounded(limit) / (index + 2)))
        else:
            good = rounded(spent) <= rounded(limit)
        if index > 0 and not (good and score[j] != worst):
            break
        spent += score[j]
    else:
        return order
    return order[:index]


def expect(case, rule, quota, limit):
    """x, step_map, nfe, remaining and accepted after the step, one Python number at a time."""
    rounded = float if case["score"].dtype == torch.float64 else _to_fp32
    x, step_map, nfe, token, score = (
        case[name].tolist() for name in ("x", "step_map", "nfe", "token", "score")
    )
    remaining, accepted = [], []
    for b in range(len(x)):
        start, length = case["start"][b].item(), case["length"][b].item()
        masks = [j for j in range(length) if 0 <= start + j < len(x[b]) and x[b][start + j] == MASK]
        words = {}
        if rule == "random":
            counter = case["request"][b].item(), nfe[b]
            words = {j: philox_word(0xFFFFFFFF, start + j, *counter, case["seed"]) for j in masks}
        take = quota[b].item() if quota is not None else None
        chosen = accepted_rows(rule, masks, score[b], take, limit, words, rounded)
        for j in chosen:
            x[b][start + j] = token[b][j]
            step_map[b][start + j] = nfe[b]
        accepted.append(len(chosen))
        remaining.append(sum(x[b][start + j] == MASK for j in masks))
        nfe[b] += len(masks) > 0
    return torch.tensor(x), numbers(step_map), numbers(nfe), numbers(remaining), numbers(accepted)


def _to_fp32(number):
    return torch.tensor(number, dtype=torch.float32).item()


def make_case(batch, rows, slots, seed, *, entropies=False, factor=1.0):
    """Ragged windows; scores smooth, full of ties, not numbers, or at the factor's bounds."""
    generator = torch.Generator().manual_seed(seed)
    x = integers(batch, slots, low=0, high=MASK, seed=seed)
    share = torch.rand(batch, 1, generator=generator)  # of masks: from none to all
    x[torch.rand(batch, slots, generator=generator) < 1.4 * share - 0.2] = MASK
    smooth = torch.rand(batch, rows, generator=generator) ** 0.3
    ties = integers(batch, rows, low=0, high=4, seed=seed + 1) / 4
    strange = ties.clone()
    places = torch.rand(batch, rows, generator=generator)
    for place, value in ((0.3, math.nan), (0.2, math.inf), (0.15, -math.inf), (0.1, -0.0)):
        strange[places < place] = value
    rank = integers(batch, rows, low=1, high=rows + 2, seed=seed + 2)
    bounds = 1 - torch.full_like(smooth, factor) / (rank + 1)
    below = places < 0.5
    bounds[below] = torch.nextafter(bounds, torch.tensor(-9.0))[below]
    if entropies:
        smooth, strange = (1 - smooth) * 3, strange.masked_fill(strange == -math.inf, 0)
        bounds = 40 * (1 - bounds.clamp(0, 1))
    kind = torch.arange(batch)[:, None] % 4
    score = torch.where(kind == 0, smooth, torch.where(kind == 1, ties, strange))
    score = torch.where(kind == 3, bounds, score)
    # Most windows lie within the sequence; some stick out of it.
    start = integers(batch, low=0, high=slots - rows + 1, seed=seed + 3)
    outside = integers(batch, low=-3, high=slots + 3, seed=seed + 4)
    start = torch.where(torch.rand(batch, generator=generator) < 0.9, start, outside)
    length = integers(batch, low=0, high=rows + 1, seed=seed + 5)
    length = torch.where(torch.rand(batch, generator=generator) < 0.3, length, rows)
    return {
        "x": x,
        "step_map": numbers(integers(batch, slots, low=-1, high=9, seed=seed + 6)),
        "nfe": numbers(integers(batch, low=0, high=99, seed=seed + 7)),
        "token": integers(batch, rows, low=0, high=MASK + 1, seed=seed + 8),
        "score": score,
        "mask_id": MASK,
        "start": numbers(start),
        "length": numbers(length),
        "request": numbers(integers(batch, low=-5, high=99, seed=seed + 9)),
        "seed": 2**64 - 1 - seed,
    }


def copied(case):
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in case.items()
    }


def call(case, rule, option, value, backend):
    """The op on a copy; returns what ``expect`` returns."""
    case = copied(case)
    counts = ops.unmask(**case, rule=rule, backend=backend, **{option: value})
    return case["x"], case["step_map"], case["nfe"], *counts


def assert_as_expected(case, rule, option, value, backend):
    quota, limit = (value, None) if option == "quota" else (None, value)
    expected = expect(case, rule, quota, limit)
    got = call(case, rule, option, value, backend)
    names = ("x", "step_map", "nfe", "remaining", "accepted")
    for name, one, other in zip(names, got, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name


def option_value(values, batch, rows, index, seed):
    if values is None:
        return numbers(integers(batch, low=-1, high=rows + 2, seed=seed))
    return values[index % len(values)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rule", "option", "values"), RULES, ids=IDS)
def test_every_rule_equals_its_plain_statement(rule, option, values, backend):
    rounds = 4 if backend == "torch" else 1
    for index in range(rounds * (len(SIZES) + len(LARGE))):
        rows, slots = (SIZES + LARGE)[index % (len(SIZES) + len(LARGE))]
        batch = 128 if rows <= 128 else 16
        value = option_value(values, batch, rows, index, seed=index)
        case = make_case(
            batch,
            rows,
            slots,
            seed=10 * index,
            entropies=rule.startswith("entropy"),
            factor=min(value, 9.0) if rule == "factor" else 1.0,
        )
        assert_as_expected(case, rule, option, value, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rule", "option", "values"), RULES, ids=IDS)
def test_the_longest_window(rule, option, values, backend):
    rows = 4096 if backend == "cuda" else 2048
    case = make_case(4, rows, rows + 100, seed=1, entropies=rule.startswith("entropy"))
    case["length"][:] = rows
    value = option_value(values, 4, rows, 2, seed=0)
    assert_as_expected(case, rule, option, value, backend)


@pytest.mark.parametrize(("rule", "option", "values"), RULES[3:], ids=IDS[3:])
def test_fp64_scores_are_compared_in_fp64(rule, option, values):
    for index in range(8):
        case = make_case(128, 24, 30, seed=index, entropies=rule.startswith("entropy"))
        case["score"] = case["score"].double()
        smooth = case["score"][::4]  # others on a grid, where sums of entropies are exact
        case["score"][::4] = smooth + 1e-9 * integers(*smooth.shape, low=0, high=9, seed=index)
        if rule == "entropy_bound":
            case["score"] = (case["score"] * 2**20).round() / 2**20
        assert_as_expected(case, rule, option, values[index % len(values)], "torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_is_rounded_to_the_dtype_of_the_scores(backend):
    case = make_case(1, 3, 3, seed=0)
    case["x"][:], case["length"][:], case["start"][:] = MASK, 3, 0
    just = torch.tensor(0.9)  # in fp32, less than the Python number
    case["score"] = torch.stack((just, torch.nextafter(just, torch.zeros(())), just))[None]
    assert just.item() < 0.9
    *_, accepted = call(case, "threshold", "threshold", 0.9, backend)
    assert accepted.tolist() == [2]
    case["score"] = case["score"].double()
    *_, accepted = call(case, "threshold", "threshold", 0.9, "torch")
    assert accepted.tolist() == [1]


def single(scores, rule, option, value, backend):
    """The rows accepted of one window that is all masks."""
    rows = len(scores)
    case = {
        "x": torch.full((1, rows), MASK),
        "step_map": torch.full((1, rows), -1, dtype=torch.int32),
        "nfe": numbers([3]),
        "token": torch.arange(rows)[None],
        "score": torch.tensor([scores]),
        "mask_id": MASK,
        "start": numbers([0]),
        "length": numbers([rows]),
    }
    x, step_map, nfe, remaining, accepted = call(case, rule, option, value, backend)
    rows = (x[0] != MASK).nonzero().flatten().tolist()
    assert (step_map[0] == 3).nonzero().flatten().tolist() == rows
    assert nfe.tolist() == [4] and accepted.tolist() == [len(rows)]
    assert remaining.tolist() == [len(scores) - len(rows)]
    return rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    nan, inf = math.nan, math.inf

    def rows(scores, rule, option, value):
        return single(scores, rule, option, value, backend)

    # Ties go to the lowest position, and a negative zero is a zero.
    assert rows([0.5, 0.9, 0.9, 0.9], "quota", "quota", numbers([2])) == [1, 2]
    assert rows([-0.0, 0.0, -0.0], "quota", "quota", numbers([1])) == [0]
    assert rows([0.0, -0.0, 0.0], "entropy_bound", "bound", 0.0) == [0, 1, 2]
    assert rows([0.1, 0.2, 0.2], "threshold", "threshold", 1.0) == [1]
    # 1 - 1/3 is the least for rank 2, 3/4 for rank 3; rank 1 is free.
    assert rows([0.2, 0.1, 0.1], "factor", "factor", 1.0) == [0]
    assert rows([0.7, 0.9, 0.74, 0.7], "factor", "factor", 1.0) == [1, 2]
    # The last rank fails like any other (Fast-dLLM takes it: tests/integrations/test_rules.py).
    assert rows([0.9, 0.1], "factor", "factor", 1.0) == [0]
    assert rows([0.9, 0.8, 0.1], "factor", "factor", 1.0) == [0, 1]
    # The sum of those before counts, not one's own.
    assert rows([5.0, 0.5, 0.25], "entropy_bound", "bound", 0.75) == [0, 1, 2]
    assert rows([5.0, 0.5, 0.25], "entropy_bound", "bound", 0.74) == [1, 2]
    assert rows([0.1] * 6, "entropy_bound", "bound", 0.3) == [0, 1, 2, 3]
    assert rows([130.0, 130.0], "entropy_bound", "bound", 128.0) == [0, 1]
    assert rows([0.3, 0.2, 0.4], "entropy", "threshold", 0.3) == [0, 1]
    # What is no number is taken by a quota, or alone and first.
    assert rows([nan, 0.1, nan], "quota", "quota", numbers([2])) == [0, 1]
    assert rows([nan, 0.0, -inf], "threshold", "threshold", 0.0) == [1]
    assert rows([nan, -inf, nan], "threshold", "threshold", 0.0) == [0]
    assert rows([nan, inf, 0.1], "entropy", "threshold", inf) == [2]
    assert rows([nan, inf, nan], "entropy_bound", "bound", inf) == [0]
    assert rows([nan, 0.1, 0.1], "factor", "factor", inf) == [1, 2]
    # Nothing is forced on a quota.
    assert rows([0.9, 0.9], "quota", "quota", numbers([0])) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_random_order_depends_on_seed_request_position_and_step_alone(backend):
    case = make_case(8, 16, 40, seed=3)
    case["x"][:] = MASK
    case["start"][:], case["length"][:], case["nfe"][:], case["request"][:] = 7, 16, 2, 5
    case["token"][:] = 1

    def chosen(**changes):
        changed = copied(case)
        for name, value in changes.items():
            changed[name] = value
        x, *_ = call(changed, "random", "quota", numbers([4] * 8), backend)
        return x

    plain = chosen()
    assert (plain == plain[0]).all()
    assert not torch.equal(plain, chosen(seed=4))
    assert not torch.equal(plain, chosen(nfe=numbers([3] * 8)))
    assert not torch.equal(plain[0], chosen(request=numbers(range(8)))[1])
    # A window that starts later: of the same positions the first are the same.
    later = chosen(start=numbers([7] * 7 + [8]), length=numbers([16] * 7 + [15]))
    assert plain[0, 7] == MASK
    assert torch.equal(later[7], plain[0])


def test_a_random_order_is_uniform():
    batch, rows = 4000, 5
    case = make_case(batch, rows, rows, seed=0)
    case["x"][:], case["token"][:], case["start"][:], case["length"][:] = MASK, 1, 0, rows
    case["request"], case["seed"] = numbers(torch.arange(batch)), 11
    x, *_ = call(case, "random", "quota", numbers([2] * batch), "torch")
    counts = (x == 1).sum(0)
    expected = batch * 2 / rows
    # Draws without replacement: the statistic is chi-square with 4 degrees times (rows - 2) / 4.
    statistic = ((counts - expected) ** 2 / expected).sum() / ((rows - 2) / (rows - 1))
    assert statistic < 18.5  # p = 0.001


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rule", "option", "values"), RULES, ids=IDS)
def test_what_is_done_is_not_touched(rule, option, values, backend):
    case = make_case(4, 8, 20, seed=5)
    case["x"][0][case["x"][0] == MASK] = 1
    case["x"][1:], case["start"][:] = MASK, numbers([3, 3, 19, 3])
    case["length"] = numbers([8, 0, 0, 8])
    case["score"][:3] = math.nan
    value = numbers([3] * 4) if values is None else values[-1]
    x, step_map, nfe, remaining, accepted = call(case, rule, option, value, backend)
    for got, before in ((x, "x"), (step_map, "step_map"), (nfe, "nfe")):
        assert torch.equal(got[:3], case[before][:3])
    assert nfe[3] == case["nfe"][3] + 1
    assert remaining[:3].tolist() == accepted[:3].tolist() == [0, 0, 0]
    assert torch.equal(x[3, :3], case["x"][3, :3]) and torch.equal(x[3, 11:], case["x"][3, 11:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_that_is_predicted_stays_one(backend):
    case = make_case(1, 3, 3, seed=0)
    case["x"][:], case["length"][:], case["start"][:] = MASK, 3, 0
    case["token"] = torch.tensor([[1, MASK, 2]])
    out = call(case, "quota", "quota", numbers([2]), backend)
    x, _, _, remaining, accepted = out
    assert accepted.tolist() == [2]
    assert remaining.tolist() == [(x == MASK).sum().item()]
    case["score"] = torch.tensor([[0.1, 0.9, 0.5]])
    x, _, _, remaining, _ = call(case, "quota", "quota", numbers([2]), backend)
    assert x.tolist() == [[MASK, MASK, 2]] and remaining.tolist() == [2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_written_in_place(backend):
    case = make_case(6, 10, 20, seed=8)
    expected = call(case, "threshold", "threshold", 0.5, backend)
    views = copied(case)
    for name in ("x", "step_map", "token", "score"):
        wide = torch.cat((case[name], case[name], case[name]), 1)
        views[name] = wide[:, case[name].shape[1] : 2 * case[name].shape[1]]
    counts = ops.unmask(**views, rule="threshold", threshold=0.5, backend=backend)
    got = (views["x"], views["step_map"], views["nfe"], *counts)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "rows", "slots"), [(0, 4, 8), (3, 0, 8), (3, 0, 0)])
def test_nothing_to_do(batch, rows, slots, backend):
    case = {
        "x": torch.full((batch, slots), MASK),
        "step_map": torch.zeros(batch, slots, dtype=torch.int32),
        "nfe": numbers([1] * batch),
        "token": torch.zeros(batch, rows, dtype=torch.int64),
        "score": torch.zeros(batch, rows),
        "mask_id": MASK,
        "start": numbers([0] * batch),
        "length": numbers([0] * batch),
    }
    counts = ops.unmask(**case, rule="threshold", threshold=0.5, backend=backend)
    assert all(count.tolist() == [0] * batch for count in counts)
    assert case["nfe"].tolist() == [1] * batch


def op_arguments(case, rule, quota, limit, backend):
    case = copied(case)
    head = [case[name] for name in ("x", "step_map", "nfe", "token", "score")]
    request = case["request"] if rule == "random" else None
    which = (MASK, case["start"], case["length"], rule, quota, 1, limit, 7, request)
    return (*head, *which, None, None, None, None, False, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    case = make_case(3, 5, 8, seed=2)
    op = torch.ops.pydllm.unmask.default
    quota = numbers([2, 1, 3])
    for which in (
        ("random", quota, 0.0),
        ("factor", None, 1.0),
        ("entropy_bound", None, 0.5),
    ):
        torch.library.opcheck(op, op_arguments(case, *which, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rule", "option", "values"), RULES, ids=IDS)
def test_fullgraph_compile(rule, option, values, backend):
    case = make_case(6, 8, 12, seed=4, entropies=rule.startswith("entropy"))
    value = numbers([2] * 6) if values is None else values[1]
    expected = call(case, rule, option, value, backend)

    def step(tensors):
        return ops.unmask(**tensors, rule=rule, backend=backend, **{option: value})

    torch._dynamo.reset()  # each rule is a compilation of the same function
    case = copied(case)
    counts = torch.compile(step, fullgraph=True, backend="aot_eager")(case)
    got = (case["x"], case["step_map"], case["nfe"], *counts)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_long_windows_are_left_to_torch(backend):
    case = make_case(1, 5000, 5000, seed=0)
    limit = 2048 if backend == "triton" else 4096
    with pytest.raises(RuntimeError, match=f"windows of up to {limit} positions, got 5000"):
        call(case, "threshold", "threshold", 0.5, backend)
    assert_as_expected(case, "factor", "factor", 1.0, None)
