"""The accept rules of published code, each stated in a few lines, against ``_rules``.

A statement sees the masks of one sequence, in order of position, and Python numbers. Ties, which
that code leaves to a sort or ``topk``, go to the lowest position.
"""

import pytest
import torch

from pydllm.integrations import _rules as rules

ROWS, BATCH, MASK = 12, 240, 50


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


def inclusive_bound(row, masks, score, option):
    """JetEngine: as many as there are cumulated sums below the bound, at least one."""
    order, spent, n = ranked(score, masks, min), 0.0, 0
    for j in order:
        spent += score[j]
        n += spent < option["bound"]
    return set(order[: max(n, 1)])


def top_quota(row, masks, score, option):
    """LLaDA, Dream, Fast-dLLM, dllm, JetEngine, LMDeploy static: the best."""
    return set(ranked(score, masks)[: row["quota"]])


def leftmost_positions(row, masks, score, option):
    """JetEngine, LMDeploy sequential: masks among the positions from the first mask on."""
    first = masks[0] if masks else 0
    return {j for j in masks if j < first + row["quota"]}


LEAST = torch.full((BATCH, 1), 3)
TABLE = {
    "at or above": (at_or_above, "threshold", lambda s, m, v: rules.by_threshold(s, m, v)),
    "at or above, topk": (
        at_or_above,
        "threshold",
        lambda s, m, v: rules.by_threshold(s, m, v, m.sum(1).tolist()),
    ),
    "above, or the best": (
        above_or_best,
        "threshold",
        lambda s, m, v: rules.above(s, m, v, torch.ones_like(LEAST)),
    ),
    "above, or a quota": (
        above_or_quota,
        "threshold",
        lambda s, m, v: rules.above(s, m, v, LEAST),
    ),
    "above, or a quota by topk": (
        above_or_quota,
        "threshold",
        lambda s, m, v: rules.above(s, m, v, 3) & m,
    ),
    "near the best": (near_the_best, "threshold", rules.near_best),
    "factor": (fast_dllm_factor, "factor", rules.by_factor),
    "inclusive bound": (inclusive_bound, "bound", rules.by_entropies),
    "quota": (top_quota, "quota", lambda s, m, v: rules.first(s, m, v)),
    "quota by topk": (top_quota, "quota", lambda s, m, v: rules.top(s, m, v) & m),
    "leftmost": (leftmost_positions, "quota", lambda s, m, v: rules.span(m, v) & m),
}
VALUES = {
    "threshold": (0.0, 0.25, 0.5, 0.9, 1.0),
    "factor": (0.0, 0.3, 1.0, 1.5, 2.5),
    "bound": (0.0, 0.25, 0.75, 2.0, 30.0),
    "quota": (0, 1, 3, ROWS),
}


BY_TOPK = [rule for name, (_, _, rule) in TABLE.items() if "topk" in name]


@pytest.mark.parametrize(("statement", "option", "rule"), TABLE.values(), ids=TABLE)
def test_a_rule_equals_its_statement(statement, option, rule):
    for seed, value in enumerate(VALUES[option]):
        generator = torch.Generator().manual_seed(seed)
        score = torch.rand(BATCH, ROWS, generator=generator, dtype=torch.float64)
        if rule not in BY_TOPK:
            score[::3] = (score[::3] * 4).round() / 4  # ties
        share = torch.rand(BATCH, 1, generator=generator)
        masked = torch.rand(BATCH, ROWS, generator=generator) < share
        chosen = rule(score, masked, value)
        for b in range(BATCH):
            masks = masked[b].nonzero().flatten().tolist()
            row = {"quota": value if option == "quota" else 3, "token": [0] * ROWS, "round": float}
            options = {option: value, "min_tokens": 3 if statement is above_or_quota else 1}
            expected = statement(row, masks, score[b].tolist(), options) if masks else set()
            assert set(chosen[b].nonzero().flatten().tolist()) == expected, (b, value)


def test_entropies_of_all_positions():
    """DiffusionGemma, diffusers: cumsum(H) - H <= bound; the first always."""
    generator = torch.Generator().manual_seed(0)
    entropy = (torch.rand(BATCH, ROWS, generator=generator) * 64).round() / 64
    for bound in VALUES["bound"]:
        chosen = rules.within(entropy, bound)
        for b in range(BATCH):
            spent, expected = 0.0, set()
            for j in sorted(range(ROWS), key=lambda j: (entropy[b, j].item(), j)):
                expected |= {j} if spent <= bound else set()
                spent += entropy[b, j].item()
            assert set(chosen[b].nonzero().flatten().tolist()) == expected


def test_drawn_places_are_masks_and_follow_torchs_generator():
    generator = torch.Generator().manual_seed(1)
    score = torch.rand(4, ROWS, generator=generator)
    masked = torch.rand(4, ROWS, generator=generator) < 0.7
    torch.manual_seed(0)
    chosen = rules.drawn(score, masked, 3, 0.5, width=20)
    torch.manual_seed(0)
    wide = torch.full((4, 20), -torch.inf)
    wide[:, :ROWS] = torch.where(masked, score, -torch.inf)
    index = torch.multinomial((wide / 0.5).softmax(-1), 3)
    assert torch.equal(chosen, torch.zeros_like(wide, dtype=bool).scatter(1, index, True)[:, :ROWS])
    assert not (chosen & ~masked).any()
