"""Damaged and contradictory mixtures of experts, each with its message, before any allocation."""

import json

import pytest
import torch

from pydllm._backend.errors import CheckpointError
from pydllm.models import load
from tests.models.moe_plain import CONFIGS, fused, random_weights, write_moe

E3 = "model.layers.1.mlp.experts.3."
ROUTER = "model.layers.1.mlp.gate.weight"
BIAS = "model.layers.1.mlp.gate.expert_bias"
QKV = "model.layers.1.attention.query_key_value.weight"
ABSENT = object()


def keys(**changes):
    """Change keys of config.json; ABSENT takes one away."""

    def damage(folder, config, weights):
        changed = {k: v for k, v in (config | changes).items() if v is not ABSENT}
        (folder / "config.json").write_text(json.dumps(changed))

    return damage


def tensors(change, layout=None):
    """Change the tensors of model.safetensors."""

    def damage(folder, config, weights):
        weights = dict(weights) if layout is None else fused(weights, config, layout)
        change(weights)
        write_moe(folder, config, weights)

    return damage


def replaced(name, tensor):
    return lambda weights: weights.update({name: tensor})


def without(*names):
    return lambda weights: [weights.pop(name) for name in names]


W1 = "model.layers.1.mlp.w1"
CASES = {
    ("llada2", "no number of experts"): (keys(num_experts=ABSENT), "num_experts: expected an int"),
    ("llada2", "experts of two numbers"): (
        keys(num_local_experts=8),
        "num_local_experts: expected 16 as num_experts says, found 8",
    ),
    ("llada2", "more chosen than there are"): (
        keys(num_experts_per_tok=17),
        "num_experts_per_tok: expected at most the 16 experts, found 17",
    ),
    ("llada2", "groups do not divide"): (keys(n_group=3), "n_group: expected a divisor of 16 exp"),
    ("llada2", "groups of one expert"): (keys(n_group=16), "at least 2 in each group, found 16"),
    ("llada2", "more groups kept than there are"): (keys(topk_group=9), "topk_group: expected 1 t"),
    ("llada2", "groups too small"): (keys(topk_group=1), "groups that hold 4 experts, found 1"),
    ("llada2", "another score"): (keys(score_function="softmax"), "score_function: expected 'sig"),
    ("llada2", "no renormalisation"): (keys(norm_topk_prob=False), "norm_topk_prob: expected True"),
    ("llada2", "no bias"): (
        keys(moe_router_enable_expert_bias=False),
        "moe_router_enable_expert_bias: expected True",
    ),
    ("llada2", "normalised head"): (keys(norm_head=True), "norm_head: expected False"),
    ("llada2", "biases"): (keys(use_bias=True), "use_bias: expected False"),
    ("llada2", "rotations contradict"): (
        keys(rotary_dim=16),
        "rotary_dim: expected 8 as partial_rotary_factor says, found 16",
    ),
    ("llada2", "scale"): (keys(routed_scaling_factor=0), "routed_scaling_factor: expected a posit"),
    ("llada2", "dense layers"): (
        keys(first_k_dense_replace=4),
        r"first_k_dense_replace: expected an integer in \[0, 3\], found 4",
    ),
    ("llada2", "shared experts"): (
        keys(num_shared_experts=-1),
        "num_shared_experts: expected an i",
    ),
    ("llada2", "prediction layers"): (
        keys(num_nextn_predict_layers=1),
        r"num_nextn_predict_layers: expected 0 \(multi-token prediction is not read\), found 1",
    ),
    ("llada2.2", "pool too small"): (
        keys(expert_capacity=3),
        "expert_capacity: expected 4 to 16 experts, found 3",
    ),
    ("llada2.2", "pool too large"): (
        keys(expert_capacity=17),
        "expected 4 to 16 experts, found 17",
    ),
    ("llada2", "an expert is missing"): (
        tensors(without(E3 + "down_proj.weight")),
        r"expected .*experts.3.down_proj.weight \(48, 24\), found no such tensor",
    ),
    ("llada2", "an expert too many"): (
        tensors(replaced(E3.replace("3", "16") + "up_proj.weight", torch.ones(24, 48))),
        "experts.16.up_proj.weight, which this model has not",
    ),
    ("llada2", "an expert of another width"): (
        tensors(replaced(E3 + "up_proj.weight", torch.ones(25, 48))),
        r"experts.3.up_proj.weight: expected shape \(24, 48\), found \(25, 48\)",
    ),
    ("llada2", "a router of fewer experts"): (
        tensors(replaced(ROUTER, torch.ones(15, 48))),
        r"mlp.gate.weight: expected shape \(16, 48\), found \(15, 48\)",
    ),
    ("llada2", "bias missing"): (
        tensors(without(BIAS)),
        r"gate.expert_bias \(16,\), found no such",
    ),
    ("llada2", "bias under two names"): (
        tensors(replaced(BIAS.replace("expert_bias", "e_score_correction_bias"), torch.ones(16))),
        "expected one tensor, found .*expert_bias and .*e_score_correction_bias|expected one tens",
    ),
    ("llada2", "shared expert missing"): (
        tensors(without("model.layers.2.mlp.shared_experts.up_proj.weight")),
        "shared_experts.up_proj.weight .*found no such tensor",
    ),
    ("llada2", "fused projection too short"): (
        tensors(replaced(QKV, torch.ones(159, 48))),
        r"query_key_value.weight: expected shape \(160, 48\), found \(159, 48\)",
    ),
    ("llada2", "experts in two layouts"): (
        tensors(replaced(W1, torch.ones(16, 48, 48))),
        "expected one tensor, found .*experts.0.gate_proj.weight and .*w1",
    ),
    ("llada2", "fused experts of another width"): (
        tensors(replaced(W1, torch.ones(16, 46, 48)), "dinfer"),
        r"mlp.w1: expected shape \(16, 48, 48\), found \(16, 46, 48\)",
    ),
    ("llada2", "half of a fused layout"): (
        tensors(without("model.layers.2.mlp.w2"), "dinfer"),
        "experts.0.down_proj.weight .*found no such tensor",
    ),
    ("llada2", "experts in a dense layer"): (
        tensors(replaced("model.layers.0.mlp.gate.weight", torch.ones(16, 48))),
        "model.layers.0.mlp.gate.weight, which this model has not",
    ),
    ("llada2", "integers"): (
        tensors(replaced(E3 + "up_proj.weight", torch.ones(24, 48, dtype=torch.int8))),
        "experts.3.up_proj.weight: expected fp32, fp16, bf16 or fp64, found",
    ),
    ("llada2", "a layer too many"): (
        tensors(replaced("model.layers.3.input_layernorm.weight", torch.ones(48))),
        "model.layers.3.input_layernorm.weight, which this model has not",
    ),
    ("llada-moe", "shared expert of the layer"): (
        keys(shared_expert_intermediate_size=24),
        "shared_expert_intermediate_size: expected none",
    ),
    ("llada-moe", "clipping"): (keys(clip_qkv=8.0), "clip_qkv: expected none"),
    ("llada-moe", "layer kinds"): (keys(moe_layer_freq=[1, 1]), "expected 0 or 1 for each of 3"),
    ("llada-moe", "bias that weighs"): (
        keys(moe_router_enable_expert_bias=True),
        "moe_router_enable_expert_bias: expected False",
    ),
    ("llada-moe", "no norm of heads"): (keys(qk_layernorm=False), "qk_layernorm: expected True"),
    ("sdar-moe", "dense layers by name"): (
        keys(mlp_only_layers=[3]),
        r"mlp_only_layers: expected numbers of layers in \[0, 3\)",
    ),
    ("sdar-moe", "sparse step"): (
        keys(decoder_sparse_step=0),
        "decoder_sparse_step: expected an i",
    ),
    ("sdar-moe", "dense by its name"): (
        keys(architectures=["SDARForCausalLM"]),
        r"num_experts: expected none \(SDARForCausalLM has no experts\), found 16",
    ),
}


@pytest.mark.parametrize("family, case", CASES, ids=[f"{f}-{c}" for f, c in CASES])
def test_message(tmp_path, monkeypatch, family, case):
    damage, message = CASES[family, case]
    config, weights = CONFIGS[family], random_weights(CONFIGS[family])
    write_moe(tmp_path, config, weights)
    damage(tmp_path, config, weights)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated before the checks"))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path, device="cpu")
    assert len(str(caught.value)) < 600


def test_there_are_thirty():
    assert len(CASES) >= 30
