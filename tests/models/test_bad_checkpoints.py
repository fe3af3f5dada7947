"""Wrong and incomplete checkpoints, each with its message, before any weight is allocated."""

import json
import shlex
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pydllm._backend.errors import CheckpointError
from pydllm.models import load
from tests.models.plain import CONFIGS, random_plain, write_checkpoint

INDEX = "model.safetensors.index.json"
WTE = "model.transformer.wte.weight"
K2 = "model.transformer.blocks.2.k_proj.weight"


def config(**changes):
    """Change keys of config.json; None takes one away."""

    def damage(folder):
        values = json.loads((folder / "config.json").read_text()) | changes
        values = {key: value for key, value in values.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(values))

    return damage


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def weights(change):
    """Change the tensors of model.safetensors."""

    def damage(folder):
        tensors = random_plain(json.loads((folder / "config.json").read_text())).weights
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def truncate(size):
    def damage(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return damage


def header(folder):
    """A header that promises more than the file has."""
    entry = {WTE: {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    data = json.dumps(entry).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + b"\0" * 64)


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def pickled_shards(folder):
    """A checkpoint as transformers wrote it before safetensors; ours until then."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for part in range(2):
        names = [*weights][part::2]
        file = f"pytorch_model-0000{part + 1}-of-00002.bin"
        torch.save({name: weights[name] for name in names}, folder / file)


def index(change):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        plain = random_plain(CONFIGS["llada"])
        write_checkpoint(folder, plain, shards=2)
        values = json.loads((folder / INDEX).read_text())
        change(values, folder)
        (folder / INDEX).write_text(json.dumps(values))

    return damage


def drop(*names):
    return weights(lambda tensors: [tensors.pop(name) for name in names])


def put(**tensors):
    return weights(lambda held: held.update({k.replace("__", "."): t for k, t in tensors.items()}))


def drop_layer(tensors):
    for name in [name for name in tensors if ".blocks.2." in name]:
        del tensors[name]


LLADA_CASES = {
    # config.json
    "no config": (remove("config.json"), "^/.*: expected config.json, found none"),
    "no JSON": (text("config.json", "{"), "config.json: expected JSON, found Expecting property"),
    "no object": (text("config.json", "[1]"), "config.json: expected a JSON object, found list"),
    "binary": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"),
        "^config.json: expected UTF-8 text, found .*codec",
    ),
    "no architecture": (
        config(architectures=None),
        "architectures: expected a list with the name of the model's class, found none",
    ),
    "unknown architecture": (
        config(architectures=["GPT2LMHeadModel"]),
        r"architectures: expected one of A2DLlama.*LLaDAModelLM.*, found 'GPT2LMHeadModel'",
    ),
    "experts": (
        config(architectures=["LLaDAMoEModelLM"]),
        "expert_intermediate_size: expected an integer of at least 1, found none",
    ),
    "experts by key": (
        config(num_experts=8),
        "num_experts: expected none .*has no experts.*, found 8",
    ),
    "quantised": (
        config(quantization_config={"bits": 4}),
        r"quantization_config: quant_method: expected 'fp8' or 'compressed-tensors', found none",
    ),
    "missing key": (config(d_model=None), "d_model: expected an integer of at least 1, found none"),
    "key of another type": (config(n_layers="3"), "n_layers: expected an integer .*, found '3'"),
    "bool for a number": (config(n_heads=True), "n_heads: expected an integer .*, found True"),
    "number for a bool": (config(weight_tying=1), "weight_tying: expected true or false, found 1"),
    "no theta": (config(rope_theta=None), "rope_theta: expected a positive number, found none"),
    "negative eps": (config(rms_norm_eps=-1.0), "rms_norm_eps: expected a positive .* found -1.0"),
    "no mask id": (
        config(mask_token_id=None),
        "mask_token_id: expected the id of the mask token .load.*mask_id=.*, found none",
    ),
    "mask id outside": (
        config(mask_token_id=61),
        r"mask_token_id: expected token ids in \[0, 61\) .*, found 61",
    ),
    "eos outside": (
        config(eos_token_id=[3, -1]),
        r"eos_token_id: .* \[0, 61\) .*, found \[3, -1\]",
    ),
    "heads": (config(n_heads=5), "n_heads: expected a divisor of d_model 48 .*, found 5"),
    "kv heads": (config(n_kv_heads=3), "n_kv_heads: expected a divisor of the 4 heads, found 3"),
    "odd heads": (config(n_heads=16, n_kv_heads=16), "even number of rotary dim.* 3, found 3"),
    "embedding": (config(embedding_size=7), "embedding_size: expected at least vocab_size 61, f"),
    "alibi": (config(alibi=True), r"alibi: expected False \(others .* not supported\), found True"),
    "activation": (config(activation_type="gelu"), "activation_type: expected 'silu' .* 'gelu'"),
    "layer norm": (config(layer_norm_type="default"), "layer_norm_type: expected 'rms' .*default"),
    "clipping": (config(clip_qkv=8.0), "clip_qkv: expected none .*, found 8.0"),
    "integer dtype": (
        config(torch_dtype="int8"),
        "torch_dtype: expected float32, float16, bfloat16 or float64, found 'int8'",
    ),
    # tensors
    "missing tensor": (
        drop(K2),
        r"expected model.transformer.blocks.2.k_proj.weight \(48, 48\), found no such tensor",
    ),
    "missing tensors": (
        weights(drop_layer),
        r"blocks.2.attn_norm.weight \(48,\), .* and 5 more",
    ),
    "more layers": (config(n_layers=4), r"blocks.3.attn_norm.weight \(48,\), .* found no such"),
    "fewer layers": (config(n_layers=2), "found model.transformer.blocks.2.attn_norm.*and 5 more"),
    "wrong shape": (
        put(model__transformer__wte__weight=torch.ones(60, 48)),
        r"wte.weight: expected shape \(61, 48\), found \(60, 48\)",
    ),
    "wrong shapes": (
        config(mlp_hidden_size=41),
        r"ff_proj.weight: expected shape \(41, 48\), found \(40, 48\) \(and 8 more of another sh",
    ),
    "extra tensor": (
        put(model__transformer__wpe__weight=torch.ones(2)),
        "found model.transformer.wpe.weight, which this model has not",
    ),
    "integers": (
        put(model__transformer__ln_f__weight=torch.ones(48, dtype=torch.int8)),
        "ln_f.weight: expected fp32, fp16, bf16 or fp64, found I8",
    ),
    "fp8": (
        put(model__transformer__ln_f__weight=torch.ones(48).to(torch.float8_e4m3fn)),
        "ln_f.weight: expected fp32, fp16, bf16 or fp64, found F8_E4M3",
    ),
    # files
    "truncated": (truncate(-100), "model.safetensors: expected a whole safetensors file, found"),
    "cut in the header": (truncate(50), "expected a whole safetensors file, found 50 bytes"),
    "empty": (truncate(0), "expected a whole safetensors file, found 0 bytes"),
    "promises too much": (header, "expected a whole safetensors file"),
    "no weights": (remove("model.safetensors"), "expected model.safetensors or .*found no weights"),
    "pickle": (
        pickled,
        "found pytorch_model.bin: pickles are not read; convert it once: .*weights_only=True",
    ),
    "shard without index": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model-00001.safetensors"),
        "expected model.safetensors or .*index.json, found model-00001.safetensors",
    ),
    "missing shard": (
        index(lambda values, folder: (folder / "model-00002-of-00002.safetensors").unlink()),
        "model-00002-of-00002.safetensors: expected this file, .*index.json names it",
    ),
    "index without a map": (
        index(lambda values, folder: values.pop("weight_map")),
        "index.json: weight_map: expected a file for each tensor",
    ),
    "index points outside": (
        index(lambda values, folder: values["weight_map"].update({WTE: "../model.safetensors"})),
        "expected files in its folder, found '../model.safetensors'",
    ),
    "index names another shard": (
        index(lambda v, _: v["weight_map"].update({WTE: "model-00002-of-00002.safetensors"})),
        "00002.safetensors: expected model.transformer.wte.weight, .* no such tensor in this file",
    ),
    "tokenizer": (text("tokenizer.json", "{}"), "tokenizer.json: expected a file of the tokeniz"),
}
QWEN_CASES = {
    "layer types": (
        config(layer_types=["full_attention", "sliding_attention"]),
        "layer_types: expected 'full_attention' or 'sliding_attention' for each of 3 layers, found",
    ),
    "layer types of another kind": (config(layer_types=3), "layer_types: expected .*, found 3"),
    "rope is no object": (
        config(rope_scaling="yarn"),
        "rope_scaling: expected an object, foun",
    ),
    "act": (config(hidden_act="gelu"), "hidden_act: expected 'silu' or 'swish' .*, found 'gelu'"),
    "rotary": (config(partial_rotary_factor=1.5), "rotary dimensions, at most the head size 8, f"),
    "no bias": (
        drop("model.layers.1.self_attn.q_proj.bias"),
        r"expected model.layers.1.self_attn.q_proj.bias \(48,\), found no such tensor",
    ),
    "an unexpected bias": (
        put(model__layers__0__self_attn__o_proj__bias=torch.ones(48)),
        "found model.layers.0.self_attn.o_proj.bias, which this model has not",
    ),
    "no head": (
        drop("lm_head.weight"),
        r"expected lm_head.weight \(61, 48\), found no such",
    ),
    "no block size": (
        lambda folder: (
            config(architectures=["SDARForCausalLM"])(folder),
            weights(lambda tensors: [tensors.pop(n) for n in [*tensors] if "bias" in n])(folder),
        ),
        "block_size: expected an integer of at least 1 .load.*block_size=.*, found none",
    ),
}
CASES = {("llada", name): case for name, case in LLADA_CASES.items()}
CASES |= {("dream", name): case for name, case in QWEN_CASES.items()}


@pytest.mark.parametrize(
    "family, damage, message",
    [(family, *case) for (family, _), case in CASES.items()],
    ids=[name for _, name in CASES],
)
def test_message(tmp_path, monkeypatch, family, damage, message):
    write_checkpoint(tmp_path, random_plain(CONFIGS[family]))
    load(tmp_path, device="cpu")  # right before it is damaged
    damage(tmp_path)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated before the checks"))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path, device="cpu")
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "source, options, error, message",
    [
        ("no/such/folder", {}, CheckpointError, "expected a directory or a hub id, found neither"),
        ("/nowhere", {}, CheckpointError, "expected a directory or a hub id, found neither"),
        (
            "llada_tiny",
            {},
            CheckpointError,
            "the bundled models are .* llada-tiny, llada2",
        ),
        (__file__, {}, CheckpointError, "expected a directory, found a file"),
        (7, {}, TypeError, "source: expected a path, a hub id or a module, got <class 'int'>"),
        ("x", {"dtype": torch.int8}, TypeError, "dtype: expected torch.float32, .* torch.int8"),
        (nn.Linear(2, 2), {}, CheckpointError, "Linear.config: expected the configuration"),
    ],
    ids=["path", "absolute path", "bundled, misspelt", "file", "type", "dtype", "no config"],
)
def test_sources(source, options, error, message):
    with pytest.raises(error, match=message):
        load(source, **options)


def test_a_module_of_an_unknown_class():
    module = nn.Linear(2, 2)
    module.config = {"architectures": ["LLaDAModelLM"]}  # the class counts, not what it says
    with pytest.raises(CheckpointError, match="Linear.config: architectures: .* found 'Linear'"):
        load(module)


def test_the_way_out_of_pickles(tmp_path):
    """The command in the message converts every shard; afterwards the checkpoint loads."""
    folder = write_checkpoint(tmp_path, random_plain(CONFIGS["llada"]))
    before = load(folder, device="cpu", dtype=torch.float32).head(torch.eye(48))
    pickled_shards(folder)
    with pytest.raises(CheckpointError, match="found pytorch_model-00001-of-00002.bin") as caught:
        load(folder, device="cpu")
    _, _, command = str(caught.value).partition("convert it once: python ")
    subprocess.run([sys.executable, *shlex.split(command)], cwd=folder, check=True)
    assert torch.equal(load(folder, device="cpu", dtype=torch.float32).head(torch.eye(48)), before)
