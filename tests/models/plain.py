"""An independent forward of one sequence, and random checkpoints to run it on.

Plain torch from a checkpoint's tensors and config.json: no fused weights, no cache layout, no
batch, rotation as a product of complex numbers. Nothing is shared with the package.
"""

from __future__ import annotations

import json
import math

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
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
# Families of 2025 and 2026; each stands for a row of the table in docs/models.md.
RECENT = {
    "nemotron": _qwen(
        "NemotronLabsDiffusionModel",
        head_dim=16,
        block_size=4,
        rope_theta=None,
        use_sliding_window=None,
        rope_parameters=_YARN,
    ),
    "nemotron-base": _qwen(
        "NemotronLabsDiffusionModel",
        head_dim=16,
        block_size=4,
        rope_theta=None,
        use_sliding_window=None,
        rope_parameters=_YARN | {"factor": 0.25},
    ),
    "diff-encoder": _qwen("DiffEncoderModel", head_dim=16, block_size=4, use_sliding_window=None),
    "fast-dllm-v2": _qwen("Fast_dLLM_QwenForCausalLM", bd_size=8, tie_word_embeddings=True),
    "stable-diffcoder": _qwen("StableDiffcoderForCausalLM", mask_token_id=None, eos_token_id=2),
    "a2d-bd3lm": _qwen("A2DQwen3LMHeadModel", head_dim=16, block_size=8),
    "coda": _qwen("CoDALanguageModel", head_dim=16, tie_word_embeddings=None),
    "llama3": _qwen(
        "LlamaForCausalLM",
        use_sliding_window=None,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": _qwen("MistralForCausalLM", head_dim=16, sliding_window=5, use_sliding_window=None),
    "qwen2-sliding": _qwen(
        "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen2-yarn": _qwen(
        "Qwen2ForCausalLM",
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
}
CAUSAL = ("nemotron", "nemotron-base", "llama3", "mistral", "qwen2-sliding", "qwen2-yarn")


def speeds(config, rotary):
    """Angle a position of every pair of dimensions, and the factor on cos and sin."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta") or config["rope_theta"]
    plain = [theta ** (-2 * i / rotary) for i in range(rotary // 2)]
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return plain, 1.0
    factor, old = scaling["factor"], scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        result = []
        for speed in plain:
            wavelength = 2 * math.pi / speed
            if wavelength < old / high:
                result.append(speed)
            elif wavelength > old / low:
                result.append(speed / factor)
            else:
                smooth = (old / wavelength - low) / (high - low)
                result.append((1 - smooth) * speed / factor + smooth * speed)
        return result, 1.0
    assert kind == "yarn"
    # The pair whose wavelength is old / turns, from the definition of its speed.
    low, high = (-rotary / 2 * math.log(2 * math.pi * turns / old, theta) for turns in (32, 1))
    low, high = max(math.floor(low), 0), min(math.ceil(high), rotary - 1)
    result = []
    for i, speed in enumerate(plain):
        part = min(max((i - low) / (high - low or 0.001), 0), 1)
        result.append(speed * (1 - part) + speed / factor * part)
    both = scaling.get("mscale") and scaling.get("mscale_all_dim")
    return result, 1.0 if both or factor <= 1 else 0.1 * math.log(factor) + 1


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
            self.tied = c.get("tie_word_embeddings", "CoDA" in c["architectures"][0])
            self.ends = ("model.embed_tokens", "model.norm", "lm_head")
            self.layer = "model.layers.%d."
            if any(part in c["architectures"][0] for part in ("Nemotron", "DiffEncoder")):
                self.ends = ("encoder.embed_tokens", "encoder.norm", "diffusion_head")
                self.layer = "encoder.layers.%d."
            self.names = (
                "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj "
                "self_attn.o_proj post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj"
            )
            name = c["architectures"][0]
            always = any(part in name for part in ("Qwen2", "Dream", "Fast_dLLM"))
            said = bool(c.get("attention_bias"))
            self.biased = (always or said, said, bool(c.get("mlp_bias")), False)
        self.names = self.names.split()
        self.head_dim = c.get("head_dim") or self.hidden // self.heads
        self.rotary = int(self.head_dim * c.get("partial_rotary_factor", 1.0))
        qk_norm = ("Qwen3", "SDAR", "DiffEncoder", "CoDA")
        self.qk_norm = any(part in c["architectures"][0] for part in qk_norm)
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
        speed, factor = speeds(self.config, self.rotary)
        angle = positions.to(x.dtype)[:, None, None] * torch.tensor(speed, dtype=x.dtype)
        pairs = torch.complex(x[..., :half], x[..., half : 2 * half])
        pairs = pairs * torch.polar(torch.full_like(angle, factor), angle)
        return torch.cat((pairs.real, pairs.imag, x[..., 2 * half :]), -1)

    def query_scale(self, positions):
        scaling = self.config.get("rope_parameters") or {}
        if "llama_4_scaling_beta" not in scaling:
            return 1.0
        turns = positions // scaling["original_max_position_embeddings"]
        return (1 + scaling["llama_4_scaling_beta"] * torch.log(1 + turns.double()))[:, None, None]

    def slides(self, layer):
        """The sliding window of a layer, or None."""
        c = self.config
        if "Mistral" in c["architectures"][0]:
            return c.get("sliding_window")
        if "Qwen" in c["architectures"][0] and c.get("use_sliding_window"):
            return c["sliding_window"] if layer >= c["max_window_layers"] else None
        return None

    def __call__(
        self, ids, first=0, frozen=None, block=None, causal=False, offset=0, at=None, seen=None
    ):
        """Hidden states, logits, and (keys, values) of every layer for ``ids (T,)`` from ``first``.

        ``frozen`` has (keys, values), each ``(n, heads, head_dim)``, of every layer: what is seen
        besides the ids themselves. ``block``: own keys of later blocks are hidden, blocks counted
        from ``-offset``. ``causal``: own keys of later positions are, and in sliding layers those
        too far back. ``at (T,)`` and ``seen (T, T)``: other positions, and which own keys each row
        sees.
        """
        wte, norm, head = self.ends
        x, kept = self.weights[wte + ".weight"][ids], []
        positions = torch.arange(first, first + len(ids)) if at is None else at
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
            q = q * self.query_scale(positions)
            kept.append((k, v))
            hidden = torch.zeros(len(ids), len(ids), dtype=torch.bool)
            if block is not None:
                own = (positions + offset) // block
                hidden = own > own[:, None]
            away = positions[:, None] - positions
            if causal:
                hidden = away < 0
            if seen is not None:
                hidden = ~seen
            if self.slides(index) is not None:
                reach = self.slides(index)
                hidden = hidden | (away >= reach if causal else away.abs() > reach)
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
