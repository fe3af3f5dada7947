"""An independent forward of mixtures of experts, and random checkpoints to run it on.

Plain torch from a checkpoint's tensors and config.json, one sequence, no cache, expert by expert.
Nothing is shared with the package, nor with plain.py. ``inner`` is the dtype of norms, rotary
tables, softmax and router: fp32 as published code has it, or fp64 for an exact reference.
"""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "torch_dtype": "float32",
}
_LLADA2 = _SIZES | {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "intermediate_size": 40,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "use_qkv_bias": False,
    "use_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 600000,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "norm_head": False,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
    "block_size": 8,
    "mask_token_id": 60,
    "pad_token_id": 58,
    "eos_token_id": 58,
}
_QWEN = _SIZES | {
    "intermediate_size": 40,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "mask_token_id": 60,
    "eos_token_id": 57,
}
_LLADA_MOE = _SIZES | {
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "llada",
    "dense_intermediate_size": 40,
    "expert_intermediate_size": 24,
    "shared_expert_intermediate_size": None,
    "num_key_value_heads": 6,
    "attention_bias": False,
    "clip_qkv": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000,
    "partial_rotary_factor": 1,
    "norm_topk_prob": None,
    "qk_layernorm": True,
    "moe_layer_freq": [1, 1, 1],
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "routed_scaling_factor": 1,
    "router_num_group": None,
    "router_topk_group": None,
    "mask_token_id": 60,
    "pad_token_id": 58,
}
_SDAR = _QWEN | {"architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe", "block_size": 4}
CONFIGS = {
    "llada2": _LLADA2,
    "llada2-flat": _LLADA2 | {"n_group": 1, "topk_group": 1, "num_shared_experts": None},
    "llada2.2": _LLADA2 | {"expert_capacity": 8},
    "ling": _LLADA2 | {"architectures": ["BailingMoeV2ForCausalLM"], "mask_token_id": None},
    "sdar-moe": _SDAR,
    "sdar-moe-mixed": _SDAR | {"mlp_only_layers": [2]},
    "rnd1": _QWEN | {"architectures": ["RND1LM"], "model_type": "rnd1", "rope_scaling": False},
    "qwen3-moe": _QWEN | {"architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": None},
    "llada-moe": _LLADA_MOE,
    "llada-moe-mixed": _LLADA_MOE | {"moe_layer_freq": [0, 1, 1]},
}
_BLOCKS = {"LLaDA2MoeModelLM": "block_size", "SDARMoeForCausalLM": "block_size"}
_CAUSAL = ("BailingMoeV2ForCausalLM", "Qwen3MoeForCausalLM")


def _is_sigmoid(config):
    return config["architectures"][0] in ("LLaDA2MoeModelLM", "BailingMoeV2ForCausalLM")


def is_sparse(config, layer):
    """Whether a layer has experts."""
    if _is_sigmoid(config):
        return layer >= config["first_k_dense_replace"]
    if "moe_layer_freq" in config:
        return config["moe_layer_freq"][layer] == 1
    step = config["decoder_sparse_step"]
    return layer not in config["mlp_only_layers"] and (layer + 1) % step == 0


def random_weights(config, seed=0, dtype=torch.float32):
    """The tensors of a checkpoint; spread wide, so that rows choose different experts."""
    generator = torch.Generator().manual_seed(seed)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv, dim = config["num_key_value_heads"], config.get("head_dim") or hidden // heads
    inner = config.get("moe_intermediate_size") or config["expert_intermediate_size"]
    dense = config.get("intermediate_size") or config["dense_intermediate_size"]

    def matrix(*shape):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.25).to(dtype)

    def norm(width):
        noise = torch.randn(width, generator=generator, dtype=torch.float64)
        return (1 + 0.2 * noise).to(dtype)

    def mlp(prefix, width):
        return {
            f"{prefix}gate_proj.weight": matrix(width, hidden),
            f"{prefix}up_proj.weight": matrix(width, hidden),
            f"{prefix}down_proj.weight": matrix(hidden, width),
        }

    sigmoid = _is_sigmoid(config)
    embedding = "model.word_embeddings" if sigmoid else "model.embed_tokens"
    weights = {f"{embedding}.weight": matrix(config["vocab_size"], hidden)}
    weights |= {"lm_head.weight": matrix(config["vocab_size"], hidden)}
    weights |= {"model.norm.weight": norm(hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}{name}.weight"] = norm(hidden)
        if sigmoid:
            rows = (heads + 2 * kv) * dim
            weights[f"{at}attention.query_key_value.weight"] = matrix(rows, hidden)
            weights[f"{at}attention.dense.weight"] = matrix(hidden, heads * dim)
            for name in ("query", "key"):
                weights[f"{at}attention.{name}_layernorm.weight"] = norm(dim)
        else:
            for name, count in (("q", heads), ("k", kv), ("v", kv)):
                weights[f"{at}self_attn.{name}_proj.weight"] = matrix(count * dim, hidden)
            weights[f"{at}self_attn.o_proj.weight"] = matrix(hidden, heads * dim)
            for name in ("q_norm", "k_norm"):
                weights[f"{at}self_attn.{name}.weight"] = norm(dim)
        if not is_sparse(config, layer):
            weights |= mlp(f"{at}mlp.", dense)
            continue
        weights[f"{at}mlp.gate.weight"] = matrix(config["num_experts"], hidden)
        if sigmoid:
            noise = torch.randn(config["num_experts"], generator=generator, dtype=torch.float64)
            weights[f"{at}mlp.gate.expert_bias"] = (0.1 * noise).to(dtype)
        for expert in range(config["num_experts"]):
            weights |= mlp(f"{at}mlp.experts.{expert}.", inner)
        if config.get("num_shared_experts"):
            weights |= mlp(f"{at}mlp.shared_experts.", inner * config["num_shared_experts"])
    return weights


def write_moe(folder, config, weights):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stored = {name: t.contiguous().clone() for name, t in weights.items()}
    save_file(stored, folder / "model.safetensors")
    return folder


def fused(weights, config, layout):
    """The same weights with the experts as ``layout`` stores them."""
    count = config["num_experts"]
    out = {name: t for name, t in weights.items() if ".mlp.experts." not in name}
    for layer in range(config["num_hidden_layers"]):
        if not is_sparse(config, layer):
            continue
        at = f"model.layers.{layer}.mlp."
        gate, up, down = (
            torch.stack([weights[f"{at}experts.{e}.{name}_proj.weight"] for e in range(count)])
            for name in ("gate", "up", "down")
        )
        both = torch.cat((gate, up), 1)
        separate = {"gate_proj": gate, "up_proj": up, "down_proj": down}
        stored = {
            "dfactory": {f"experts.{name}": t for name, t in separate.items()},
            "dinfer": {"w1": both, "w2": down},
            "w13": {"experts.w13_weight": both, "experts.w2_weight": down},
            "transformers": {"experts.gate_up_proj": both, "experts.down_proj": down},
            "mlx": {f"switch_mlp.{name}.weight": t for name, t in separate.items()},
        }[layout]
        out |= {f"{at}{name}": t for name, t in stored.items()}
    return out


def _lower_first(values, count):
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :count]


def _route(x, at, w, config, inner, mutant):
    """Experts and weights of rows, ``(T, top)`` each."""
    router, top = w[f"{at}mlp.gate.weight"], config["num_experts_per_tok"]
    if not _is_sigmoid(config):
        chosen_by = F.linear(x, router)
        scores = chosen_by.softmax(-1, dtype=inner)
        index = _lower_first(chosen_by, top)
        picked = scores.gather(1, index)
        renormalize = config.get("norm_topk_prob") and "LLaDAMoE" not in config["architectures"][0]
        renormalize = bool(renormalize) != (mutant == "renormalised the other way")
        return index, picked / picked.sum(-1, keepdim=True) if renormalize else picked
    scores = F.linear(x.to(inner), router.to(inner)).sigmoid()
    bias = w[f"{at}mlp.gate.expert_bias"].to(inner)
    choice = scores.clone() if mutant == "no bias" else scores + bias
    groups, kept = config["n_group"], config["topk_group"]
    if config.get("expert_capacity"):
        size = config["block_size"]
        for first in range(0, len(x), size):
            part = choice[first : first + size]
            pool = _lower_first(part.amax(0), config["expert_capacity"])
            shut = torch.ones(part.shape[1], dtype=torch.bool)
            shut[pool] = False
            if mutant != "no pools":
                choice[first : first + size] = part.masked_fill(shut, -torch.inf)
    elif groups > 1 and mutant != "no groups":
        best = choice.unflatten(1, (groups, -1)).topk(2, -1).values.sum(-1)
        for row, allowed in enumerate(_lower_first(best, kept).tolist()):
            for group, part in enumerate(choice[row].view(groups, -1)):
                if group not in allowed:
                    part.fill_(-torch.inf)
    index = _lower_first(choice, top)
    picked = scores.gather(1, index)
    if mutant != "not renormalised":
        picked = picked / (picked.sum(-1, keepdim=True) + 1e-20)
    return index, picked if mutant == "no scale" else picked * config["routed_scaling_factor"]


def _mlp(x, w, prefix, mutant=None):
    gate, up, down = (w[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    if mutant == "up before gate":
        gate, up = up, gate
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _expert_layer(x, at, w, config, inner, mutant, qwen_rounding):
    index, picked = _route(x, at, w, config, inner, mutant)
    if mutant == "next expert":
        index = (index + 1) % config["num_experts"]
    out, each = torch.zeros_like(x), torch.zeros(*index.shape, x.shape[1], dtype=picked.dtype)
    for expert in index.unique().tolist():
        row, slot = (index == expert).nonzero(as_tuple=True)
        y = _mlp(x[row], w, f"{at}mlp.experts.{expert}.", mutant)
        weight = picked[row, slot, None]
        each[row, slot] = y.to(picked.dtype) * weight
        out.index_add_(0, row, (y * weight.to(x.dtype)).to(x.dtype))
    if not qwen_rounding:
        out = each.sum(1).to(x.dtype)
    for _ in range({"no shared expert": 0, "shared expert twice": 2}.get(mutant, 1)):
        if config.get("num_shared_experts"):
            out = out + _mlp(x, w, f"{at}mlp.shared_experts.", mutant)
    return out


def forward(config, w, ids, inner=torch.float64, mutant=None, qwen_rounding=False):
    """Hidden states after the last norm and logits, ``(T, H)`` and ``(T, V)``.

    Args:
        mutant: the name of a mistake to make.
        qwen_rounding: weigh and add experts in the model's dtype, in ascending order, as
            transformers does for Qwen3-MoE.
    """
    c, sigmoid, t = config, _is_sigmoid(config), len(ids)
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    dim = c.get("head_dim") or c["hidden_size"] // heads
    rotary = int(dim * (c.get("partial_rotary_factor") or 1)) if mutant != "whole rotation" else dim

    def norm(x, name):
        wide = x.to(inner)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + c["rms_norm_eps"])
        return w[f"{name}.weight"] * wide.to(x.dtype)

    x = w["model.word_embeddings.weight" if sigmoid else "model.embed_tokens.weight"][ids]
    frequency = 1.0 / c["rope_theta"] ** (torch.arange(0, rotary, 2).to(inner) / rotary)
    angle = torch.arange(t).to(inner)[:, None] * frequency
    cos, sin = (f.to(x.dtype)[:, None] for f in (angle.cos(), angle.sin()))

    def rotate(v):
        if mutant == "last dimensions rotate":
            rest, part = v[..., : dim - rotary], v[..., dim - rotary :]
        else:
            part, rest = v[..., :rotary], v[..., rotary:]
        a, b = part.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        order = (rest, turned) if mutant == "last dimensions rotate" else (turned, rest)
        return torch.cat(order, -1)

    name = c["architectures"][0]
    block = 1 if name in _CAUSAL else c[_BLOCKS[name]] if name in _BLOCKS else t
    number = torch.arange(t) // block
    unseen = number[:, None] < number
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        h = norm(x, f"{at}input_layernorm")
        if sigmoid:
            qkv = F.linear(h, w[f"{at}attention.query_key_value.weight"]).unflatten(-1, (-1, dim))
            q, k, v = qkv.split((heads, kv, kv), 1)
            out, norms = "attention.dense", ("query_layernorm", "key_layernorm")
            norms = tuple(f"attention.{n}" for n in norms)
        else:
            q, k, v = (
                F.linear(h, w[f"{at}self_attn.{n}_proj.weight"]).unflatten(-1, (-1, dim))
                for n in "qkv"
            )
            out, norms = "self_attn.o_proj", ("self_attn.q_norm", "self_attn.k_norm")
        if mutant == "norm after rotation":
            q, k = (norm(rotate(u), at + n) for u, n in zip((q, k), norms, strict=True))
        else:
            q, k = (rotate(norm(u, at + n)) for u, n in zip((q, k), norms, strict=True))
        k, v = (u.repeat_interleave(heads // kv, 1) for u in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * dim**-0.5
        seen = scores.masked_fill(unseen, -torch.inf).softmax(-1, dtype=inner).to(x.dtype)
        attended = torch.einsum("hij,jhd->ihd", seen, v).flatten(1)
        x = x + F.linear(attended, w[f"{at}{out}.weight"])
        h = norm(x, f"{at}post_attention_layernorm")
        if is_sparse(c, layer):
            x = x + _expert_layer(h, at, w, c, inner, mutant, qwen_rounding)
        else:
            x = x + _mlp(h, w, f"{at}mlp.")
    hidden = norm(x, "model.norm")
    return hidden, F.linear(hidden, w["lm_head.weight"])
