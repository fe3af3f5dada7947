"""A loaded module against its own forward, and the warnings of what transformers 5 does to it."""

import dataclasses
import json
import types
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pydllm._backend.errors import CheckpointError
from pydllm.models import check, load
from tests.models.plain import CONFIGS, Plain, random_plain
from tests.models.test_load import oracle, storage_bytes
from training.llada import CONFIG, TinyLLaDA


class LLaDAModelLM(TinyLLaDA):
    def __init__(self, config=CONFIG | {"n_layers": 2}):
        torch.manual_seed(0)
        super().__init__(config)
        self.config = types.SimpleNamespace(**config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.25, mean=float(parameter.ndim == 1))
        self.eval()


def test_agrees():
    module = LLaDAModelLM()
    model = load(module, check=True)
    found = check(model, module)
    assert found.relative <= found.limit and found.difference < 1e-4 * found.largest
    assert "largest difference" in str(found) and f"{found.difference:.3e}" in str(found)
    ids = torch.randint(3, CONFIG["vocab_size"], (3, 5))
    assert check(model, module, ids=ids).limit == found.limit


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Llama"])
def test_transformers_models(name):
    module = oracle(name)
    model = load(module, check=True)
    # Retrained to see both ways: the module is given a mask that hides nothing.
    model.spec = dataclasses.replace(model.spec, attention="full")
    check(model, module)


class SDARForCausalLM(nn.Module):
    """The test's own block-causal model, called as the real one is: the mask says 1 for visible."""

    def __init__(self):
        super().__init__()
        self.plain = random_plain(CONFIGS["sdar"], seed=2)
        self.config = types.SimpleNamespace(**CONFIGS["sdar"])
        for name, tensor in self.plain.weights.items():
            *path, last = name.split(".")
            holder = self
            for part in path:
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = getattr(holder, part)
            holder.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
        self.eval()

    def forward(self, ids, attention_mask):
        size = CONFIGS["sdar"]["block_size"]
        block = torch.arange(ids.shape[1]) // size
        assert torch.equal(attention_mask[0, 0] > 0, block[:, None] >= block)
        logits = torch.stack([self.plain(row, block=size)[1] for row in ids])
        return types.SimpleNamespace(logits=logits)


def test_block_causal():
    module = SDARForCausalLM()
    assert check(load(module), module).relative < 1e-12  # fp64
    assert isinstance(module.plain, Plain)


DAMAGE = {
    "another forward": lambda m: m.register_forward_hook(lambda *a: a[2] * 1.01),
    "NaN": lambda m: m.register_forward_hook(lambda *a: a[2] * float("nan")),
    "other rotations": lambda m: m.sin.mul_(-1),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_forward_that_is_another(name):
    module = LLaDAModelLM()
    model = load(module)
    DAMAGE[name](module)
    with pytest.raises(CheckpointError, match="LLaDAModelLM: its forward is not .*allowed"):
        check(model, module)
    # A hook is refused before anything is compared.
    reason = "largest difference" if name == "other rotations" else "found the forward hook"
    with pytest.raises(CheckpointError, match=reason):
        load(module, check=True)


def test_bad_arguments(tmp_path):
    module = LLaDAModelLM()
    with pytest.raises(ValueError, match="module: expected LLaDAModelLM in eval mode"):
        check(load(module), module.train())
    with pytest.raises(ValueError, match="check: expected a module to compare with"):
        load(tmp_path, check=True)
    module = LLaDAModelLM()
    model = load(module)
    module.register_forward_hook(lambda *a: a[2][..., :-1])
    with pytest.raises(CheckpointError, match="expected logits .* found"):
        check(model, module)


@pytest.mark.parametrize("garbage", [0.0, float("nan"), 1e30])
def test_uninitialised_rotary_buffers_are_named(garbage):
    module = oracle("Qwen3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(module, check=True)
    module.model.rotary_emb.inv_freq[1:] = garbage
    with pytest.warns(RuntimeWarning, match=r"model\.rotary_emb\.inv_freq is not .* 10000: the m"):
        model = load(module)
    with pytest.raises(CheckpointError, match="Qwen3ForCausalLM: its forward is not"):
        check(model, module)


def test_weights_drawn_anew_are_named(tmp_path):
    transformers = pytest.importorskip("transformers", reason="loads with transformers")
    oracle("Qwen3").save_pretrained(tmp_path)
    module = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(module)
    nn.init.normal_(module.model.layers[1].mlp.up_proj.weight)
    nn.init.normal_(module.model.norm.weight)
    with pytest.warns(RuntimeWarning) as caught:
        load(module)
    (said,) = [str(w.message) for w in caught]
    assert f"2 of 25 tensors are not those of {tmp_path}: " in said
    assert "model.layers.1.mlp.up_proj.weight, model.norm.weight" in said


def test_a_directory_without_weights_says_nothing(tmp_path):
    module = LLaDAModelLM()
    module.config._name_or_path = str(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(module)
    save_file({k: v.half() for k, v in module.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    module.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the same numbers in another dtype
        load(module)


def test_nothing_is_held_twice():
    """Parameters and model together take the bytes that the parameters took."""
    module = LLaDAModelLM()
    size = storage_bytes([*module.parameters()])
    model = load(module, check=True)
    held = [t for layer in model._layers for t in vars(layer).values() if t is not None]
    held += [model._embedding, model._norm, model._head]
    assert storage_bytes([*module.parameters(), *held]) == size
    assert {t.untyped_storage().data_ptr() for t in held} == {
        t.untyped_storage().data_ptr() for t in module.parameters()
    }
