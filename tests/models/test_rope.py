"""Rotary tables against transformers' own functions, and what configurations may say of them."""

import pytest
import torch

from pydllm._backend.errors import CheckpointError
from pydllm.models.config import Config
from pydllm.models.rope import Rope, RopeTables, read_query_scale, read_rope

transformers = pytest.importorskip("transformers", reason="compares with its rope functions")
FUNCTIONS = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS

SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3-32": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.5,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-default-length": {"rope_type": "yarn", "factor": 4.0},
    "yarn-ministral": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "yarn-below-one": {
        "rope_type": "yarn",
        "factor": 0.25,
        "original_max_position_embeddings": 16384,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "yarn-deepseek": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
    },
    "yarn-factor": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.25},
    "yarn-exact-range": {"rope_type": "yarn", "factor": 8.0, "truncate": False},
    "proportional": {"rope_type": "proportional"},
}


def oracle(scaling, theta, head_dim, partial):
    """Frequencies and factor of transformers, of 4.57 or 5."""
    values = {
        "hidden_size": 4 * head_dim,
        "num_attention_heads": 4,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "partial_rotary_factor": partial,
    }
    kind = scaling["rope_type"]
    if kind not in FUNCTIONS:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    if transformers.__version__ >= "5":
        parameters = dict(scaling, rope_theta=theta, partial_rotary_factor=partial)
        config = transformers.LlamaConfig(**values, rope_parameters=parameters)
    else:
        config = transformers.LlamaConfig(**values, rope_theta=theta, rope_scaling=dict(scaling))
    frequencies, factor = FUNCTIONS[kind](config, torch.device("cpu"))
    saved = config.to_dict()
    return frequencies, factor, values | {"rope_theta": theta, "rope_scaling": scaling}, saved


@pytest.mark.parametrize("head_dim, partial", [(128, 1.0), (64, 0.5), (80, 0.4)])
@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name, theta, head_dim, partial):
    expected, factor, written, saved = oracle(SCALINGS[name], theta, head_dim, partial)
    for values in (written, saved):  # as users write it, and as this transformers saves it
        rope = read_rope(Config(values), head_dim)
        got = rope.frequencies()
        assert got.shape == expected.shape
        # fp32 powers there: a few roundings of exponents up to ln(1e6).
        torch.testing.assert_close(got, expected.double(), rtol=3e-6, atol=0)
        assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
        assert 2 * len(got) == rope.rotary


def test_a_factor_from_the_lengths():
    scaling = {
        "rope_type": "yarn",
        "factor": None,
        "original_max_position_embeddings": 1024,
    }
    rope = read_rope(
        Config({"rope_theta": 1e4, "max_position_embeddings": 8192, "rope_scaling": scaling}), 64
    )
    assert dict(rope.options)["factor"] == 8.0


def test_tables_grow_and_keep_what_was_given():
    rope = Rope(
        1e4,
        8,
        "yarn",
        (
            ("attention_factor", 1.5),
            ("beta_fast", 32.0),
            ("beta_slow", 1.0),
            ("factor", 4.0),
            ("original_max_position_embeddings", 64.0),
            ("truncate", 1.0),
        ),
    )
    tables = RopeTables(rope, torch.float64, torch.device("cpu"))
    cos, sin = tables.tables(5)
    angle = torch.arange(5)[:, None] * rope.frequencies()
    torch.testing.assert_close(cos, 1.5 * angle.cos(), rtol=0, atol=1e-15)
    torch.testing.assert_close(sin, 1.5 * angle.sin(), rtol=0, atol=1e-15)
    longer, _ = tables.tables(6)
    assert len(longer) == 10 and torch.equal(longer[:5], cos)
    assert tables.tables(9)[0] is longer


WRONG = {
    "longrope": ({"rope_type": "longrope"}, "rope_type: expected one of default, .*, found 'longr"),
    "unknown": ({"type": "su"}, "type: expected one of default, .* not supported.*, found 'su'"),
    "not a name": ({"rope_type": 3}, "rope_type: expected one of default, .*, found 3"),
    "no type": ({"factor": 2.0}, "rope_type: expected one of default, .*, found none"),
    "no factor": ({"rope_type": "linear"}, "factor: expected a positive number, found none"),
    "text": ({"rope_type": "linear", "factor": "2"}, "factor: expected a positive .* found '2'"),
    "unknown key": (
        {"rope_type": "default", "mrope_section": [16, 24, 24]},
        "mrope_section: expected no such key with rope type 'default', found",
    ),
    "key of another type": (
        {"rope_type": "yarn", "factor": 4.0, "low_freq_factor": 1.0},
        "low_freq_factor: expected no such key with rope type 'yarn', found 1.0",
    ),
    "llama3 lacks": (
        {"rope_type": "llama3", "factor": 8.0},
        "low_freq_factor: expected a positive number, found none",
    ),
    "llama3 inverted": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
        "high_freq_factor: expected more than low_freq_factor 4, found 1.0",
    ),
    "yarn inverted": (
        {"rope_type": "yarn", "factor": 8.0, "beta_fast": 1.0, "beta_slow": 32.0},
        "beta_fast: expected at least beta_slow 32, found 1.0",
    ),
    "infinite": (
        {"rope_type": "linear", "factor": float("inf")},
        "factor: expected a positive number that is finite, found inf",
    ),
    "theta": ({"rope_theta": 10**400}, "rope_theta: expected .* finite, found 10000"),
}


@pytest.mark.parametrize("section, message", WRONG.values(), ids=WRONG)
def test_what_is_refused(section, message):
    values = {"rope_theta": 1e4, "max_position_embeddings": 64, "rope_scaling": section}
    with pytest.raises(CheckpointError, match=message):
        read_rope(Config(values), 16)


def test_two_sections_of_two_types():
    values = {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn"}}
    with pytest.raises(CheckpointError, match="expected 'default' as rope_parameters says"):
        read_rope(Config(values), 16)


def test_query_scale():
    assert read_query_scale(Config({})) is None
    section = {"llama_4_scaling_beta": 0.1}
    with pytest.raises(CheckpointError, match="original_max_position_embeddings: .* found none"):
        read_query_scale(Config({"rope_parameters": section}))
    section["original_max_position_embeddings"] = 16384
    assert read_query_scale(Config({"rope_parameters": section})) == (0.1, 16384)
