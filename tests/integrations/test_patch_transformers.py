"""patch on transformers' own models, and on published modeling files where there are some."""

import dataclasses
import importlib
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import pydllm
from pydllm import PydllmError
from pydllm.integrations.patch import interface
from tests.integrations.test_patch import assert_state, close, state

transformers = pytest.importorskip("transformers", reason="patches transformers' models")

# Published modeling files to run on.
MODELING_DIR = Path(d) if (d := os.environ.get("PYDLLM_MODELING_DIR")) else None
IDS = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(6))
PADDED = torch.ones(2, 11, dtype=torch.long)
PADDED[1, :4] = 0
EMPTY = torch.zeros(2, 1, 11, 11)  # nothing hidden: what makes a causal model see both ways


def config(name, **changes):
    options = {
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return getattr(transformers, f"{name}Config")(**(options | changes))


def causal_lm(name, of=None, **changes):
    torch.manual_seed(3)
    module = getattr(transformers, f"{name}ForCausalLM")(of or config(name, **changes)).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.25, mean=float(parameter.ndim == 1))
    return module


def step(module):
    """One token after a prompt in the cache."""
    cache = module(IDS[:, :-1], use_cache=True).past_key_values
    return module(IDS[:, -1:], past_key_values=cache).logits


CALLS = {
    "causal": lambda m: m(IDS).logits,
    "padded": lambda m: m(IDS, attention_mask=PADDED).logits * PADDED[..., None],
    "both ways": lambda m: m(IDS, attention_mask=EMPTY).logits,
    "cached": step,
}


def run(module):
    with torch.no_grad():
        return {name: call(module) for name, call in CALLS.items()}


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("name", ["Qwen2", "Qwen3"])
def test_use_and_restore(name, backend):
    module = causal_lm(name)
    expected, before, own = run(module), state(module), module.config
    with pydllm.patch(module, backend=backend, self_check=True) as patched:
        close(run(module), expected)
        assert module.config is own and own._attn_implementation == "sdpa"
        inner = module.model.layers[0].self_attn.config
        assert inner._attn_implementation == interface.NAME and isinstance(inner, type(own))
        inner.use_cache = own.use_cache  # the same attributes, from either side
        assert inner.__dict__ is own.__dict__
        report = patched.report
    found = {f"{name}Attention", f"{name}MLP", f"{name}RMSNorm"}
    if backend == "torch":
        assert {f.kind for f in report.replaced} == found and report.left == ()
        assert report.calls["window_attention"] == 10
        assert not [what for what in report.calls if what.startswith("as before")]
    else:
        assert {f.kind for f in report.replaced} == {f"{name}Attention"}
        assert report.calls == {"SDPA, grouped": 10}
    assert_state(module, before)
    after = run(module)
    assert all(torch.equal(after[call], expected[call]) for call in expected)


def test_a_shared_configuration():
    """Two models made of one configuration object, one of them patched."""
    shared = config("Qwen3")
    one, other = causal_lm("Qwen3", shared), causal_lm("Qwen3", shared)
    expected, before = run(other), state(other)
    with pydllm.patch(one, backend="torch") as patched:
        run(one)
        calls = patched.report.calls
        again = run(other)
        assert_state(other, before)
        assert patched.report.calls == calls
    assert all(torch.equal(again[call], expected[call]) for call in expected)


def test_another_implementation_is_left():
    module = causal_lm("Qwen3", attn_implementation="eager")
    with pydllm.patch(module) as patched:
        reasons = {found.reason for found in patched.report.left if found.part == "attention"}
    assert reasons == {"attn_implementation is 'eager', not 'sdpa'"}


def test_the_registered_function_alone_is_sdpa():
    """The name is registered with transformers for good: without a patch it changes nothing."""
    interface.register()
    module = causal_lm("Qwen3")
    expected = run(module)
    module.set_attn_implementation(interface.NAME)
    got = run(module)
    assert all(torch.equal(got[call], expected[call]) for call in expected)
    module.set_attn_implementation("sdpa")


@pytest.mark.parametrize("name", ["AttentionInterface", "AttentionMaskInterface", "sdpa"])
def test_a_changed_signature_is_refused(monkeypatch, name):
    """transformers' own: the model is as it was, and the error tells the version."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    module = causal_lm("Qwen3")
    before = state(module)
    if name == "sdpa":
        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", lambda module, q: None)
    else:
        owner = {"AttentionInterface": AttentionInterface}.get(name, AttentionMaskInterface)
        monkeypatch.setattr(owner, "register", classmethod(lambda cls, renamed: None))
    version = re.escape(transformers.__version__)
    message = rf"^transformers {version}: .*expected \(.*\), found \((module, q|renamed)\)"
    with pytest.raises(PydllmError, match=message):
        pydllm.patch(module, backend="torch")
    assert_state(module, before)


def test_generate_and_save_while_patched(tmp_path):
    module = causal_lm("Qwen3")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = module.generate(IDS, **options)
    with pydllm.patch(module, backend="torch"):
        assert torch.equal(module.generate(IDS, **options), expected)
        module.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


def test_load_and_patch():
    """A module whose parameters pydllm shares may be patched as well."""
    module = causal_lm("Qwen3")
    expected = run(module)
    model = pydllm.load(module)
    model.spec = dataclasses.replace(model.spec, attention="full")
    with pydllm.patch(module, backend="torch"):
        close(run(module), expected)


def diffusion_gemma(heads):
    gemma = pytest.importorskip(
        "transformers.models.diffusion_gemma", reason="transformers has it from 5.12 on"
    )
    text = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "sliding_window": 8,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "max_position_embeddings": 256,
    }
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    made = transformers.DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=16,
        image_token_id=250,
        boi_token_id=251,
        eoi_token_id=252,
    )
    torch.manual_seed(0)
    module = gemma.DiffusionGemmaForBlockDiffusion(made).eval()
    for parameter in module.parameters():
        one = parameter.ndim == 1
        nn.init.normal_(parameter, std=0.1 if one else 0.25, mean=float(one))
    return module


@pytest.mark.parametrize("backend", ["torch", None])
def test_diffusion_gemma(backend):
    """Prompts longer than the sliding window: its decoder's hint must be ignored."""
    module = diffusion_gemma(heads=4)
    canvas = torch.randint(3, 240, (2, 16), generator=torch.Generator().manual_seed(8))

    def run(mask):
        with torch.no_grad():
            out = module(input_ids=IDS, attention_mask=mask, decoder_input_ids=canvas)
        return out.logits

    def generated():
        torch.manual_seed(5)
        mask = torch.ones_like(IDS)
        return module.generate(
            IDS, attention_mask=mask, max_new_tokens=16, max_denoising_steps=3
        ).sequences

    masks = {"none": None, "ones": torch.ones_like(IDS), "padded": PADDED}
    expected = {name: run(mask) for name, mask in masks.items()}
    tokens, before = generated(), state(module)
    with pydllm.patch(module, backend=backend, self_check=True) as patched:
        close({name: run(mask) for name, mask in masks.items()}, expected)
        if backend is None:  # bit for bit the same, and so are the tokens
            assert torch.equal(generated(), tokens)
        else:
            generated()
        report = patched.report
    kinds = {found.kind for found in report.replaced if found.part == "attention"}
    assert {"DiffusionGemmaEncoderTextAttention", "DiffusionGemmaDecoderTextAttention"} <= kinds
    if backend == "torch":
        calls = report.calls
        assert calls["window_attention"] > calls.get(
            "as before: a mask that the op has no argument for", 0
        )
        reasons = {found.reason for found in report.left if found.part != "attention"}
        assert "its activation is not SiLU" in reasons and "no weight" in reasons
    assert_state(module, before)
    assert all(torch.equal(run(mask), expected[name]) for name, mask in masks.items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    """`auto` takes the kernels; a captured forward replays on new tokens."""
    module = causal_lm("Qwen3", head_dim=64).to("cuda", dtype)
    ids = IDS.cuda()
    mask = torch.zeros(1, 1, 11, 11, dtype=dtype, device="cuda")
    with torch.no_grad():
        expected = module(ids, attention_mask=mask).logits
        with pydllm.patch(module, self_check=True) as patched:
            got = module(ids, attention_mask=mask).logits  # also reads the mask
            error = (got - expected).abs().max() / expected.abs().max()
            assert error <= 64 * torch.finfo(dtype).eps
            assert {"window_attention", "rms_norm", "swiglu"} <= set(patched.report.calls)
            assert not [what for what in patched.report.calls if what.startswith("as before")]
        with pydllm.patch(module):
            static = ids.clone()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                hidden = module.model.embed_tokens(static)
                layer = module.model.layers[0].mlp
                layer(hidden)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                replayed = layer(module.model.embed_tokens(static))
            static.copy_(ids.flip(1))
            graph.replay()
            assert torch.equal(replayed, layer(module.model.embed_tokens(ids.flip(1))))


# Tiny configurations of published classes, for whoever has their modeling files.
LLADA = {
    "d_model": 64,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 96,
    "vocab_size": 128,
    "embedding_size": 128,
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 5e5,
    "activation_type": "silu",
    "max_sequence_length": 64,
    "include_bias": False,
    "weight_tying": False,
    "flash_attention": False,
    "alibi": False,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "init_device": "cpu",
}
DREAM = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "mask_token_id": 7,
    "pad_token_id": 0,
}
PUBLISHED = {
    "llada": ("LLaDAConfig", "LLaDAModelLM", LLADA, "LLaDALlamaBlock"),
    "dream": ("DreamConfig", "DreamModel", DREAM, "DreamSdpaAttention"),
}


@pytest.mark.skipif(MODELING_DIR is None, reason="PYDLLM_MODELING_DIR names no directory")
@pytest.mark.parametrize("family", PUBLISHED)
def test_published_modeling_files(family):
    """PYDLLM_MODELING_DIR: directories anywhere below with modeling_ and configuration_ files."""
    config_name, class_name, options, kind = PUBLISHED[family]
    files = sorted(MODELING_DIR.rglob(f"modeling_{family}.py"))
    assert files, f"no modeling_{family}.py below {MODELING_DIR}"
    for number, file in enumerate(files):
        package = f"published_{family}_{number}"
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(file.parent)]
        configs = importlib.import_module(f"{package}.configuration_{family}")
        classes = importlib.import_module(f"{package}.modeling_{family}")
        made = getattr(configs, config_name)(**options)
        if not hasattr(made, "use_cache"):  # transformers 5
            made.use_cache = False
        torch.manual_seed(1)
        module = getattr(classes, class_name)(made).eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.25, mean=float(parameter.ndim == 1))
        with torch.no_grad():
            expected, before = {"dense": module(IDS).logits}, state(module)
            for backend in ("torch", None):
                with pydllm.patch(module, backend=backend, self_check=True) as patched:
                    close({"dense": module(IDS).logits}, expected)
                replaced = {found.kind for found in patched.report.replaced}
                assert any(name.endswith(kind) for name in replaced), file
            assert torch.equal(module(IDS).logits, expected["dense"])
            assert_state(module, before)
