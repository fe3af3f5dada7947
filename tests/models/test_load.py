"""Checkpoints read back, modules shared, other people's models as oracles."""

import dataclasses
import fnmatch
import json
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pydllm._backend.errors import CheckpointError
from pydllm.models import ModelSpec, load
from tests.models.plain import CONFIGS, random_plain, write_checkpoint
from tests.models.test_native import EXACT, close, random_ids, refresh
from training.llada import CONFIG, TinyLLaDA, save_checkpoint


def hidden_of(model, ids):
    return refresh(model, ids, model.new_cache(ids.shape[0], 0))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["llada-bias", "dream", "a2d-qwen2-tied"])
def test_round_trip(tmp_path, name, shards):
    plain = random_plain(CONFIGS[name], seed=4)
    model = load(str(write_checkpoint(tmp_path, plain, shards)), device="cpu", dtype=torch.float64)
    ids = random_ids(1, 8)
    hidden, logits, _ = plain(ids[0])
    got = hidden_of(model, ids)
    close(got[0], hidden)
    close(model.head(got)[0], logits)


SPECS = {
    "llada": ModelSpec(61, 60, (59,), False, "full", None, 64),
    "llada-padded": ModelSpec(61, 60, (59,), False, "full", None, 64),
    "dream": ModelSpec(61, 60, (59, 57), True, "full", None, 64),
    "a2d-qwen3": ModelSpec(61, 60, (59, 57), False, "full", None, 64),
    "sdar": ModelSpec(61, 60, (59, 57), False, "block_causal", 4, 64, "masked"),
}


@pytest.mark.parametrize("name", SPECS)
def test_spec(tmp_path, name):
    model = load(write_checkpoint(tmp_path, random_plain(CONFIGS[name])), device="cpu")
    assert model.spec == SPECS[name]
    assert model.tokenizer is None
    assert model.head(torch.zeros(3, 48, dtype=model.dtype)).shape == (3, 61)


def test_spec_checks_itself():
    with pytest.raises(ValueError, match="attention: expected one of full, .* got 'sparse'"):
        dataclasses.replace(SPECS["llada"], attention="sparse")
    with pytest.raises(ValueError, match="block_size: expected a number with .* got None with"):
        dataclasses.replace(SPECS["llada"], attention="block_causal")


@pytest.mark.parametrize(
    "stored, said, asked, expected",
    [
        ("float64", None, None, "float64"),
        ("float32", None, None, "float32"),
        ("bfloat16", None, None, "float32"),  # on a CPU
        ("float32", {"torch_dtype": "float16"}, None, "float32"),
        ("float16", {"dtype": "float64"}, None, "float64"),
        ("float32", {"torch_dtype": "bfloat16"}, "bfloat16", "bfloat16"),
        ("float16", None, "float16", "float16"),
        ("float32", None, "float64", "float64"),
    ],
)
def test_dtype(tmp_path, stored, said, asked, expected):
    plain = random_plain(CONFIGS["llada"], dtype=getattr(torch, stored))
    plain.config = plain.config | (said or {})
    dtype = asked and getattr(torch, asked)
    model = load(write_checkpoint(tmp_path, plain), device="cpu", dtype=dtype)
    assert model.dtype == getattr(torch, expected)
    assert model.new_cache(1, 2).keys.dtype == model.dtype
    row = model.head(torch.eye(48, dtype=model.dtype)).T
    assert torch.equal(row, plain.weights["model.transformer.ff_out.weight"].to(model.dtype))


def tiny_llada(**changes):
    """The demo's training model in fp64, its tables too, with weights that disagree."""
    torch.manual_seed(0)
    module = TinyLLaDA(CONFIG | changes).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.25, mean=float(parameter.ndim == 1))
    size = module.cos.shape[1]
    angles = torch.arange(module.cos.shape[0], dtype=torch.float64)[:, None] * (
        CONFIG["rope_theta"] ** (-torch.arange(size, dtype=torch.float64) / size)
    )
    module.cos, module.sin = angles.cos(), angles.sin()
    return module


def test_the_training_model_is_a_llada(tmp_path):
    module = tiny_llada(n_layers=2)
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"n_layers": 2}))
    model = load(tmp_path, device="cpu")
    ids = torch.randint(3, CONFIG["vocab_size"], (2, 19))
    with torch.no_grad():
        close(model.head(hidden_of(model, ids)), module(ids))


def test_the_trained_format(tmp_path):
    """What the demo's script writes: fp16 weights and a tokenizer."""
    torch.manual_seed(1)
    module = TinyLLaDA(CONFIG)
    save_checkpoint(module, CONFIG, tmp_path)
    model = load(tmp_path, device="cpu")
    assert model.dtype == torch.float32
    assert model.spec.mask_id == CONFIG["mask_token_id"]
    word = model.tokenizer.id_to_token(10)
    ids = torch.tensor([model.tokenizer.encode(f"{word} {word}").ids])
    assert ids.tolist() == [[10, 10]]
    with torch.no_grad():
        # fp16 weights: 2^-11 of each of up to a few hundred products of size one.
        close(model.head(hidden_of(model, ids)), module(ids), 2e-2)


def test_the_mask_may_stand_in_the_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models

    config = {k: v for k, v in CONFIGS["dream"].items() if k != "mask_token_id"}
    folder = write_checkpoint(tmp_path, random_plain(config))
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<|mask|>": 7}, unk_token="a"))
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load(folder, device="cpu").spec.mask_id == 7


def oracle(name, **changes):
    transformers = pytest.importorskip("transformers", reason="compares with transformers' models")
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
        **changes,
    )
    module = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.25, mean=float(parameter.ndim == 1))
    return module


ORACLES = {
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-biases": ("Qwen3", {"attention_bias": True, "head_dim": 8}),
    "llama": ("Llama", {"mlp_bias": True, "attention_bias": True}),
}


@pytest.mark.parametrize("name, changes", ORACLES.values(), ids=ORACLES)
@pytest.mark.parametrize("shared", [False, True], ids=["saved", "shared"])
def test_transformers_models(tmp_path, name, changes, shared):
    module = oracle(name, **changes)
    ids = random_ids(2, 11)
    with torch.no_grad():
        expected = module(ids, attention_mask=torch.zeros(2, 1, 11, 11)).logits
    if not shared:
        module.save_pretrained(tmp_path)
    model = load(module if shared else tmp_path, device="cpu")
    assert (model.spec.attention, model.spec.mask_id) == ("causal", None)
    model.spec = dataclasses.replace(model.spec, attention="full")
    got = model.head(hidden_of(model, ids))
    # Two fp32 forwards: a few roundings a layer of the largest logit.
    close(got, expected, 64 * torch.finfo(torch.float32).eps * expected.abs().max().item())
    with torch.no_grad():
        assert torch.equal(module(ids, attention_mask=torch.zeros(2, 1, 11, 11)).logits, expected)


class LLaDAModelLM(TinyLLaDA):
    """A loaded model as a user has it: the real class's name, and a config object."""

    def __init__(self, config):
        super().__init__(config)
        self.config = types.SimpleNamespace(**config)


class Wrapped(LLaDAModelLM):
    """A user's subclass."""


def storage_bytes(tensors):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("kind", [LLaDAModelLM, Wrapped])
def test_a_module_is_shared(kind):
    module = kind(CONFIG | {"n_layers": 2})
    ids = torch.randint(3, CONFIG["vocab_size"], (2, 9))
    before = [*module.parameters()]
    size = storage_bytes(before)
    with torch.no_grad():
        expected = module(ids)
    model = load(module)

    after = [*module.parameters()]
    assert all(a is b for a, b in zip(before, after, strict=True))
    block, layer = module.model.transformer.blocks[1], model._layers[1]
    parts = [block.q_proj.weight, block.k_proj.weight, block.v_proj.weight]
    places = [part.data_ptr() for part in parts]
    rows = layer.qkv.split([len(part) for part in parts])
    assert places == [row.data_ptr() for row in rows]
    assert block.up_proj.weight.data_ptr() == layer.gate_up[len(block.ff_proj.weight) :].data_ptr()
    assert block.ff_out.weight.data_ptr() == layer.down.data_ptr()
    assert module.model.transformer.wte.weight.data_ptr() == model._embedding.data_ptr()
    assert storage_bytes(after) == size

    with torch.no_grad():
        assert torch.equal(module(ids), expected)
        close(model.head(hidden_of(model, ids)), expected, 1e-4)
        block.k_proj.weight.mul_(1.5)  # a change in place is seen by both
        changed = module(ids)
        close(model.head(hidden_of(model, ids)), changed, 1e-4)
    assert not torch.equal(changed, expected)
    assert block.q_proj.weight.requires_grad and not layer.qkv.requires_grad

    again = load(module)  # shared once more: nothing moves
    assert again._layers[1].qkv.data_ptr() == layer.qkv.data_ptr()
    assert torch.equal(again._layers[1].qkv, layer.qkv)
    assert [part.data_ptr() for part in parts] == places


def test_views_in_another_order_are_not_taken_for_fused():
    module = LLaDAModelLM(CONFIG | {"n_layers": 1})
    block = module.model.transformer.blocks[0]
    parts = [block.k_proj.weight, block.q_proj.weight, block.v_proj.weight]
    wanted = torch.cat([parts[1], parts[0], parts[2]]).detach()
    flat = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, flat.split(len(parts[0])), strict=True):
        part.data = view
    assert torch.equal(load(module)._layers[0].qkv, wanted)


def test_a_shared_module_still_trains_and_saves(tmp_path):
    module = LLaDAModelLM(CONFIG | {"n_layers": 1})
    load(module)
    ids = torch.randint(3, CONFIG["vocab_size"], (1, 5))
    module(ids).logsumexp(-1).sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"n_layers": 1}))
    fresh, shared = load(tmp_path, device="cpu"), load(module)
    assert torch.equal(hidden_of(fresh, ids), hidden_of(shared, ids))


def test_a_shared_module_stays_where_and_what_it_is():
    module = LLaDAModelLM(CONFIG)
    assert load(module, device="cpu", dtype=torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="dtype: expected torch.float32, that of the shared"):
        load(module, dtype=torch.float64)
    with pytest.raises(ValueError, match="device: expected cpu, that of the shared module, got"):
        load(module, device="cuda")
    module.model.transformer.blocks[0].v_proj.half()
    with pytest.raises(CheckpointError, match=r"v_proj.weight: expected torch.float32 on cpu as"):
        load(module)
    assert not module.model.transformer.blocks[0].q_proj.weight.storage_offset()


@pytest.mark.parametrize("key", ["model.layers.0.self_attn.rotary_emb.inv_freq", "rope.inv_freq"])
def test_rotary_buffers_are_ignored(tmp_path, key):
    plain = random_plain(CONFIGS["dream"])
    plain.weights[key] = torch.ones(3)
    load(write_checkpoint(tmp_path, plain), device="cpu")


def test_a_stored_tied_head_must_be_the_embedding(tmp_path):
    plain = random_plain(CONFIGS["a2d-qwen2-tied"])
    plain.weights["lm_head.weight"] = plain.weights["model.embed_tokens.weight"].clone()
    load(write_checkpoint(tmp_path / "same", plain), device="cpu")
    plain.weights["lm_head.weight"][5, 5] += 1
    with pytest.raises(CheckpointError, match="tied to the embedding, found another matrix in lm"):
        load(write_checkpoint(tmp_path / "other", plain), device="cpu")


def test_an_index_decides_which_shard(tmp_path):
    """A tensor that lies in two shards is taken from the one that the index names."""
    plain = random_plain(CONFIGS["llada"])
    folder = write_checkpoint(tmp_path, plain, shards=2)
    names = [*plain.weights][1::2]
    second = {name: plain.weights[name] for name in names}
    second["model.transformer.wte.weight"] = torch.zeros(61, 48, dtype=torch.float64)
    save_file(second, folder / "model-00002-of-00002.safetensors")
    model = load(folder, device="cpu")
    close(hidden_of(model, random_ids(1, 4))[0], plain(random_ids(1, 4)[0])[0], EXACT)


# What such a repository may have, and what of it is read.
HUB = {
    "config.json": True,
    "generation_config.json": True,
    "model.safetensors": True,
    "model.safetensors.index.json": True,
    "model-00001-of-00002.safetensors": True,
    "tokenizer.json": True,
    "tokenizer_config.json": True,
    "special_tokens_map.json": True,
    "added_tokens.json": True,
    "vocab.json": True,
    "merges.txt": True,
    "chat_template.jinja": True,
    "additional_chat_templates/tool_use.jinja": True,
    "adapter_config.json": True,
    "adapter_model.safetensors": True,
    "linear_spec_lora/adapter_config.json": True,
    "linear_spec_lora/adapter_model.safetensors": True,
    "modeling_llada.py": False,  # code is not run
    "pytorch_model.bin": False,  # nor are pickles opened
    "consolidated.safetensors": False,
    "consolidated-00001-of-00002.safetensors": False,
    "original/params.json": False,
    "README.md": False,
}


def test_hub_ids(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, random_plain(CONFIGS["llada"]))
    asked = []

    def snapshot_download(repository, *, revision, allow_patterns, ignore_patterns):
        asked.append((repository, revision))
        if repository == "some/nothing":
            raise OSError("no such repository")
        for name, wanted in HUB.items():  # as huggingface_hub chooses
            allowed = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            ignored = any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns)
            assert (allowed and not ignored) == wanted, name
        return str(folder)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert load("some/model", device="cpu").spec.vocab_size == 61
    load("some/model", device="cpu", revision="v1.1")
    assert asked == [("some/model", None), ("some/model", "v1.1")]
    with pytest.raises(ValueError, match="revision: expected None for a directory, got 'v1.1'"):
        load(folder, revision="v1.1")
    with pytest.raises(CheckpointError, match="not on the hub: no such repository"):
        load("some/nothing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="a hub id needs huggingface_hub .pip install"):
        load("some/model")
