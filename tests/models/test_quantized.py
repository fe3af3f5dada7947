"""8-bit weights: quantised while loading, and checkpoints that are stored so."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pydllm import ops
from pydllm._backend.errors import CheckpointError
from pydllm.models import load
from pydllm.models.checkpoint import Shards, read_config
from pydllm.models.config import Config
from pydllm.models.families import find_family
from pydllm.models.partition import Partition
from pydllm.models.quantized import load_quantized, split_scales
from pydllm.models.weights import slots
from pydllm.ops import QuantizedWeight
from tests.models import moe_plain
from tests.models.plain import CONFIGS, LLADA, random_plain, write_checkpoint

LINEAR = ("qkv", "out", "gate_up", "down")
# Sizes whose projections are whole blocks of 128 x 128.
WIDE = LLADA | {"d_model": 256, "n_heads": 2, "n_kv_heads": 1, "mlp_hidden_size": 384}
BLOCK_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def compressed(kind, strategy="channel", **weights):
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy} | weights
    groups = {"group_0": {"weights": weights, "targets": ["Linear"], "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def projections(plain):
    """Names of the weights of attention and MLP, by what models of both layouts call them."""
    words = ("proj", "attn_out", "ff_out", "up_proj")
    return [
        name
        for name, weight in plain.weights.items()
        if weight.ndim == 2
        and "layers." in name.replace("blocks.", "layers.")
        and any(word in name for word in words)
    ]


def same_forward(model, plain):
    """The model's logits in fp64 are those of the independent forward on its weights."""
    ids = torch.randint(0, 61, (13,), generator=torch.Generator().manual_seed(0))
    whole = torch.tensor([13], dtype=torch.int32)
    zero = torch.zeros_like(whole)
    numbers = {"length": whole, "kv_len": whole, "commit": zero}
    hidden = model.forward(ids[None], zero, model.new_cache(1, 13), **numbers)
    _, logits, _ = plain(ids)
    torch.testing.assert_close(model.head(hidden)[0], logits, rtol=0, atol=1e-10)


def dequantised_plain(model, plain):
    """``plain`` with the model's weights, dequantised, in place of its own."""
    config = read_config_of(plain)
    family = find_family(config)
    for slot in slots(family.names, family.sizes(config, family)):
        layer, _, name = slot.name.removeprefix("layers.").partition(".")
        if name in LINEAR:
            weight = getattr(model._layers[int(layer)], name)
            assert isinstance(weight, QuantizedWeight)
            for source, part in slot.views(weight.dequantize(torch.float64)):
                assert plain.weights[source].shape == part.shape
                plain.weights[source].copy_(part)
    return plain


def read_config_of(plain):

    return Config({k: v for k, v in plain.config.items() if k != "quantization_config"})


@pytest.mark.parametrize("name", ["llada-gqa", "llada-bias", "dream", "a2d-qwen2-tied", "sdar"])
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_weights_are_quantised_while_loading(tmp_path, name, kind):
    plain = random_plain(CONFIGS[name], 0, torch.float64)
    folder = write_checkpoint(tmp_path, plain, shards=2)
    model = load(folder, device="cpu", dtype=torch.float64, weights=kind)
    dense = load(folder, device="cpu", dtype=torch.float64)
    for one, other in zip(model._layers, dense._layers, strict=True):
        for part in LINEAR:
            small, weight = getattr(one, part), getattr(other, part)
            expected = ops.quantize(weight.float(), kind)
            assert torch.equal(small.values.float(), expected.values.float())
            assert torch.equal(small.scale, expected.scale)
        assert torch.equal(one.attn_norm, other.attn_norm)
    assert torch.equal(model._head, dense._head) and model.dtype == torch.float64
    assert torch.equal(model._embedding, dense._embedding)
    if name != "sdar":  # its mask is that of blocks
        same_forward(model, dequantised_plain(model, plain))


def quantised_checkpoint(folder, config, section, store):
    """A checkpoint whose projections ``store`` turns into tensors by the end of their names."""
    plain = random_plain(config, 0, torch.float64)
    weights = dict(plain.weights)
    for name in projections(plain):
        weight = weights.pop(name)
        weights |= {f"{name}{end}": t.contiguous() for end, t in store(weight).items()}
    folder.mkdir(exist_ok=True)
    plain.config = plain.config | {"quantization_config": section}
    (folder / "config.json").write_text(json.dumps(plain.config))
    save_file(weights, folder / "model.safetensors")
    return folder, plain


def block_fp8(weight):
    small = ops.quantize(weight, "fp8")
    return {"": small.values, "_scale_inv": small.scale}


def per_channel(kind, column=True, dtype=torch.bfloat16):
    def store(weight):
        small = ops.quantize(weight, kind)
        scale = small.scale[:, None] if column else small.scale
        return {"": small.values, "_scale": scale.to(dtype)}

    return store


def per_tensor(weight):
    scale = weight.abs().max().float() / 448
    return {"": (weight / scale).to(torch.float8_e4m3fn), "_scale": scale.reshape(1)}


FORMS = {
    "block FP8": (WIDE, BLOCK_FP8, block_fp8, torch.float8_e4m3fn),
    "FP8 per channel": (
        LLADA, compressed("float"), per_channel("fp8_channel"), torch.float8_e4m3fn
    ),
    "FP8 per tensor": (LLADA, compressed("float", "tensor"), per_tensor, torch.float8_e4m3fn),
    "INT8": (LLADA, compressed("int"), per_channel("int8"), torch.int8),
    "INT8 of qwen": (
        CONFIGS["dream"], compressed("int"), per_channel("int8", False, torch.float32), torch.int8
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_quantised_checkpoints_are_read_as_they_are_stored(tmp_path, form):
    config, section, store, dtype = FORMS[form]
    folder, plain = quantised_checkpoint(tmp_path, config, section, store)
    model = load(folder, device="cpu", dtype=torch.float64)
    assert model._layers[0].qkv.values.dtype == dtype
    original = {name: plain.weights[name].clone() for name in projections(plain)}
    same_forward(model, dequantised_plain(model, plain))
    for name, weight in original.items():  # it is that checkpoint, not anything that fits itself
        step = (plain.weights[name] - weight).abs().max() / weight.abs().max()
        assert 0 < step < 2.0**-4
    bf16 = load(folder, device="cpu", dtype=torch.bfloat16).deterministic()
    assert bf16._layers[0].out.values.dtype == dtype


def test_parts_of_processes(tmp_path):
    """Rows and columns that two processes take, with their scales, are those of the whole."""
    for form in ("block FP8", "FP8 per channel", "FP8 per tensor"):
        config, section, store, _ = FORMS[form]
        if form != "block FP8":
            config = config | {"mlp_hidden_size": 40}
        config = config | {"n_kv_heads": config["n_heads"]}
        folder, plain = quantised_checkpoint(tmp_path / form, config, section, store)
        family = find_family(read_config_of(plain))
        sizes = family.sizes(read_config_of(plain), family)
        shards, wanted = Shards(folder), list(slots(family.names, sizes))
        _, scales = split_scales(shards.found)
        device = torch.device("cpu")
        if form == "block FP8":
            for slot in wanted:
                if slot.name.endswith("gate_up"):  # 192 columns each: not whole blocks
                    with pytest.raises(CheckpointError, match="expected processes to take multipl"):
                        load_quantized(
                            shards, [slot], scales, None, device, Partition(0, 2, sizes, 61), None
                        )
            wanted = [slot for slot in wanted if slot.name.rpartition(".")[2] in ("qkv", "out")]
        whole = load_quantized(shards, wanted, scales, None, device, None, None)
        for rank in range(2):
            partition = Partition(rank, 2, sizes, 61)
            parts = load_quantized(shards, wanted, scales, None, device, partition, None)
            for slot in wanted:
                if slot.name not in whole:
                    continue
                dense = whole[slot.name].dequantize()
                pieces = [
                    part[index]
                    for (_, part), index in zip(
                        slot.views(dense), partition.index(slot), strict=True
                    )
                ]
                assert torch.equal(parts[slot.name].dequantize(), torch.cat(pieces))


def refused(section, message, store=block_fp8, config=WIDE, error=CheckpointError):
    return section, message, store, config, error


def _with(store, **changes):
    def changed(weight):
        tensors = store(weight)
        return tensors | {end: change(tensors.get(end)) for end, change in changes.items()}

    return changed


def _nan(values):
    values = values.clone().view(torch.uint8)
    values[3, 5] = 0x7F
    return values.view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("section", "message", "store", "config"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method: expected 'fp8' or 'comp", None, WIDE),
        (BLOCK_FP8 | {"weight_block_size": [64, 64]}, r"weight_block_size: expected \[128, 128\]",
         None, WIDE),
        (compressed("int", num_bits=4), "num_bits: expected 8", None, WIDE),
        (compressed("int", symmetric=False), "symmetric: expected True", None, WIDE),
        (compressed("int", strategy="group"), "strategy: expected 'channel' or 'tensor'", None,
         WIDE),
        (compressed("int") | {"format": "pack-quantized"}, "format: expected 'float-quan", None,
         WIDE),
        (BLOCK_FP8, "expected fp32, fp16, bf16 or fp64, found F8_E4M3",
         lambda w: {"": block_fp8(w)[""]}, WIDE),
        (BLOCK_FP8, "expected numbers, found NaN",
         lambda w: block_fp8(w) | {"": _nan(block_fp8(w)[""])}, WIDE),
        (BLOCK_FP8, "expected finite positive numbers, found others",
         lambda w: block_fp8(w) | {"_scale_inv": torch.zeros_like(block_fp8(w)["_scale_inv"])},
         WIDE),
        (BLOCK_FP8, "expected one scale, .* found \\(7,\\)",
         lambda w: block_fp8(w) | {"_scale_inv": torch.ones(7)}, WIDE),
        (BLOCK_FP8, "expected a multiple of 128 rows before other rows",
         lambda w: block_fp8(w), WIDE | {"n_heads": 4, "n_kv_heads": 1}),
    ],
)  # fmt: skip
def test_refusals_name_what_is_wrong(tmp_path, section, message, store, config):
    folder, _ = quantised_checkpoint(tmp_path, config, section, store or block_fp8)
    with pytest.raises(CheckpointError, match=message):
        load(folder, device="cpu")


def test_refusals_of_load(tmp_path):
    folder = write_checkpoint(tmp_path, random_plain(CONFIGS["llada"], 0, torch.float32))
    with pytest.raises(ValueError, match="weights: expected None, 'fp8' or 'int8', got 'int4'"):
        load(folder, weights="int4")
    with pytest.raises(ValueError, match="weights: expected None for a loaded module, got 'fp8'"):
        load(torch.nn.Linear(2, 2), weights="fp8")
    weights = {"a.weight": torch.ones(2, 2).to(torch.int8), "a.weight_scale": torch.ones(2)}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="found no such tensor"):
        load(folder)
    bad = random_plain(CONFIGS["llada"], 0, torch.float32)
    next(bad.weights[name] for name in projections(bad))[0, 0] = float("inf")
    write_checkpoint(folder, bad)
    with pytest.raises(CheckpointError, match="expected finite numbers, got infinity or NaN"):
        load(folder, weights="int8")


FUSED = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}
ALONE = ("query_key_value", "dense", "o_proj", "down_proj")


def rounded_moe(weights, kind):
    """Weights of a mixture as they are loaded, in fp64, and what of them is quantised by name."""
    weights, small = dict(weights), {}
    for name in sorted(weights):
        prefix, _, word = name.removesuffix(".weight").rpartition(".")
        if "shared_experts" in name or word not in (*FUSED, *ALONE):
            continue
        names = [f"{prefix}.{part}.weight" for part in FUSED.get(word, (word,))]
        parts = [weights[part] for part in names]
        quantized = ops.quantize(torch.cat(parts), kind)
        pieces = quantized.dequantize(torch.float64).split([len(part) for part in parts])
        weights |= dict(zip(names, pieces, strict=True))
        small[name] = quantized
    return weights, small


def same_moe_forward(model, config, weights):
    ids = torch.randint(0, 57, (11,), generator=torch.Generator().manual_seed(0))
    whole = torch.tensor([11], dtype=torch.int32)
    zero = torch.zeros_like(whole)
    numbers = {"length": whole, "kv_len": whole, "commit": zero}
    hidden = model.forward(ids[None], zero, model.new_cache(1, 11), **numbers)
    _, expected = moe_plain.forward(config, {n: t.double() for n, t in weights.items()}, ids)
    torch.testing.assert_close(model.head(hidden)[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("name", ["llada2", "rnd1", "llada-moe-mixed"])
def test_experts_are_quantised_while_loading(tmp_path, name, kind):
    """Each expert for itself; router and shared expert keep their dtype."""
    config = moe_plain.CONFIGS[name]
    weights = moe_plain.random_weights(config)
    moe_plain.write_moe(tmp_path, config, weights)
    model = load(tmp_path, device="cpu", dtype=torch.float64, weights=kind)
    layer = model._layers[-1].experts
    assert layer.gate_up.values.dtype == (torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    assert layer.gate_up.shape == (16, 48, 48) and layer.router.is_floating_point()
    same_moe_forward(model, config, rounded_moe(weights, kind)[0])


def test_experts_that_are_stored_in_fp8(tmp_path):
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 4}
    sizes |= {"intermediate_size": 128, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    config = moe_plain.CONFIGS["llada2"] | sizes | {"num_hidden_layers": 2}
    weights = moe_plain.random_weights(config)
    exact, stored = {}, dict(weights)
    for name, weight in weights.items():
        if "proj" not in name or "shared" in name:
            continue
        small = ops.quantize(weight, "fp8")
        exact[name] = small.dequantize(torch.float64)
        stored[name], stored[f"{name}_scale_inv"] = small.values, small.scale
    assert sum(".mlp.experts." in name for name in exact) == 12
    config |= {"quantization_config": BLOCK_FP8}
    moe_plain.write_moe(tmp_path, config, stored)
    model = load(tmp_path, device="cpu", dtype=torch.float64)
    assert model._layers[-1].experts.gate_up.scale.shape == (4, 2, 1)
    same_moe_forward(model, config, weights | exact)

    # Expert parallel: two of the four, and their scales, in each of two processes.
    family = find_family(read_config(tmp_path), quantized=True)
    shards = Shards(tmp_path)
    shards.read_layout(family.names, model.sizes, "")
    wanted = [slot for slot in slots(family.names, model.sizes) if slot.of_experts]
    _, scales = split_scales(shards.found)
    for rank in range(2):
        partition, held = Partition(rank, 2, model.sizes, 61, True), slice(2 * rank, 2 * rank + 2)
        own = [partition.own(slot) for slot in wanted]
        parts = load_quantized(shards, own, scales, None, torch.device("cpu"), partition, None, 2)
        for name in ("gate_up", "down"):
            part, whole = parts[f"layers.1.{name}"], getattr(model._layers[1].experts, name)
            assert torch.equal(part.scale, whole.scale[held])
            assert torch.equal(part.dequantize(), whole.dequantize()[held])
