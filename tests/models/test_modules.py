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
