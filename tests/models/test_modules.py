"""Modules whose parameters are not plain tensors in memory: refused, with the way out."""

import types

import pytest
import torch
from torch import nn

from pydllm._backend.errors import CheckpointError
from pydllm.demo import MODELS
from pydllm.models import load
from tests.models.test_load import LLaDAModelLM, tiny_llada

CONFIG = tiny_llada.__globals__["CONFIG"]


@pytest.fixture
def module():
    return LLaDAModelLM(CONFIG | {"n_layers": 2}).eval()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_by_torch(module):
    quantised = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(CheckpointError, match=r"expected a plain tensor, .*pydllm.patch\(module\)"):
        load(quantised)


class Packed(nn.Parameter):
    """A parameter of a quantisation library."""


def test_quantised_by_others(module):
    layer = module.model.transformer.blocks[0].q_proj
    layer.weight = Packed(layer.weight.detach(), requires_grad=False)
    with pytest.raises(
        CheckpointError, match="blocks.0.q_proj.weight: .*, found Packed .quantised"
    ):
        load(module)


def test_meta(module):
    with pytest.raises(CheckpointError, match="expected a tensor in memory, found one on the meta"):
        load(module.to("meta"))


def test_another_adapter(module):
    peft = pytest.importorskip("peft", reason="wraps a module with it")
    module.config = types.SimpleNamespace(**CONFIG, get=CONFIG.get)
    wrapped = peft.get_peft_model(
        module, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    with pytest.raises(CheckpointError, match=r"expected a LoRA of PEFT, .*merge_and_unload\(\)"):
        load(wrapped)


def test_ends_of_a_modules_generation_config(module):
    module.config.eos_token_id = 1
    module.generation_config = types.SimpleNamespace(eos_token_id=[2, 1])
    assert load(module).spec.eos_ids == (1, 2)
    assert load(module, eos_ids=3, causal="masked").spec.eos_ids == (3,)


def test_a_bundled_folder_has_no_template():
    assert load(MODELS["llada-tiny"], device="cpu").chat_template is None


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.5


def scaled(block):
    old = block.q_proj
    block.q_proj = Scaled(old.in_features, old.out_features, bias=False)


def replaced(block):
    old = block.q_proj.forward
    block.q_proj.forward = lambda x: old(x) * 1.5


COMPUTED = {
    "hook": (lambda b: b.register_forward_hook(lambda *a: a[2]), "blocks.1: .*a forward hook"),
    "pre-hook": (lambda b: b.q_proj.register_forward_pre_hook(lambda *a: None), "q_proj: .*hook"),
    "replaced": (replaced, "blocks.1.q_proj: .*, found a forward of its own, which would be left"),
    "subclass": (scaled, "blocks.1.q_proj: .*, found a Scaled, which would be left out"),
}


@pytest.mark.parametrize("change, message", COMPUTED.values(), ids=COMPUTED)
def test_what_is_computed_besides_the_weights(module, change, message):
    change(module.model.transformer.blocks[1])
    with pytest.raises(CheckpointError, match=message + r"(?s:.*)pydllm.patch\(module\)"):
        load(module)


def test_hooks_of_the_whole_module_are_warned_of(module):
    module.register_forward_hook(lambda *a: a[2])
    with pytest.warns(RuntimeWarning, match="a forward hook of the whole module is left out"):
        load(module)


def test_accelerate_on_one_device(module):
    hooks = pytest.importorskip("accelerate.hooks", reason="attaches its hooks")
    plain = load(LLaDAModelLM(CONFIG | {"n_layers": 2})).sizes
    hooks.add_hook_to_module(
        module.model.transformer.blocks[1], hooks.AlignDevicesHook(execution_device="cpu")
    )
    assert load(module).sizes == plain
