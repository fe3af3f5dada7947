"""Every family of the table: logits, caches and batches against the independent forward."""

import pytest
import torch

from pydllm.models import load
from pydllm.models.config import Config
from pydllm.models.families import find_family
from pydllm.models.overrides import make_spec
from pydllm.models.weights import slots
from tests.models.__main__ import main
from tests.models.plain import RECENT, random_plain, write_checkpoint
from tests.models.test_native import at, close, random_ids

# What each configuration makes of the model: attention, block size, shift, mask, EOS, causal,
# origin, context, seeded.
SPECS = {
    "nemotron": ("block_causal", 4, False, 60, (59, 57), "shifted", "prompt", "causal", True),
    "nemotron-base": ("block_causal", 4, False, 60, (59, 57), "shifted", "prompt", "causal", True),
    "diff-encoder": ("block_causal", 4, False, 60, (59, 57), "shifted", "prompt", "causal", True),
    "fast-dllm-v2": ("block_causal", 8, True, 60, (59, 57), "shifted", "zero", "block", True),
    "stable-diffcoder": ("block_causal", 4, False, 5, (2,), "masked", "zero", "block", False),
    "a2d-bd3lm": ("block_causal", 8, False, 60, (59, 57), "masked", "prompt", "block", False),
    "coda": ("full", None, True, 60, (59, 57), None, "zero", "block", False),
    "llama3": ("causal", None, False, None, (59, 57), "shifted", "zero", "block", False),
    "mistral": ("causal", None, False, None, (59, 57), "shifted", "zero", "block", False),
    "qwen2-sliding": ("causal", None, False, None, (59, 57), "shifted", "zero", "block", False),
    "qwen2-yarn": ("causal", None, False, None, (59, 57), "shifted", "zero", "block", False),
}


@pytest.fixture(params=RECENT)
def name(request):
    return request.param


@pytest.fixture
def pair(tmp_path, name):
    plain = random_plain(RECENT[name], seed=2)
    return load(write_checkpoint(tmp_path, plain), device="cpu", dtype=torch.float64), plain


def kinds(model):
    """The masks that a model is run under, as arguments of both forwards."""
    yield "full", {}
    yield "causal", {"causal": True}
    spec = model.spec
    if spec.attention == "block_causal" and spec.block_origin == "zero":
        yield "block_causal", {"block": spec.block_size}


def run(model, ids, start, cache, length, kv_len, commit, attention, pad=None):
    numbers = {"length": at(*length), "kv_len": at(*kv_len), "commit": at(*commit)}
    if pad is not None:
        numbers["pad"] = at(*pad)
    return model.forward(ids, at(*start), cache, attention=attention, **numbers)


def test_spec(pair, name):
    spec = pair[0].spec
    assert SPECS[name] == (
        spec.attention,
        spec.block_size,
        spec.shift_logits,
        spec.mask_id,
        spec.eos_ids,
        spec.causal,
        spec.block_origin,
        spec.context,
        spec.seeded,
    )


def test_full_forward(pair):
    """Logits to 1e-10 under every mask; 20 positions are more than the original lengths."""
    model, plain = pair
    ids = random_ids(2, 20)
    for attention, options in kinds(model):
        cache = model.new_cache(2, 20)
        got = run(model, ids, (0, 0), cache, (20, 20), (20, 20), (20, 20), attention)
        for row in range(2):
            hidden, logits, _ = plain(ids[row], **options)
            close(got[row], hidden)
            close(model.head(got)[row], logits)
        assert len(logits.argmax(-1).unique()) > 4


def test_cached_windows_are_the_uncached_forward(pair):
    """Causal, one window after the other: 3, 1, 9 and 7 rows."""
    model, plain = pair
    ids, cache, start, rows = random_ids(1, 20, seed=3), model.new_cache(1, 20), 0, []
    for width in (3, 1, 9, 7):
        window = ids[:, start : start + width]
        stop = start + width
        rows.append(run(model, window, (start,), cache, (width,), (stop,), (width,), "causal"))
        start = stop
    close(torch.cat(rows, 1)[0], plain(ids[0], causal=True)[0])


def test_batch_is_single(pair):
    """Ragged rows with left padding, each as if alone."""
    model, plain = pair
    ids, pad = random_ids(3, 19, seed=4), (0, 7, 12)
    for attention, options in kinds(model):
        cache = model.new_cache(3, 19)
        length = (19, 19, 19)
        got = run(model, ids, (0, 0, 0), cache, length, length, length, attention, pad)
        for row, first in enumerate(pad):
            close(got[row, first:], plain(ids[row, first:], **options)[0])


def test_bidirectional_windows_over_a_causal_cache(pair):
    """What a draft sees: rows of the window each other, and a cache of a causal forward."""
    model, plain = pair
    ids, cache = random_ids(1, 18, seed=5), model.new_cache(1, 18)
    run(model, ids[:, :12], (0,), cache, (12,), (12,), (12,), "causal")
    got = run(model, ids[:, 12:], (12,), cache, (6,), (18,), (0,), "full")
    kept = plain(ids[0, :12], causal=True)[2]
    if not model.sizes.sliding_windows:  # the independent forward has none over frozen keys
        close(got[0], plain(ids[0, 12:], 12, kept)[0])


@pytest.mark.parametrize("branches", [2, 3])
def test_query_scale_of_branches(tmp_path, branches):
    plain = random_plain(RECENT["nemotron"], seed=2)
    model = load(write_checkpoint(tmp_path, plain), device="cpu", dtype=torch.float64)
    cache = model.new_cache(1, 16)
    ids = random_ids(1, 4 * branches)
    got = model.forward(
        ids,
        at(9),
        cache,
        length=at(4),
        kv_len=at(9),
        commit=at(0),
        branches=branches,
        attention="full",
        pad=at(9),
    )
    for branch in range(branches):
        part = slice(4 * branch, 4 * branch + 4)
        close(got[0, part], plain(ids[0, part])[0])


def test_a_causal_context_leaves_no_default(tmp_path):
    """Decoding that does not say which mask a forward has must not get one."""
    plain = random_plain(RECENT["nemotron"])
    model = load(write_checkpoint(tmp_path, plain), device="cpu")
    cache, ids = model.new_cache(1, 8), random_ids(1, 4)
    with pytest.raises(ValueError, match="attention: expected one of full, .* 'causal', got None"):
        run(model, ids, (0,), cache, (4,), (4,), (0,), None)
    model = load(tmp_path, device="cpu", block_origin="zero")
    with pytest.raises(ValueError, match="attention: expected 'full', 'causal' or .* got 'both'"):
        run(model, ids, (0,), cache, (4,), (4,), (0,), "both")


@pytest.mark.parametrize("name", ["a2d-bd3lm"])
def test_blocks_from_the_prompt_are_not_counted_from_zero(pair):
    model, _ = pair
    cache, ids = model.new_cache(1, 8), random_ids(1, 4)
    for attention in (None, "block_causal"):
        with pytest.raises(ValueError, match="block_offset: expected a tensor .* got None"):
            run(model, ids, (0,), cache, (4,), (4,), (0,), attention)


ORACLES = {
    "llama3": ("Llama", RECENT["llama3"]),
    "mistral": ("Mistral", RECENT["mistral"]),
    "qwen2-sliding": ("Qwen2", RECENT["qwen2-sliding"]),
    "qwen2-yarn": ("Qwen2", RECENT["qwen2-yarn"]),
    "nemotron": ("Ministral3", RECENT["nemotron"]),
    "nemotron-base": ("Ministral3", RECENT["nemotron-base"]),
}


@pytest.mark.parametrize("name", ORACLES)
def test_transformers_models(pair, name):
    """The same tensors in transformers' own class, causal, 20 positions."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers' models")
    model, plain = pair
    kind, values = ORACLES[name]
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    values = {k: v for k, v in values.items() if k not in ("architectures", "mask_token_id")}
    config = getattr(transformers, f"{kind}Config")(**values, attn_implementation="eager")
    module = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    renames = (("encoder.", "model."), ("diffusion_head.", "lm_head."))
    state = {}
    for key, tensor in plain.weights.items():
        for old, new in renames:
            key = key.replace(old, new) if key.startswith(old) else key
        state[key] = tensor
    module.load_state_dict(state)
    ids = random_ids(2, 20)
    with torch.no_grad():
        expected = module(ids).logits
    got = run(model, ids, (0, 0), model.new_cache(2, 20), (20, 20), (20, 20), (20, 20), "causal")
    # fp32 norms and tables there.
    close(model.head(got), expected, 64 * 2**-24 * expected.abs().max().item())


def test_the_command_that_counts(capsys):
    pytest.importorskip("transformers", reason="compares with transformers' models")
    assert main(["llama3", "a2d-bd3lm", "--models", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("llama3: full 2 of 2, cached 3 of 3, batch 6 of 6, LlamaForCausalLM")
    assert lines[1].startswith("a2d-bd3lm: full 3 of 3, cached 5 of 5, batch 9 of 9, Qwen3ForCaus")
    assert lines[2].startswith("in all: full 5 of 5, cached 8 of 8, batch 15 of 15, public class ")


# Nemotron-Labs-Diffusion's config.json: hidden size, layers, MLP, base, factor, positions, EOS.
NEMOTRON = {
    "3B-Base": (3072, 26, 9216, 1e6, 0.25, 4096, 2),
    "8B": (4096, 34, 14336, 1e6, 16.0, 262144, 11),
    "14B": (5120, 40, 16384, 1e9, 16.0, 262144, 11),
}


@pytest.mark.parametrize("name", NEMOTRON)
def test_sizes_of_published_configurations(name):
    """Read from the keys alone: q is 4096 wide, whatever the hidden size."""
    hidden, layers, mlp, theta, factor, positions, eos = NEMOTRON[name]
    rope = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
    config = Config(
        {
            "architectures": ["NemotronLabsDiffusionModel"],
            "model_type": "nemotron_labs_diffusion",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "intermediate_size": mlp,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 131072,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "sliding_window": None,
            "max_position_embeddings": positions,
            "block_size": 32,
            "mask_token_id": 100,
            "bos_token_id": 1,
            "eos_token_id": eos,
            "dlm_paradigm": "bidirectional",
            "rope_parameters": rope,
            "rope_scaling": rope,
        }
    )
    family = find_family(config)
    sizes = family.sizes(config, family)
    assert (sizes.hidden, sizes.layers, sizes.intermediate) == (hidden, layers, mlp)
    assert sizes.query_scale == (0.1, 16384) and sizes.sliding_windows == ()
    assert sizes.rope.theta == theta and sizes.rope.attention_factor == 1.0
    spec = make_spec(config, family, sizes)
    assert (spec.block_size, spec.mask_id, spec.eos_ids) == (32, 100, (eos,))
    shapes = {name: shape for slot in slots(family.names, sizes) for name, shape in slot.sources}
    assert len(shapes) == 9 * layers + 3
    assert shapes["encoder.layers.0.self_attn.q_proj.weight"] == (4096, hidden)
    assert shapes["encoder.layers.0.self_attn.o_proj.weight"] == (hidden, 4096)
    assert shapes["diffusion_head.weight"] == (131072, hidden)
