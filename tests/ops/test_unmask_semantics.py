"""The accept rules of published code, each stated in a few lines, against ``unmask``.

A statement sees the masks of one window, in order of position, and Python numbers; it knows nothing
of the op. Ties, which that code leaves to a sort or ``topk``, go to the lowest position.
"""

import pytest
import torch

from pydllm import ops
from tests.ops.test_unmask import (
    BACKENDS,
    KERNELS,
    MASK,
    copied,
    integers,
    make_case,
    numbers,
    philox_word,
)


def fp32(number):
    return torch.tensor(number, dtype=torch.float32).item()


def ranked(score, masks, best=max):
    sign = -1 if best is max else 1
    return sorted(masks, key=lambda j: (sign * score[j], j))


def at_or_above(row, masks, score, option):
    """Fast-dLLM, dllm, LMDeploy: at least the threshold, and the best in any case."""
    keep = {j for j in masks if score[j] >= option["threshold"]}
    return keep | set(ranked(score, masks)[: option["min_tokens"]])


def above_or_best(row, masks, score, option):
    """SGLang LowConfidence: above the threshold; the best only if there is none."""
    keep = {j for j in masks if score[j] > option["threshold"]}
    return keep or set(ranked(score, masks)[:1])


def above_or_quota(row, masks, score, option):
    """diffusers BlockRefinement: above the threshold; if fewer than the quota, the quota alone."""
    keep = {j for j in masks if score[j] > option["threshold"]}
    return keep if len(keep) >= option["min_tokens"] else set(ranked(score, masks)[: row["quota"]])


def above_or_leftmost(row, masks, score, option):
    """JetEngine: above the threshold; if fewer than the quota, the leftmost positions instead."""
    keep = {j for j in masks if score[j] > option["threshold"]}
    if len(keep) >= option["min_tokens"] or not masks:
        return keep
    return {j for j in range(masks[0], masks[0] + option["min_tokens"]) if j in masks}


def near_the_best(row, masks, score, option):
    """dInfer: at least min(threshold, best - 1e-5); what predicts the mask is left out."""
    masks = [j for j in masks if row["token"][j] != MASK]
    best = max((score[j] for j in masks), default=0.0)
    limit = min(row["round"](best - row["round"](1e-5)), option["threshold"])
    return {j for j in masks if score[j] >= limit}


def fast_dllm_factor(row, masks, score, option):
    """Fast-dLLM, dInfer: ranks up to the first below its bound; a break at the last takes all."""
    order = ranked(score, masks)
    top = 0
    for top, j in enumerate(order):
        if top > 0 and score[j] < 1 - option["factor"] / (top + 2):
            break
    if top in (0, len(order) - 1):
        top += 1
    return set(order[:top])


def dllm_factor(row, masks, score, option):
    """dllm: as many as pass the bound of their rank, in fp32; the first always passes."""
    order = ranked(score, masks)
    bounds = [fp32(1 - fp32(fp32(option["factor"]) / (r + 2))) for r in range(len(order))]
    passed = [r == 0 or score[j] >= bounds[r] for r, j in enumerate(order)]
    return set(order[: sum(passed)])


def exclusive_bound(row, able, score, option):
    """DiffusionGemma, diffusers: cumsum(H) - H <= bound; the first always."""
    order, spent, keep = ranked(score, able, min), 0.0, set()
    for j in order:
        if fp32(spent) <= option["bound"]:
            keep.add(j)
        spent += score[j]
    return keep


def inclusive_bound(row, masks, score, option):
    """JetEngine: as many as there are cumulated sums below the bound, at least one."""
    order, spent, n = ranked(score, masks, min), 0.0, 0
    for j in order:
        spent += score[j]
        n += fp32(spent) < option["bound"]
    return set(order[: max(n, 1)])


def low_entropy(row, masks, score, option):
    """d3LLM: entropy at most the threshold, and the lowest always."""
    return {j for j in masks if score[j] <= option["threshold"]} | set(
        ranked(score, masks, min)[:1]
    )


def top_quota(row, masks, score, option):
    """LLaDA, Dream, Fast-dLLM, dllm, JetEngine, LMDeploy static: the best."""
    return set(ranked(score, masks)[: row["quota"]])


def leftmost_positions(row, masks, score, option):
    """JetEngine, LMDeploy sequential: masks among the positions from the first mask on."""
    first = masks[0] if masks else 0
    return {j for j in masks if j < first + row["quota"]}


def joint(row, masks, score, option):
    """SGLang, diffusers (LLaDA2.1): masks above the threshold or the best; edits above theirs."""
    keep = above_or_best(row, masks, score, option)
    for j in row["rows"]:
        generated = row["start"] + j >= row["prompt"] and j not in masks
        if generated and row["token"][j] != row["before"][j]:
            keep |= {j} if score[j] > option["edit_threshold"] else set()
    return keep


F32, F64, HALF = torch.float32, torch.float64, torch.float16
THRESHOLDS = [{"threshold": t} for t in (0.0, 0.25, 0.5, 0.9, 1.0)]
FACTORS = [{"factor": f} for f in (0.0, 0.3, 1.0, 1.5, 2.5)]
BOUNDS = [{"bound": b} for b in (0.0, 0.25, 0.75, 2.0, 30.0)]
JOINTS = [{"threshold": t, "edit_threshold": e} for t, e in ((0.5, 0.9), (0.9, 0.5), (0.25, 0.0))]
# The table: semantics, rule, dtypes of the scores, options, statement. "quota": True, by row.
TABLE = [
    ("fast_dllm", "threshold", (F64, F32), THRESHOLDS, at_or_above),
    ("dinfer", "threshold", (F32, F64), THRESHOLDS, near_the_best),
    ("dllm", "threshold", (F32,), THRESHOLDS, at_or_above),
    ("sglang", "threshold", (F32, HALF), THRESHOLDS, above_or_best),
    ("lmdeploy", "threshold", (F32, HALF), THRESHOLDS, at_or_above),
    ("jetengine", "threshold", (F32,), THRESHOLDS, above_or_leftmost),
    ("diffusers", "threshold", (F32,), THRESHOLDS, above_or_quota),
    ("fast_dllm", "factor", (F64, F32), FACTORS, fast_dllm_factor),
    ("dinfer", "factor", (F64,), FACTORS, fast_dllm_factor),
    ("dllm", "factor", (F32,), FACTORS, dllm_factor),
    ("diffusers", "entropy_bound", (F32,), BOUNDS, exclusive_bound),
    ("jetengine", "entropy_bound", (F32,), BOUNDS, inclusive_bound),
    ("diffusers", "renoise", (F32,), BOUNDS, exclusive_bound),
    ("d3llm", "entropy", (F64, F32), THRESHOLDS, low_entropy),
    ("sglang", "joint", (F32, HALF), JOINTS, joint),
    ("diffusers", "joint", (F32,), JOINTS, joint),
    ("llada", "quota", (F32, HALF), [{}], top_quota),
    ("dream", "quota", (F32, HALF), [{}], top_quota),
    ("dream", "margin", (F32, HALF), [{}], top_quota),
    ("fast_dllm", "quota", (F64,), [{}], top_quota),
    ("dinfer", "quota", (F64,), [{}], top_quota),
    ("dllm", "quota", (F32,), [{}], top_quota),
    ("lmdeploy", "quota", (F32, HALF), [{}], top_quota),
    ("jetengine", "quota", (F32,), [{}], top_quota),
    ("jetengine", "left_to_right", (F32,), [{}], leftmost_positions),
    ("lmdeploy", "left_to_right", (F32,), [{}], leftmost_positions),
]
TAKES_QUOTA = (top_quota, leftmost_positions)
SCHEDULED = (above_or_quota, above_or_leftmost)  # their least number is a schedule, per sequence
CASES = [
    pytest.param(*line[:2], dtype, *line[3:], backend, id=f"{line[0]}-{line[1]}-{dtype}-{backend}")
    for line in TABLE
    for dtype in line[2]
    for backend in BACKENDS
    if dtype != F64 or backend == "torch"
]


def test_the_table_is_complete():
    from pydllm.ops.unmask import SEMANTICS

    named = {(semantics, rule) for semantics, rules in SEMANTICS.items() for rule in rules}
    listed = {(semantics, rule) for semantics, rule, *_ in TABLE}
    assert {pair for pair in named if pair[0] != "exact"} == listed


def semantic_case(batch, rows, seed, dtype, lower_is_better):
    """Windows of masks and tokens; every third row smooth, of ties, or close to a tie."""
    case = make_case(batch, rows, rows + 9, seed)
    generator = torch.Generator().manual_seed(seed)
    # On a grid, so that sums of entropies and of what is added below are exact.
    smooth = (torch.rand(batch, rows, generator=generator, dtype=F64) ** 0.3 * 2**14).round()
    smooth /= 2**14
    ties = integers(batch, rows, low=0, high=5, seed=seed).double() / 4
    close = ties.clamp(max=0.75) + 2**-17 * integers(batch, rows, low=-2, high=3, seed=seed + 1)
    kind = torch.arange(batch)[:, None] % 3
    score = torch.where(kind == 0, smooth, torch.where(kind == 1, ties, close)).clamp(0, 1)
    case["score"] = (1 - score if lower_is_better else score).to(dtype)
    case["start"] = integers(batch, low=0, high=10, seed=seed + 3).int()
    return case


def expect(case, statement, rule, option, quota, prompt, rounded):
    """x, accepted and remaining, sequence by sequence."""
    x, token, score = (case[name].tolist() for name in ("x", "token", "score"))
    step_map, nfe = case["step_map"].tolist(), case["nfe"].tolist()
    remaining, accepted = [], []
    for b, start in enumerate(case["start"].tolist()):
        inside = list(range(case["length"][b].item()))
        before = [x[b][start + j] for j in inside]
        masks = inside if rule == "renoise" else [j for j in inside if before[j] == MASK]
        row = {
            "rows": inside,
            "before": before,
            "token": token[b],
            "start": start,
            "prompt": prompt[b].item(),
            "quota": quota[b].item(),
            "round": rounded,
        }
        options = {"min_tokens": quota[b].item() if statement in SCHEDULED else 1} | {
            name: rounded(value) for name, value in option.items()
        }
        keep = statement(row, masks, score[b], options) if masks or rule == "joint" else set()
        for j in inside:
            if j in keep:
                x[b][start + j], step_map[b][start + j] = token[b][j], nfe[b]
            elif rule == "renoise":
                counter = start + j, case["request"][b].item(), nfe[b]
                word = random_word(*counter, case["seed"])
                x[b][start + j] = word * 40 >> 32
        accepted.append(len(keep))
        left = [j for j in inside if j not in keep] if rule == "renoise" else inside
        remaining.append(sum(rule == "renoise" or x[b][start + j] == MASK for j in left))
        generated = rule == "joint" and any(start + j >= row["prompt"] for j in inside)
        nfe[b] += bool(masks or generated)
    return torch.tensor(x), numbers(step_map), numbers(nfe), numbers(remaining), numbers(accepted)


def random_word(position, request, nfe, seed):
    """The second word of Philox: those of the library are checked word by word elsewhere."""
    from pydllm.reference.philox import philox

    words = [torch.tensor([word]) for word in (0xFFFFFFFF, position, request, nfe)]
    got = philox(*words, seed)[0].tolist()
    assert got[0] == philox_word(0xFFFFFFFF, position, request, nfe, seed)
    return got[1]


def call(case, rule, semantics, option, backend, **extra):
    case = copied(case)
    counts = ops.unmask(**case, rule=rule, semantics=semantics, backend=backend, **option, **extra)
    return case["x"], case["step_map"], case["nfe"], *counts


@pytest.mark.parametrize(("semantics", "rule", "dtype", "options", "statement", "backend"), CASES)
def test_the_table(semantics, rule, dtype, options, statement, backend):
    lower = rule in ("entropy", "entropy_bound", "renoise")
    sizes = (3, 8, 32, 33) if rule != "renoise" else (5, 33)
    for index, (rows, option) in enumerate((r, o) for r in sizes for o in options):
        batch = 60 if rule == "renoise" else 240
        case = semantic_case(batch, rows, 100 * index, dtype, lower)
        quota = integers(batch, low=0, high=6, seed=index).int()
        prompt = case["start"] + integers(batch, low=-1, high=rows + 2, seed=index).int()
        given = dict(option)
        if statement in TAKES_QUOTA:
            given["quota"] = quota
        if statement in SCHEDULED:
            given["min_tokens"] = quota
        if rule == "renoise":
            given["vocab_size"] = 40
        if rule == "joint":
            given["prompt_length"] = prompt
        got = call(case, rule, semantics, given, backend)

        def rounded(number):
            return torch.tensor(number, dtype=F64).to(dtype).item()

        expected = expect(case, statement, rule, option, quota, prompt, rounded)
        names = ("x", "step_map", "nfe", "remaining", "accepted")
        for name, one, other in zip(names, got, expected, strict=True):
            assert torch.equal(one, other), (name, option, rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("least", [0, 1, 3, 100])
def test_at_least_min_tokens(least, backend):
    """A rule with a limit takes what it takes, or the best ``min_tokens``, whichever is more."""
    rules = {
        "threshold": {"threshold": 0.75},
        "factor": {"factor": 1.0},
        "entropy": {"threshold": 0.25},
        "entropy_bound": {"bound": 0.5},
        "joint": {"threshold": 0.75, "edit_threshold": 1.0},
    }
    for rule, option in rules.items():
        case = semantic_case(200, 12, 7, F32, rule.startswith("entropy"))
        case["token"] = case["token"].clamp(max=MASK - 1)
        inside = (case["x"] == MASK).gather(1, case["start"][:, None] + torch.arange(12))
        inside &= torch.arange(12) < case["length"][:, None]
        case["score"] = torch.where(inside, case["score"], 0.0)  # nothing is edited
        *_, none = call(case, rule, "exact", option, backend, min_tokens=0)
        many = torch.full_like(none, least)
        for value in (least, many):
            x, *_, got = call(case, rule, "exact", option, backend, min_tokens=value)
            masks = inside.sum(1)
            assert torch.equal(got.long(), torch.minimum(torch.maximum(none, many), masks))
        best = -case["score"] if rule.startswith("entropy") else case["score"]
        *_, expected = call(case | {"score": best}, "quota", "exact", {"quota": got}, backend)
        top, *_ = call(case | {"score": best}, "quota", "exact", {"quota": got}, backend)
        assert torch.equal(expected, got) and torch.equal(x, top)


@pytest.mark.parametrize("backend", BACKENDS)
def test_edits_reach_the_exact_threshold_and_spare_the_prompt(backend):
    def step(semantics, prompt):
        x = torch.tensor([[1, 2, 3, MASK]])
        case = {
            "x": x,
            "step_map": torch.full((1, 4), -1, dtype=torch.int32),
            "nfe": numbers([5]),
            "token": torch.tensor([[7, 2, 8, 9]]),
            "score": torch.tensor([[1.0, 1.0, 0.5, 0.125]]),
            "mask_id": MASK,
            "start": numbers([0]),
            "length": numbers([4]),
        }
        option = {"threshold": 0.75, "edit_threshold": 0.5, "prompt_length": prompt}
        x, step_map, nfe, remaining, accepted = call(case, "joint", semantics, option, backend)
        assert nfe.tolist() == [6] and remaining.tolist() == [0]
        assert (step_map == 5).sum() == accepted
        return x.tolist()[0]

    assert step("exact", None) == [7, 2, 8, 9]
    assert step("exact", numbers([1])) == [1, 2, 8, 9]
    assert step("sglang", None) == [7, 2, 3, 9]
    assert step("diffusers", numbers([4])) == [1, 2, 3, 9]


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_uniform_and_keyed_by_sequence_and_position(backend):
    batch, rows, vocab = 64, 64, 16
    case = make_case(batch, rows, rows, seed=0)
    case["start"][:], case["length"][:], case["score"][:] = 0, rows, 100.0
    case["request"], case["nfe"] = numbers(range(batch)), numbers([3] * batch)

    def noise(**changes):
        option = {"bound": 0.0, "vocab_size": vocab, "min_tokens": 0}
        x, *_, remaining, accepted = call(case | changes, "renoise", "exact", option, backend)
        # The first is taken whatever its entropy: nothing was spent before it.
        assert accepted.tolist() == [1] * batch and remaining.tolist() == [rows - 1] * batch
        return x[:, 1:]

    x = noise()
    assert x.min() >= 0 and x.max() < vocab
    counts = torch.bincount(x.flatten(), minlength=vocab).double()
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert statistic < 37.7  # 15 degrees of freedom, p = 0.001
    assert not torch.equal(x, noise(seed=1)) and not torch.equal(x, noise(nfe=case["nfe"] + 1))
    assert torch.equal(x.flip(0), noise(request=case["request"].flip(0)))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("semantics", "rule"), [("sglang", "threshold"), ("llada", "quota")])
def test_half_precision_scores_on_a_gpu(semantics, rule, dtype, backend):
    case = semantic_case(200, 32, 3, dtype, False)
    on_gpu = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    quota = numbers([3] * 200)
    option = {"threshold": 0.9} if rule == "threshold" else {"quota": quota}
    expected = call(case, rule, semantics, option, "torch")
    option = {"threshold": 0.9} if rule == "threshold" else {"quota": quota.cuda()}
    for one, other in zip(call(on_gpu, rule, semantics, option, backend), expected, strict=True):
        assert torch.equal(one.cpu(), other)
