"""FreeDave's functions against the published loops, stated plainly."""

import inspect

import pytest
import torch

from pydllm import PydllmError
from pydllm.integrations import freedave
from tests.integrations import published_freedave as published
from tests.integrations.tiny import EOS, MASK, Plainly, pair, prompts, standin

IDS = {"mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": 58}
NAMES = ("llada-gqa", "dream", "sdar")
FULL = {
    "static": {"decoding_steps": 12},
    "static, few steps": {"decoding_steps": 6},
    "static, threshold": {"decoding_steps": 12, "confidence_threshold": 0.1},
    "static, drawn": {"decoding_steps": 12, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
    "one draft": {"draft_steps": 1},
    "drafts": {"draft_steps": 4},
    "drafts from the left": {"draft_steps": 8, "alg_temp": -1},
    "drafts, threshold": {"draft_steps": 3, "confidence_threshold": 0.1},
    "drafts, threshold from the left": {
        "draft_steps": 3,
        "confidence_threshold": 0.1,
        "alg_temp": -1,
    },
    "drafts, drawn": {"draft_steps": 4, "temperature": 0.5},
    "equal scores": {"draft_steps": 4, "temperature": 0.5, "top_k": 1},
    "eager": {"draft_steps": 5, "eager_acceptance_mode": True},
    "eager, threshold": {
        "draft_steps": 3,
        "eager_acceptance_mode": True,
        "confidence_threshold": 0.1,
    },
}


@pytest.fixture(scope="module")
def models():
    made = {}
    for name in NAMES:
        layers = "n_layers" if name == "llada-gqa" else "num_hidden_layers"
        made[name] = pair(name, 2, predicts_masks=False, **{layers: 2})
    return made


def expected(models, name, ids, pads=None, **options):
    plain = models[name][0]
    if name == "sdar":
        return published.block_causal(plain, ids, **options, **IDS)
    return published.full(Plainly(plain), ids, pads, **options, **IDS)


def call(models, name, ids, **options):
    kind = "block" if name == "sdar" else "full"
    drafts = "_FreeDave" if "draft_steps" in options else ""
    function = getattr(freedave.DLMGeneration(), f"block_decode_with_{kind}_attention{drafts}")
    return function(models[name][1], ids, **options, **IDS)


def check(found, wanted):
    assert found.sequences.dtype == torch.int64
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(found.trajectory_step_map, wanted.trajectory_step_map)
    assert found.nfe == wanted.nfe
    for name in ("num_proposed_tokens", "num_hit_tokens"):
        count = getattr(found, name)
        assert (None if count is None else int(count)) == getattr(wanted, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", FULL.values(), ids=FULL)
def test_tokens_steps_forwards_and_counters(models, name, options):
    ids, _ = prompts(1, 6)
    given = {"block_length": 4, "max_gen_length": 12, "temperature": 0.0} | options
    if name != "sdar":
        given["dual_cache"] = not given.get("eager_acceptance_mode")
    torch.manual_seed(3)
    wanted = expected(models, name, ids, **given)
    torch.manual_seed(3)
    check(call(models, name, ids, **given), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_block_that_drafts_have_filled_draws_nothing(models, name):
    """Its first forward stores keys; a draw there would move torch's generator."""
    ids, _ = prompts(1, 6)
    given = {"block_length": 2, "max_gen_length": 10, "draft_steps": 3, "temperature": 1.0}
    given |= {"eager_acceptance_mode": True} | ({} if name == "sdar" else {"dual_cache": False})
    for seed in range(8):
        torch.manual_seed(seed)
        wanted = expected(models, name, ids, **given)
        torch.manual_seed(seed)
        check(call(models, name, ids, **given), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_fewer_forwards_for_the_same_tokens(models, name):
    ids, _ = prompts(1, 5)
    given = {"block_length": 6, "max_gen_length": 12}
    if name != "sdar":
        given["decoding_steps"] = 12
    static = call(models, name, ids, **given)
    fast = call(models, name, ids, **given, draft_steps=6)
    assert torch.equal(fast.sequences, static.sequences) and fast.nfe < static.nfe


@pytest.mark.parametrize("name", ["llada-gqa", "dream"])
@pytest.mark.parametrize("dual", [False, True])
def test_batches_and_padding(models, name, dual):
    ids, mask = prompts(3, 6, 1, [0, 2, 3])
    given = {"block_length": 4, "max_gen_length": 8, "decoding_steps": 8, "dual_cache": dual}
    wanted = expected(models, name, ids, [0, 2, 3], **given, temperature=0.0)
    check(call(models, name, ids, **given, attention_mask=mask), wanted)
    one = expected(models, name, ids[1:2], [2], **given, temperature=0.0, draft_steps=4)
    found = call(models, name, ids[1:2], **given, attention_mask=mask[1:2], draft_steps=4)
    check(found, one)


def test_two_tokens_a_block_keep_a_mask_of_shifted_logits(models):
    ids, _ = prompts(1, 4)
    given = {"block_length": 2, "max_gen_length": 8, "draft_steps": 4, "temperature": 0.0}
    found = call(models, "dream", ids, **given)
    check(found, expected(models, "dream", ids, dual_cache=False, **given))
    assert (found.sequences[0, 4:] == MASK).tolist() == [False, True] * 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("drafts", [{}, {"draft_steps": 3}])
def test_a_block_of_eos_ends(name, drafts):
    plain, _ = pair(name, 2, **{"n_layers" if "llada" in name else "num_hidden_layers": 2})
    plain.weights[plain.ends[2] + ".weight"][EOS] *= 6
    models = {name: (plain, freedave.as_model(standin(plain)))}
    ids, _ = prompts(1, 4)
    given = {"block_length": 2, "max_gen_length": 12, "early_exit": True, "alg_temp": -1} | drafts
    if name != "sdar":
        given |= {"dual_cache": True} | ({} if drafts else {"decoding_steps": 12})
    wanted = expected(models, name, ids, temperature=0.0, **given)
    found = call(models, name, ids, **given)
    check(found, wanted)
    if name != "dream":  # whose first token has another row of the head
        assert found.sequences[0, -2:].tolist() == [EOS, EOS]
        assert (found.trajectory_step_map == -1).any()


@pytest.mark.parametrize("name", NAMES)
def test_our_noise(models, name):
    """The mask is not predicted, and drafts give the static loop's tokens for a seed."""
    ids, _ = prompts(1, 5)
    given = {"block_length": 4, "max_gen_length": 12, "temperature": 1.0, "compat": None}
    steps = {} if name == "sdar" else {"decoding_steps": 12}

    def run(seed, **more):
        torch.manual_seed(seed)
        return call(models, name, ids, **given, **more).sequences

    static = run(0, **steps)
    assert torch.equal(static, run(0, **steps)) and not torch.equal(static, run(1, **steps))
    assert torch.equal(static, run(0, draft_steps=4)) and MASK not in static


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_predicts_masks_alone(models, name):
    plain = type(models[name][0])(models[name][0].config, dict(models[name][0].weights))
    norm = plain.ends[1] + ".weight"
    plain.weights[norm] = torch.zeros_like(plain.weights[norm])
    ids = prompts(1, 5)[0].clamp(min=1)
    given = {"block_length": 4, "max_gen_length": 8, "draft_steps": 2} | IDS | {"mask_token_id": 0}
    kind = "block" if name == "sdar" else "full"
    function = getattr(freedave, f"block_decode_with_{kind}_attention_FreeDave")
    with pytest.raises(PydllmError, match="predicts the mask"):
        function(standin(plain), ids, **given)


def test_signatures():
    shared = {
        "attention_mask": None,
        "temperature": 0.0,
        "top_p": None,
        "top_k": None,
        "alg_temp": None,
        "block_length": 32,
        "max_gen_length": 128,
        "decoding_steps": 128,
    }
    drafts = {
        "draft_steps": 1,
        "eager_acceptance_mode": False,
        "draft_mode": "tree_attention",
        "use_cache": False,
    }
    last = {"pad_target_penalty": 1.0, "confidence_threshold": None, "early_exit": False}
    full = {"mask_token_id": 151666, "eos_token_id": 151645, "pad_token_id": 151643} | last
    block = {"mask_token_id": 151669, "eos_token_id": 151643, "pad_token_id": 151643} | last
    dual = {"dual_cache": False}
    for name, original in {
        "full_attention": {"use_cache": False} | dual | full,
        "full_attention_FreeDave": drafts | dual | full,
        "block_attention": {"use_cache": True} | block,
        "block_attention_FreeDave": drafts | block,
    }.items():
        function = getattr(freedave, f"block_decode_with_{name}")
        parameters = list(inspect.signature(function).parameters.values())
        assert [p.name for p in parameters] == [
            "model",
            "input_ids",
            *shared,
            *original,
            "compat",
            "backend",
        ]
        assert {p.name: p.default for p in parameters[2:-2]} == shared | original


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "dream",
            {"max_gen_length": 10, "decoding_steps": 5},
            "multiple of block_length 4, got 10",
        ),
        ("dream", {"decoding_steps": 4}, "expected a multiple of the 3 blocks, got 4"),
        ("dream", {"draft_steps": 0}, "draft_steps: expected an int of at least 1"),
        ("dream", {"draft_steps": 2, "draft_mode": "tree"}, "draft_mode: expected one of"),
        ("sdar", {"alg_temp": 0.5}, "alg_temp: expected None, 0 or -1, got 0.5"),
        ("sdar", {"confidence_threshold": -1}, "confidence_threshold: expected a number"),
        ("sdar", {"top_k": -1}, "top_k: expected an int of at least 0"),
        ("sdar", {"max_gen_length": 99}, "at most 64 positions"),
        ("sdar", {"early_exit": 1}, "early_exit: expected"),
        ("sdar", {"compat": "sdar"}, "compat: expected 'freedave' or None"),
    ],
)
def test_bad_arguments(models, name, options, message):
    ids, _ = prompts(1, 5)
    given = {"block_length": 4, "max_gen_length": 12} | options
    with pytest.raises((ValueError, TypeError), match=message):
        call(models, name, ids, **given)


def test_bad_models_and_prompts(models):
    ids, mask = prompts(2, 5, 0, [0, 2])
    given = {"block_length": 4, "max_gen_length": 8}
    with pytest.raises(ValueError, match="one sequence"):
        call(models, "sdar", ids, **given)
    with pytest.raises(ValueError, match="one sequence"):
        call(models, "dream", ids, draft_steps=2, **given)
    with pytest.raises(ValueError, match="attention_mask: expected ones"):
        call(models, "sdar", ids[1:], attention_mask=mask[1:], **given)
    with pytest.raises(ValueError, match="expected a model with full attention, got block_causal"):
        freedave.block_decode_with_full_attention(models["sdar"][1], ids, mask_token_id=MASK)
    with pytest.raises(ValueError, match="expected a model with block_causal attention, got full"):
        freedave.block_decode_with_block_attention(models["dream"][1], ids, mask_token_id=MASK)
