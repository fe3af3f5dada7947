"""LoRA: folders and PEFT modules against PEFT's own merge, drafts beside the weights, refusals."""

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pydllm._backend.errors import CheckpointError
from pydllm.models import load
from tests.models.plain import QWEN, RECENT, random_plain, write_checkpoint
from tests.models.test_native import at, close, random_ids

A2D = QWEN | {"architectures": ["A2DQwen2LMHeadModel"]}
RANK = 3


def write_adapter(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def factors(plain, names, rank=RANK, prefix="base_model.model.", seed=1):
    """Random factors of some projections in all layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, weight in plain.weights.items():
        if key.endswith(tuple(f"{name}.weight" for name in names)):
            path = prefix + key.removesuffix(".weight")
            rows, columns = weight.shape
            for letter, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                tensors[f"{path}.lora_{letter}.weight"] = torch.randn(
                    shape, generator=generator, dtype=weight.dtype
                )
    return tensors


def with_update(plain, tensors, scale, prefix="base_model.model."):
    """The plain model with the products added, written out."""
    changed = random_plain(plain.config)
    changed.weights = dict(plain.weights)
    for key, a in tensors.items():
        if ".lora_A." in key:
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            name = key.removeprefix(prefix).replace(".lora_A", "")
            changed.weights[name] = plain.weights[name] + scale * (b @ a)
    return changed


def logits(model, ids, **options):
    batch, rows = ids.shape
    whole = at(*[rows] * batch)
    cache = model.new_cache(batch, rows)
    start = torch.zeros_like(whole)
    hidden = model.forward(ids, start, cache, length=whole, kv_len=whole, commit=whole, **options)
    return model.head(hidden)


@pytest.mark.parametrize("names", [("q_proj", "v_proj"), ("o_proj", "gate_proj", "down_proj")])
@pytest.mark.parametrize("form", ["adapter=", "folder"])
def test_a_folder_is_merged(tmp_path, names, form):
    plain = random_plain(A2D)
    base = write_checkpoint(tmp_path / "base", plain)
    tensors = factors(plain, names)
    folder = write_adapter(
        tmp_path / "lora", tensors, base_model_name_or_path=str(base), target_modules=list(names)
    )
    options = {"device": "cpu", "dtype": torch.float64}
    if form == "folder":
        model = load(folder, **options)
    else:
        model = load(base, adapter=folder, **options)
    ids = random_ids(1, 9)
    close(logits(model, ids)[0], with_update(plain, tensors, 2.0)(ids[0])[1])
    assert (logits(load(base, **options), ids) - logits(model, ids)).abs().max() > 0.1


def test_scales_and_ranks_by_pattern(tmp_path):
    plain = random_plain(A2D)
    base = write_checkpoint(tmp_path / "base", plain)
    tensors = factors(plain, ["q_proj"]) | factors(plain, ["v_proj"], rank=5)
    folder = write_adapter(
        tmp_path / "lora",
        tensors,
        use_rslora=True,
        rank_pattern={"v_proj": 5},
        alpha_pattern={"^model.layers.1.self_attn.v_proj": 20},
    )
    changed = with_update(plain, {k: t for k, t in tensors.items() if "q_proj" in k}, 6 / RANK**0.5)
    for layer in range(3):
        part = {k: t for k, t in tensors.items() if f"layers.{layer}.self_attn.v_proj" in k}
        changed = with_update(changed, part, (20 if layer == 1 else 6) / 5**0.5)
    ids = random_ids(1, 9)
    model = load(base, adapter=folder, device="cpu", dtype=torch.float64)
    close(logits(model, ids)[0], changed(ids[0])[1])


def test_weights_that_were_trained_whole(tmp_path):
    plain = random_plain(A2D)
    base = write_checkpoint(tmp_path / "base", plain)
    head = torch.randn(61, 48, dtype=torch.float64)
    tensors = factors(plain, ["q_proj"]) | {"base_model.model.lm_head.weight": head}
    changed = with_update(plain, tensors, 2.0)
    changed.weights["lm_head.weight"] = head
    folder = write_adapter(tmp_path / "lora", tensors, modules_to_save=["lm_head"])
    model = load(base, adapter=folder, device="cpu", dtype=torch.float64)
    ids = random_ids(1, 9)
    close(logits(model, ids)[0], changed(ids[0])[1])


def test_one_rounding(tmp_path):
    """bf16 weights with a bf16 adapter are those of the sum in fp32, rounded once."""
    plain = random_plain(A2D, dtype=torch.bfloat16)
    base = write_checkpoint(tmp_path / "base", plain)
    tensors = factors(plain, ["o_proj"])
    folder = write_adapter(tmp_path / "lora", tensors)
    model = load(base, adapter=folder, device="cpu", dtype=torch.bfloat16)
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.o_proj"
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
        expected = (plain.weights[f"{name}.weight"].float() + (b @ a) * 2).bfloat16()
        assert torch.equal(model._layers[layer].out, expected)


def peft_module(**options):
    peft = pytest.importorskip("peft", reason="compares with PEFT's merge")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    values = {k: v for k, v in QWEN.items() if k not in ("mask_token_id", "use_sliding_window")}
    module = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**values)).eval()
    module = peft.get_peft_model(
        module, peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options)
    )
    return module.eval()


PEFT = {
    "attention": {"target_modules": ["q_proj", "o_proj"]},
    "mlp": {"target_modules": ["gate_proj", "down_proj"], "use_rslora": True},
    "head": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("options", PEFT.values(), ids=PEFT)
@pytest.mark.parametrize("merged", [False, True])
def test_peft_modules(options, merged):
    module = peft_module(**options)
    ids = random_ids(2, 7)
    with torch.no_grad():
        expected = module(input_ids=ids).logits
    before = {key: value.clone() for key, value in module.state_dict().items()}
    if merged:
        module.merge_adapter()
    got = logits(load(module), ids)
    if merged:
        module.unmerge_adapter()
    else:
        assert all(torch.equal(module.state_dict()[key], before[key]) for key in before)
    close(got, expected, 64 * 2**-24 * expected.abs().max().item())
    again = logits(load(module.merge_and_unload()), ids)
    close(got, again, 64 * 2**-24 * expected.abs().max().item())
    with torch.no_grad():
        base = peft_module(**options).unload()(ids).logits
    assert (base - expected).abs().max() > 0.01


def test_what_peft_saves(tmp_path):
    module = peft_module(target_modules=["q_proj", "up_proj"])
    module.save_pretrained(tmp_path / "lora")
    ids = random_ids(2, 7)
    with torch.no_grad():
        expected = module(input_ids=ids).logits
    module.unload().save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", adapter=tmp_path / "lora", device="cpu")
    close(logits(model, ids), expected, 64 * 2**-24 * expected.abs().max().item())


def test_a_disabled_adapter_is_not_merged():
    module = peft_module(target_modules=["q_proj"])
    ids = random_ids(1, 7)
    with module.disable_adapter(), torch.no_grad():
        expected = module(input_ids=ids).logits
        got = logits(load(module), ids)
    close(got, expected, 64 * 2**-24 * expected.abs().max().item())


@pytest.mark.parametrize("place", ["inside", "given"])
def test_a_draft_adapter_is_conditional(tmp_path, place):
    plain = random_plain(RECENT["nemotron"])
    base = write_checkpoint(tmp_path / "base", plain)
    # Names as a third party reads them: the layers' path alone.
    tensors = factors(plain, ["o_proj"], prefix="")
    tensors = {key.removeprefix("encoder."): tensor for key, tensor in tensors.items()}
    folder = base if place == "inside" else tmp_path
    write_adapter(folder / "linear_spec_lora", tensors)
    options = {} if place == "inside" else {"adapter": folder / "linear_spec_lora"}
    model = load(base, device="cpu", dtype=torch.float64, **options)
    assert model.has_draft_adapter
    changed = with_update(
        plain, {f"encoder.{key}": tensor for key, tensor in tensors.items()}, 2.0, ""
    )
    ids = random_ids(1, 9)
    close(logits(model, ids, attention="full")[0], plain(ids[0])[1])
    close(logits(model, ids, attention="full", adapter=True)[0], changed(ids[0])[1])
    # A product whose norm takes it as its kernel leaves it has no adapter added.
    invariant = model.deterministic()
    close(logits(invariant, ids, attention="full")[0], plain(ids[0])[1])
    close(logits(invariant, ids, attention="full", adapter=True)[0], changed(ids[0])[1])
    model = load(write_checkpoint(tmp_path / "without", plain), device="cpu")
    with pytest.raises(ValueError, match="adapter: expected a model with a draft adapter"):
        logits(model, ids, attention="full", adapter=True)


def damaged(change):
    return lambda tensors: {change(key): tensor for key, tensor in tensors.items()}


WRONG = {
    "kind": ({"peft_type": "LOHA"}, None, "peft_type: expected 'LORA' .*, found 'LOHA'"),
    "dora": (
        {"use_dora": True},
        None,
        "use_dora: expected False .*, found True; .* merge_and_unload",
    ),
    "bias": ({"bias": "all"}, None, "bias: expected 'none' .*, found 'all'"),
    "pissa": ({"init_lora_weights": "pissa"}, None, "init_lora_weights: expected True .* 'pissa'"),
    "replicated": ({"layer_replication": [[0, 3]]}, None, "layer_replication: expected none"),
    "rank": ({"r": 4}, None, r"lora_A: expected \(4, 48\), found \(3, 48\)"),
    "no rank": ({"r": None}, None, "r: expected a positive number, found none"),
    "pattern": (
        {"rank_pattern": {"(a+)+$": 4}},
        None,
        r"rank_pattern: \(a\+\)\+\$: expected a module's name .*, found 4",
    ),
    "another model's": (
        {},
        damaged(lambda key: key.replace("q_proj", "query")),
        "found base_model.*query.lora_A.weight, which is of no weight of the model",
    ),
    "half": (
        {},
        lambda tensors: {k: t for k, t in tensors.items() if ".lora_A." in k},
        "self_attn.q_proj.weight: expected lora_A and lora_B, found A",
    ),
    "integers": (
        {},
        lambda tensors: {k: t.to(torch.int8) for k, t in tensors.items()},
        "lora_A.weight: expected floats, found torch.int8",
    ),
    "empty": ({}, lambda tensors: {}, "expected lora_A and lora_B of some weights, found none"),
}


@pytest.mark.parametrize("config, change, message", WRONG.values(), ids=WRONG)
def test_refused(tmp_path, config, change, message):
    plain = random_plain(A2D)
    base = write_checkpoint(tmp_path / "base", plain)
    tensors = factors(plain, ["q_proj"])
    folder = write_adapter(tmp_path / "lora", change(tensors) if change else tensors, **config)
    with pytest.raises(CheckpointError, match=message):
        load(base, adapter=folder, device="cpu")


def test_an_adapter_of_the_hub_names_its_models_revision(tmp_path, monkeypatch):
    plain = random_plain(A2D)
    base = write_checkpoint(tmp_path / "base", plain)
    options = {"base_model_name_or_path": "some/base", "revision": "v1.1"}
    lora = write_adapter(tmp_path / "lora", factors(plain, ["q_proj"]), **options)
    asked = []

    def snapshot_download(repository, *, revision, **patterns):
        asked.append((repository, revision))
        return str({"some/base": base, "some/lora": lora}[repository])

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    load("some/lora", device="cpu", revision="main")
    assert asked == [("some/lora", "main"), ("some/base", "v1.1")]


def test_an_adapter_alone(tmp_path):
    plain = random_plain(A2D)
    folder = write_adapter(tmp_path / "lora", factors(plain, ["q_proj"]))
    with pytest.raises(CheckpointError, match="base_model_name_or_path: .* load.model, adapter="):
        load(folder)
    with pytest.raises(ValueError, match="adapter: expected None for .*lora, which is one"):
        load(folder, adapter=folder)
    (folder / "adapter_model.safetensors").unlink()
    base = write_checkpoint(tmp_path / "base", plain)
    with pytest.raises(CheckpointError, match="expected the adapter's weights, found no such"):
        load(base, adapter=folder)
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="adapter: expected None for a loaded module"):
        load(module, adapter=folder)


def test_a_draft_adapter_of_other_weights(tmp_path):
    plain = random_plain(RECENT["nemotron"])
    base = write_checkpoint(tmp_path / "base", plain)
    write_adapter(base / "linear_spec_lora", factors(plain, ["q_proj"]))
    with pytest.raises(CheckpointError, match="q_proj.weight: expected a draft adapter of attent"):
        load(base, device="cpu")


def test_saved_names(tmp_path):
    """The keys that the installed PEFT writes are the ones that are read."""
    module = peft_module(target_modules=["q_proj"])
    module.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
