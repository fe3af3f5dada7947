"""Fast-dLLM's three loops for LLaDA against the published ones, stated plainly."""

import inspect

import pytest
import torch

from pydllm import PydllmError
from pydllm.integrations import fast_dllm
from tests.integrations.published_llada import fast_dllm as published
from tests.integrations.tiny import MASK, Plainly, pair, prompts, standin

LOOPS = {
    "none": fast_dllm.generate,
    "prefix": fast_dllm.generate_with_prefix_cache,
    "dual": fast_dllm.generate_with_dual_cache,
}
LENGTHS = {"steps": 6, "gen_length": 12, "block_length": 6, "mask_id": MASK}


@pytest.fixture(scope="module")
def models():
    """Greedy predictions are no masks: the published loops fail then, or do not return."""
    return pair("llada", seed=3, predicts_masks=False)


CASES = {
    "schedule": {},
    "a token a step": {"steps": 12},
    "more steps than tokens": {"steps": 16},
    "threshold": {"threshold": 0.5},
    "low threshold": {"threshold": 0.05},
    "all at once": {"threshold": 0.0},
    "threshold above one": {"threshold": 1.5},
    "factor": {"factor": 1.0},
    "small factor": {"factor": 0.3},
    "temperature": {"temperature": 0.9, "threshold": 0.4},
    "scheduled at a temperature": {"temperature": 0.6},
    "random": {"remasking": "random"},
    "random threshold": {"remasking": "random", "threshold": 0.7, "temperature": 0.5},
    "factor at a temperature": {"temperature": 0.8, "factor": 0.8},
}


VERSIONS = ["a9b81e4", "24cc59e"]


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("cache", LOOPS)
@pytest.mark.parametrize("version", VERSIONS)
def test_tokens_and_forwards(models, version, cache, options):
    plain, own = models
    for seed in range(2):
        ids, _ = prompts(1, 4 + seed, seed=seed)
        oracle = Plainly(plain)
        given = LENGTHS | options | {"version": version}
        torch.manual_seed(7)
        expected, forwards = published(oracle, ids, cache=cache, **given)
        torch.manual_seed(7)
        result = LOOPS[cache](own, ids, **given)
        assert type(result) is tuple and type(result[1]) is int
        x, nfe = result
        assert x.dtype == torch.int64 and torch.equal(x, expected)
        assert nfe == forwards == oracle.calls


@pytest.mark.parametrize("cache", LOOPS)
def test_no_forward_where_nothing_is_left_to_do(models, cache):
    """In June 2025 the loops with a cache ran one forward more behind a complete block."""
    ids, _ = prompts(1, 5)
    given = LENGTHS | {"threshold": 0.0}
    for options, forwards in (({}, 2), ({"version": "24cc59e"}, 4)):
        x, nfe = LOOPS[cache](models[1], ids, **given, **options)
        assert nfe == (2 if cache == "none" else forwards)
        assert torch.equal(x[:, :5], ids)


def test_the_dual_cache_ends_with_the_steps(models):
    """Since May 2026; in June 2025 it went on."""
    ids, _ = prompts(1, 5)
    given = LENGTHS | {"threshold": 0.999}
    x, nfe = fast_dllm.generate_with_dual_cache(models[1], ids, **given)
    assert nfe == 6 and (x == MASK).sum() == 6
    for options in ({"version": "24cc59e"},):
        x, nfe = fast_dllm.generate_with_dual_cache(models[1], ids, **given, **options)
        assert nfe == 12 and not (x == MASK).any()


@pytest.mark.parametrize("cache", LOOPS)
@pytest.mark.parametrize("options", [{}, {"threshold": 0.3}, {"factor": 1.0}])
def test_a_batch_is_its_sequences(models, cache, options):
    own = models[1]
    ids, _ = prompts(4, 5, seed=1)
    given = LENGTHS | options
    together, nfe = LOOPS[cache](own, ids, **given)
    alone = [LOOPS[cache](own, row[None], **given) for row in ids]
    assert torch.equal(together, torch.cat([x for x, _ in alone]))
    most = max(nfe for _, nfe in alone)
    assert most <= nfe <= sum(nfe for _, nfe in alone)


@pytest.mark.parametrize("cache", LOOPS)
def test_masks_in_the_prompt(models, cache):
    plain, own = models
    ids, _ = prompts(1, 6)
    ids[0, 1:3] = MASK
    for options in ({"factor": 1.0}, {"threshold": 0.4}):
        expected, forwards = published(Plainly(plain), ids, cache=cache, **LENGTHS | options)
        x, nfe = LOOPS[cache](own, ids, **LENGTHS | options)
        assert torch.equal(x, expected) and nfe == forwards
    # They use up the schedule, and the published loop fails; here the rest follows, one a forward.
    # With the dual cache it ends there.
    x, nfe = LOOPS[cache](own, ids, **LENGTHS)
    left = int((x[:, 6:] == MASK).sum())
    assert (left > 0 and nfe == 6) if cache == "dual" else (left == 0 and nfe > 6)
    with pytest.raises(ValueError, match="with compat=None expected no masks, got 2 .*infill"):
        LOOPS[cache](own, ids, **LENGTHS, compat=None)


@pytest.mark.parametrize("cache", LOOPS)
def test_a_model_that_predicts_masks_alone(models, cache):
    """The loops that do not return raise; that of the dual cache returns masks since May 2026."""
    plain = type(models[0])(models[0].config, dict(models[0].weights))
    head = plain.weights["model.transformer.ff_out.weight"].clone()
    norm = torch.zeros_like(plain.weights["model.transformer.ln_f.weight"])
    plain.weights["model.transformer.ff_out.weight"] = head
    plain.weights["model.transformer.ln_f.weight"] = norm  # all logits are 0: the lowest id wins
    module, given = standin(plain), LENGTHS | {"mask_id": 0, "threshold": 0.9}
    ids = prompts(1, 4)[0].clamp(min=1)
    endless = {"version": "24cc59e"} if cache == "dual" else {}
    with pytest.raises(PydllmError, match="predicts the mask at every"):
        LOOPS[cache](module, ids, **given, **endless)
    with pytest.raises(PydllmError, match="predicts the mask at every"):
        LOOPS[cache](module, ids, **given | {"threshold": None}, **endless)
    if cache == "dual":
        x, nfe = LOOPS[cache](module, ids, **given)
        assert nfe == 6 and (x == 0).sum() == 12
    x, _ = LOOPS[cache](module, ids, **given, **endless, compat=None)
    assert not (x == 0).any()


@pytest.mark.parametrize("cache", LOOPS)
def test_our_noise_follows_torchs_seed(models, cache):
    ids, _ = prompts(2, 5)

    def run(seed):
        torch.manual_seed(seed)
        given = LENGTHS | {"steps": 12, "temperature": 1.0, "threshold": 0.4, "compat": None}
        return LOOPS[cache](models[1], ids, **given)[0]

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert not (run(2) == MASK).any()


@pytest.mark.parametrize("cache", LOOPS)
def test_signature(cache):
    original = {
        "steps": 128,
        "gen_length": 128,
        "block_length": 128,
        "temperature": 0.0,
        "remasking": "low_confidence",
        "mask_id": 126336,
        "threshold": None,
        "factor": None,
    }
    parameters = list(inspect.signature(LOOPS[cache]).parameters.values())[:10]
    assert [p.name for p in parameters] == ["model", "prompt", *original]
    assert {p.name: p.default for p in parameters[2:]} == original


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gen_length": 13}, "multiple of block_length 6, got 13"),
        ({"steps": 7}, "multiple of the 2 blocks, got 7"),
        ({"remasking": "margin"}, "low_confidence, random, got 'margin'"),
        ({"threshold": -0.1}, "threshold: expected a number of at least 0"),
        ({"factor": -1.0}, "factor: expected a number of at least 0"),
        ({"version": "main"}, "version: expected one of a9b81e4, 24cc59e, got 'main'"),
        ({"mask_id": 126336}, r"mask_id: .* in \[0, 61\)"),
    ],
)
def test_bad_arguments(models, options, message):
    with pytest.raises(ValueError, match=message):
        fast_dllm.generate_with_dual_cache(models[1], prompts(1, 5)[0], **LENGTHS | options)
