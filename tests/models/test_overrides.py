"""What ``load`` takes over the files' word, and every contradiction with its message."""

import json

import pytest

from pydllm._backend.errors import CheckpointError
from pydllm.models import load
from tests.models.plain import CONFIGS, LLADA, QWEN, RECENT, random_plain, write_checkpoint

QWEN2 = QWEN | {"architectures": ["Qwen2ForCausalLM"]}


def folder_of(path, config, generation=None, weights=None):
    plain = random_plain(config if weights is None else weights)
    plain.config = config
    write_checkpoint(path, plain)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


TAKEN = {
    "open-dcoder": (
        QWEN2,
        {"attention": "full", "shift_logits": True, "mask_id": 33},
        {"attention": "full", "shift_logits": True, "mask_id": 33, "causal": None},
    ),
    "mask of the configuration": (QWEN2, {"attention": "full"}, {"mask_id": 60}),
    "i-dlm": (
        CONFIGS["sdar"],
        {"attention": "causal", "shift_logits": True},
        {
            "attention": "causal",
            "causal": "shifted",
            "mask_id": 60,
            "block_size": None,
            "shift_logits": True,
        },
    ),
    "blocks of another size": (CONFIGS["sdar"], {"block_size": 16}, {"block_size": 16}),
    "a2d with blocks": (
        CONFIGS["a2d-qwen3"],
        {"attention": "block_causal", "block_size": 8},
        {"block_size": 8, "block_origin": "prompt", "causal": "masked"},
    ),
    "blocks from zero": (
        RECENT["a2d-bd3lm"],
        {"block_origin": "zero"},
        {"block_size": 8, "block_origin": "zero"},
    ),
    "without blocks": (
        RECENT["a2d-bd3lm"],
        {"attention": "full"},
        {"attention": "full", "block_size": None, "block_origin": "zero", "causal": None},
    ),
    "llama with blocks": (
        RECENT["llama3"],
        {"attention": "block_causal", "block_size": 4, "mask_id": 5, "causal": "masked"},
        {"attention": "block_causal", "mask_id": 5, "causal": "masked", "seeded": False},
    ),
    "fast-dllm without seeds": (
        RECENT["fast-dllm-v2"],
        {"attention": "full"},
        {"seeded": False, "shift_logits": True, "causal": None},
    ),
    "causal by override": (LLADA, {"causal": "masked"}, {"causal": "masked", "attention": "full"}),
    "one end": (LLADA, {"eos_ids": 3}, {"eos_ids": (3,)}),
    "ends": (LLADA, {"eos_ids": [3, 4, 3]}, {"eos_ids": (3, 4)}),
    "no end": (LLADA, {"eos_ids": ()}, {"eos_ids": ()}),
}


@pytest.mark.parametrize("config, overrides, expected", TAKEN.values(), ids=TAKEN)
def test_taken(tmp_path, config, overrides, expected):
    spec = load(folder_of(tmp_path, config), device="cpu", **overrides).spec
    assert {key: getattr(spec, key) for key in expected} == expected


@pytest.mark.parametrize(
    "own, generation, expected",
    [
        (59, [57, 59], (59, 57)),  # SDAR's chat models: the turn's end stands there alone
        ([59, 57], 3, (59, 57, 3)),
        (None, 4, (4,)),
        (59, None, (59,)),
        (None, None, ()),
    ],
)
def test_ends_of_both_files(tmp_path, own, generation, expected):
    config = {k: v for k, v in (LLADA | {"eos_token_id": own}).items() if v is not None}
    folder = folder_of(tmp_path, config, {"eos_token_id": generation})
    assert load(folder, device="cpu").spec.eos_ids == expected


def rope(**section):
    return {"rope_scaling": section}


QUERY = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "llama_4_scaling_beta": 0.1}
# A configuration, the overrides, the error, its message.
WRONG = {
    # overrides that are impossible
    "attention": (LLADA, {"attention": "sparse"}, "attention: expected one of full, .* 'sparse'"),
    "origin": (LLADA, {"block_origin": "one"}, "block_origin: expected one of zero, prompt, got"),
    "causal": (LLADA, {"causal": "yes"}, "causal: expected one of shifted, masked, got 'yes'"),
    "block size 0": (CONFIGS["sdar"], {"block_size": 0}, "block_size: .* at least 1, got 0"),
    "block size True": (CONFIGS["sdar"], {"block_size": True}, "block_size: .*, got True"),
    "block size 4.0": (CONFIGS["sdar"], {"block_size": 4.0}, "block_size: .*, got 4.0"),
    "blocks with full": (
        LLADA,
        {"block_size": 4},
        "block_size: expected none with attention 'full', got 4 .attention='block_causal'",
    ),
    "blocks made full": (
        CONFIGS["sdar"],
        {"attention": "full", "block_size": 4},
        "block_size: expected none with attention 'full', got 4",
    ),
    "blocks with causal": (QWEN2, {"block_size": 4}, "block_size: expected none .* 'causal', got"),
    "blocks without a size": (
        QWEN2,
        {"attention": "block_causal"},
        "block_size: expected an integer of at least 1 .load.*block_size=.*, found none",
    ),
    "origin with full": (
        LLADA,
        {"block_origin": "prompt"},
        "block_origin: expected 'zero' with attention 'full', got 'prompt'",
    ),
    "masked causal": (
        CONFIGS["sdar"],
        {"attention": "causal", "causal": "masked"},
        "causal: expected 'shifted' with attention 'causal', got 'masked'",
    ),
    "mask outside": (LLADA, {"mask_id": 61}, r"mask_id: expected token ids in \[0, 61\), got 61"),
    "mask negative": (LLADA, {"mask_id": -1}, "mask_id: expected token ids .*, got -1"),
    "mask True": (LLADA, {"mask_id": True}, "mask_id: expected token ids .*, got True"),
    "mask a name": (LLADA, {"mask_id": "<mask>"}, "mask_id: expected token ids .*, got '<mask>'"),
    "two masks": (LLADA, {"mask_id": [3, 4]}, r"mask_id: expected one token id, got \[3, 4\]"),
    "mask is an end": (LLADA, {"mask_id": 59}, "mask_id: expected another id than .* EOS .59,., g"),
    "end is the mask": (LLADA, {"eos_ids": 60}, "mask_id: expected another id than .*, got 60"),
    "ends outside": (LLADA, {"eos_ids": (3, 99)}, "eos_ids: expected token ids .*, got 99"),
    "ends a name": (LLADA, {"eos_ids": ["<eos>"]}, "eos_ids: expected token ids .*, got '<eos>'"),
    "shift": (LLADA, {"shift_logits": 1}, "shift_logits: expected True or False, got 1"),
    "no mask for full": (
        {k: v for k, v in QWEN2.items() if k != "mask_token_id"},
        {"attention": "full"},
        "mask_token_id: expected the id of the mask token .load.*mask_id=.*, found none",
    ),
    # configurations that are wrong or contradict themselves
    "ends outside, generation": (
        LLADA | {"generation": {"eos_token_id": [3, 61]}},
        {},
        r"generation_config.json: eos_token_id: expected token ids in .* .load.*eos_ids=. replaces",
    ),
    "generation no object": (
        LLADA | {"generation": [3]},
        {},
        "generation_config.json: expected a JSON object, found list",
    ),
    "block size text": (
        CONFIGS["sdar"] | {"block_size": "4"},
        {},
        "block_size: expected an integer of at least 1, found '4'",
    ),
    "block size of v2": (
        RECENT["fast-dllm-v2"] | {"bd_size": 0},
        {},
        "bd_size: expected an integer of at least 1, found 0",
    ),
    "layers": (
        LLADA | {"n_layers": 2**40},
        {},
        "n_layers: expected an integer up to 4096, found 1099511627776",
    ),
    "positions": (
        LLADA | {"max_sequence_length": 2**31},
        {},
        "max_sequence_length: expected an integer up to 2147483647, found 2147483648",
    ),
    "infinite theta": (
        LLADA | {"rope_theta": float("inf")},
        {},
        "rope_theta: expected a positive number that is finite, found inf",
    ),
    "infinite eps": (
        LLADA | {"rms_norm_eps": 1e999},
        {},
        "rms_norm_eps: expected a positive number that is finite, found inf",
    ),
    "nan theta": (LLADA | {"rope_theta": float("nan")}, {}, "rope_theta: .* positive .* found nan"),
    "layer types 3": (QWEN2 | {"layer_types": 3}, {}, "layer_types: expected .*, found 3"),
    "layer types of another length": (
        QWEN2 | {"layer_types": ["full_attention"]},
        {},
        "layer_types: expected 'full_attention' or .* for each of 3 layers, found",
    ),
    "sliding layers, no window": (
        QWEN2 | {"layer_types": ["sliding_attention"] * 3, "sliding_window": 4},
        {},
        "layer_types: expected 'full_attention' alone, since there is no sliding window, found",
    ),
    "sliding without a width": (
        QWEN2 | {"use_sliding_window": True, "max_window_layers": 1},
        {},
        "sliding_window: expected an integer of at least 1, found none",
    ),
    "sliding without a first": (
        QWEN2 | {"use_sliding_window": True, "sliding_window": 4},
        {},
        "max_window_layers: expected a number of layers, found none",
    ),
    "sliding llama": (
        RECENT["llama3"] | {"use_sliding_window": True},
        {},
        "use_sliding_window: expected False .others are not supported., found True",
    ),
    "sliding sdar": (
        CONFIGS["sdar"] | {"use_sliding_window": True},
        {},
        "use_sliding_window: expected False .others are not supported., found True",
    ),
    "longrope": (
        QWEN2 | rope(rope_type="longrope", short_factor=[1.0]),
        {},
        "rope_type: expected one of default, .* not supported.*, found 'longrope'; pydllm.patch",
    ),
    "rope of two types": (
        QWEN2 | rope(type="yarn", factor=4.0) | {"rope_parameters": {"rope_type": "linear"}},
        {},
        "rope_scaling: rope_type: expected 'linear' as rope_parameters says, found none",
    ),
    "rope with a key too many": (
        QWEN2 | rope(rope_type="linear", factor=2.0, beta_fast=32),
        {},
        "rope_scaling: beta_fast: expected no such key with rope type 'linear', found 32",
    ),
    "query scale without a length": (
        RECENT["nemotron"] | {"rope_parameters": QUERY},
        {},
        "original_max_position_embeddings: expected an integer of at least 1, found none",
    ),
    "hidden not heads": (
        QWEN2 | {"num_attention_heads": 5, "num_key_value_heads": 5},
        {},
        "num_attention_heads: expected a divisor of hidden_size 48 .or a head_dim., found 5",
    ),
    "kv heads": (
        QWEN2 | {"num_key_value_heads": 4},
        {},
        "num_key_value_heads: expected a divisor of the 6 heads, found 4",
    ),
    "mask of v2 outside": (
        {k: v for k, v in RECENT["fast-dllm-v2"].items() if k != "mask_token_id"},
        {},
        "mask_token_id: expected the id of the mask token .load.*mask_id=.*, found none",
    ),
}


@pytest.mark.parametrize("config, overrides, message", WRONG.values(), ids=WRONG)
def test_wrong(tmp_path, config, overrides, message):
    config = dict(config)
    generation = config.pop("generation", None)
    weights = LLADA if "d_model" in config else QWEN2  # never read
    folder = folder_of(tmp_path, config, generation, weights)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        load(folder, device="cpu", **overrides)
    assert len(str(caught.value)) < 500
    if message.startswith("shift"):
        assert isinstance(caught.value, TypeError)
    elif not overrides:
        assert isinstance(caught.value, CheckpointError)


def test_there_are_forty():
    assert len(WRONG) >= 40
