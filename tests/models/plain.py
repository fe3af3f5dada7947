"""An independent forward of one sequence, and random checkpoints to run it on.

Plain torch from a checkpoint's tensors and config.json: no fused weights, no cache layout, no
batch, rotation as a product of complex numbers. Nothing is shared with the package.
"""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

LLADA = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "d_model": 48,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 3,
    "mlp_hidden_size": 40,
    "vocab_size": 61,
    "embedding_size": 61,
    "max_sequence_length": 64,
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 500000.0,
    "include_bias": False,
    "include_qkv_bias": False,
    "weight_tying": False,
    "mask_token_id": 60,
    "eos_token_id": 59,
    "pad_token_id": 58,
}
QWEN = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 40,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "mask_token_id": 60,
    "eos_token_id": [59, 57],
}


def _qwen(name, **changes):
    values = QWEN | {"architectures": [name]} | changes
    return {key: value for key, value in values.items() if value is not None}


CONFIGS = {
    "llada": LLADA,
    "llada-gqa": LLADA | {"n_kv_heads": 2},
    "llada-mqa": LLADA | {"n_kv_heads": None, "multi_query_attention": True},
    "llada-bias": LLADA | {"include_bias": True},
    "llada-qkv-bias": LLADA | {"include_qkv_bias": True, "n_kv_heads": 2},
    "llada-tied": LLADA | {"weight_tying": True},
    "llada-padded": LLADA | {"embedding_size": 64},
    "dream": _qwen("DreamModel"),
    "a2d-qwen2-tied": _qwen("A2DQwen2LMHeadModel", tie_word_embeddings=True),
    "a2d-qwen3": _qwen(
        "A2DQwen3LMHeadModel",
        head_dim=16,
        rope_theta=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "partial-rotary": _qwen(
        "A2DLlamaLMHeadModel",
        num_attention_heads=4,
        partial_rotary_factor=0.5,
        attention_bias=True,
        mlp_bias=True,
    ),
    "sdar": _qwen("SDARForCausalLM", head_dim=16, block_size=4, num_key_value_heads=3),
}


class Plain:
    """The model of a config.json and its tensors, one sequence at a time, in their dtype."""

    def __init__(self, config, weights):
        self.config, self.weights = config, weights
        c = config
        if "d_model" in c:
            self.hidden, self.heads, self.layers = c["d_model"], c["n_heads"], c["n_layers"]
            self.kv_heads = c["n_kv_heads"] or 1
            self.intermediate = c["mlp_hidden_size"]
            self.rows = c["embedding_size"]
            self.tied = c["weight_tying"]
            self.theta = c["rope_theta"]
            prefix = "model.transformer."
            self.ends = (prefix + "wte", prefix + "ln_f", prefix + "ff_out")
            self.layer = prefix + "blocks.%d."
            self.names = "attn_norm q_proj k_proj v_proj attn_out ff_norm ff_proj up_proj ff_out"
            qkv_bias = c["include_bias"] or c["include_qkv_bias"]
            self.biased = (qkv_bias, c["include_bias"], c["include_bias"], c["include_bias"])
        else:
            self.hidden, self.heads = c["hidden_size"], c["num_attention_heads"]
            self.layers, self.kv_heads = c["num_hidden_layers"], c["num_key_value_heads"]
            self.intermediate, self.rows = c["intermediate_size"], c["vocab_size"]
            self.tied = c["tie_word_embeddings"]
            self.theta = (c.get("rope_parameters") or c)["rope_theta"]
            self.ends = ("model.embed_tokens", "model.norm", "lm_head")
            self.layer = "model.layers.%d."
            self.names = (
                "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj "
                "self_attn.o_proj post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj"
            )
            name = c["architectures"][0]
            always = "Qwen2" in name or "Dream" in name
            said = bool(c.get("attention_bias"))
            self.biased = (always or said, said, bool(c.get("mlp_bias")), False)
        self.names = self.names.split()
        self.head_dim = c.get("head_dim") or self.hidden // self.heads
        self.rotary = int(self.head_dim * c.get("partial_rotary_factor", 1.0))
        self.qk_norm = any(part in c["architectures"][0] for part in ("Qwen3", "SDAR"))
        self.eps = c["rms_norm_eps"]

    def shapes(self):
        """Name and shape of every tensor of the checkpoint."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden, mlp = self.hidden, self.intermediate
        wte, norm, head = self.ends
        shapes = {wte + ".weight": (self.rows, hidden), norm + ".weight": (hidden,)}
        biases = {"head": (head, self.rows)} if self.biased[3] and not self.tied else {}
        if not self.tied:
            shapes[head + ".weight"] = (self.rows, hidden)
        for index in range(self.layers):
            at = self.layer % index
            n1, *qkv, out, n2, gate, up, down = (at + name for name in self.names)
            shapes[n1 + ".weight"] = shapes[n2 + ".weight"] = (hidden,)
            linears = dict.fromkeys(qkv[1:], (kv, hidden)) | {
                qkv[0]: (q, hidden),
                out: (hidden, q),
                gate: (mlp, hidden),
                up: (mlp, hidden),
                down: (hidden, mlp),
            }
            for name, shape in linears.items():
                shapes[name + ".weight"] = shape
                group = 0 if name in qkv else 1 if name == out else 2
                if self.biased[group]:
                    biases[name] = (name, shape[0])
            if self.qk_norm:
                for name in ("q_norm", "k_norm"):
                    shapes[f"{at}self_attn.{name}.weight"] = (self.head_dim,)
        return shapes | {f"{name}.bias": (rows,) for name, rows in biases.values()}

    def linear(self, x, name):
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def norm(self, x, name):
        weight = self.weights[name + ".weight"]
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * weight

    def rotate(self, x, positions):
        """Pair (i, i + rotary / 2) of ``x (T, heads, head_dim)`` turned by the position."""
        half = self.rotary // 2
        speed = torch.tensor([self.theta ** (-i / half) for i in range(half)], dtype=x.dtype)
        angle = positions.to(x.dtype)[:, None, None] * speed
        pairs = torch.complex(x[..., :half], x[..., half : 2 * half])
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((pairs.real, pairs.imag, x[..., 2 * half :]), -1)

    def __call__(self, ids, first=0, frozen=None, block=None):
        """Hidden states, logits, and (keys, values) of every layer for ``ids (T,)`` from ``first``.

        ``frozen`` has (keys, values), each ``(n, heads, head_dim)``, of every layer: what is seen
        besides the ids themselves. ``block``: own keys of later blocks are hidden.
        """
        wte, norm, head = self.ends
        x, kept = self.weights[wte + ".weight"][ids], []
        positions = torch.arange(first, first + len(ids))
        for index in range(self.layers):
            at = self.layer % index
            n1, q, k, v, out, n2, gate, up, down = (at + name for name in self.names)
            h = self.norm(x, n1)
            q, k, v = (
                self.linear(h, name).reshape(len(ids), -1, self.head_dim) for name in (q, k, v)
            )
            if self.qk_norm:
                q, k = self.norm(q, at + "self_attn.q_norm"), self.norm(k, at + "self_attn.k_norm")
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            kept.append((k, v))
            hidden = torch.zeros(len(ids), len(ids), dtype=torch.bool)
            if block is not None:
                hidden = positions // block > (positions // block)[:, None]
            if frozen is not None:
                k, v = (torch.cat(pair) for pair in zip((k, v), frozen[index], strict=True))
                hidden = F.pad(hidden, (0, len(k) - len(ids)))
            rows = []
            for one in range(self.heads):
                kv = one * self.kv_heads // self.heads
                scores = q[:, one] @ k[:, kv].T / self.head_dim**0.5
                rows.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[:, kv])
            x = x + self.linear(torch.cat(rows, -1), out)
            h = self.norm(x, n2)
            x = x + self.linear(F.silu(self.linear(h, gate)) * self.linear(h, up), down)
        hidden = self.norm(x, norm)
        logits = self.linear(hidden, wte if self.tied else head)
        return hidden, logits[..., : self.config["vocab_size"]], kept


def random_plain(config, seed=0, dtype=torch.float64):
    """Random weights, wide enough that arg-maxes differ; norms around one."""
    plain = Plain(config, {})
    generator = torch.Generator().manual_seed(seed)
    for name, shape in plain.shapes().items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.25
        is_norm = len(shape) == 1 and name.endswith(".weight")
        plain.weights[name] = (values + 1 if is_norm else values).to(dtype)
    return plain


def write_checkpoint(folder, plain, shards=1):
    """The checkpoint as a directory; more than one shard gets an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(plain.config))
    names = list(plain.weights)
    if shards == 1:
        save_file(plain.weights, folder / "model.safetensors")
        return folder
    where = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: plain.weights[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
