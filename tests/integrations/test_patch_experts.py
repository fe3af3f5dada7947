"""``patch`` on the experts of transformers 5."""

import pytest
import torch

import pydllm
from tests.models.moe_plain import CONFIGS, fused, random_weights
from tests.models.test_moe import load_in, qwen3_moe

transformers = pytest.importorskip("transformers")


def module_of(dtype=torch.float32):
    module = qwen3_moe("qwen3-moe", attn_implementation="sdpa")
    weights = random_weights(CONFIGS["qwen3-moe"], 0, torch.float64)
    load_in(module, fused(weights, CONFIGS["qwen3-moe"], "transformers"), dtype)
    module.config._attn_implementation = "sdpa"
    return module


def logits(module):
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return module(ids).logits


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_experts_are_replaced_and_put_back(backend):
    module = module_of()
    before = logits(module)
    with pydllm.patch(module, backend=backend, self_check=True) as patched:
        found = [f for f in patched.report.replaced if f.part == "experts"]
        assert [f.name for f in found] == [f"model.layers.{i}.mlp.experts" for i in range(3)]
        torch.testing.assert_close(logits(module), before, rtol=0, atol=2e-5)
        assert patched.report.calls["experts"] == 3
    assert "forward" not in module.model.layers[0].mlp.experts.__dict__
    assert torch.equal(logits(module), before)


def test_a_cpu_keeps_its_experts():
    patched = pydllm.patch(module_of())
    assert all(f.part != "experts" for f in patched.report.replaced)


def test_a_gradient_goes_the_old_way():
    module = module_of()
    with pydllm.patch(module, backend="torch") as patched:
        module(torch.tensor([[1, 2, 3]])).logits.sum().backward()
        assert patched.report.calls["as before: a gradient is wanted"] >= 3
    assert module.model.layers[0].mlp.experts.down_proj.grad is not None


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda e: setattr(e, "act_fn", torch.nn.ReLU()), "neither SiLU nor tanh-approximated GEL"),
        (lambda e: setattr(e, "is_transposed", True), "is_transposed is True"),
        (lambda e: setattr(e, "has_bias", True), "has_bias is True"),
    ],
)
def test_other_experts_are_left(change, reason):
    module = module_of()
    change(module.model.layers[1].mlp.experts)
    with pydllm.patch(module, backend="torch") as patched:
        left = {f.name: f.reason for f in patched.report.left}
        assert reason in left["model.layers.1.mlp.experts"]


def test_gelu_experts():
    module = module_of()
    for layer in module.model.layers:
        layer.mlp.experts.act_fn = torch.nn.GELU(approximate="tanh")
    before = logits(module)
    with pydllm.patch(module, backend="torch") as patched:
        torch.testing.assert_close(logits(module), before, rtol=0, atol=2e-5)
        assert patched.report.calls["experts"] == 3
