"""Models of published shapes with random weights, and the bundled ones: nothing is downloaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click
import torch

import pydllm
from pydllm.demo import VERIFIER, WEIGHTS
from pydllm.models import NativeModel
from pydllm.models.config import Config
from pydllm.models.families import find_family
from pydllm.models.overrides import make_spec
from pydllm.models.weights import slots

_LLADA = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 500000.0,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
}
_LLADA2 = {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}
CONFIGS = {
    "llada2-mini": _LLADA2
    | {
        "vocab_size": 157184,
        "hidden_size": 2048,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "num_experts": 256,
        "mask_token_id": 156895,
        "eos_token_id": 156892,
    },
    "llada2-200m": _LLADA2
    | {
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 1280,
        "moe_intermediate_size": 256,
        "num_experts": 64,
        "mask_token_id": 8190,
        "eos_token_id": 8189,
    },
    "llada-100m": _LLADA
    | {"d_model": 768, "n_heads": 12, "n_kv_heads": 12, "n_layers": 12, "mlp_hidden_size": 2048},
    "llada-8b": _LLADA
    | {"d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288},
    "dream-7b": {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "mask_token_id": 151666,
        "eos_token_id": 151643,
    },
    "sdar-8b": {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "mask_token_id": 151669,
        "eos_token_id": 151643,
        "block_size": 32,
    },
}


# Verifiers: Qwen2.5-0.5B's shape, and a small one for the small model.
_QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
}
_SMALL_QWEN = _QWEN | {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}


def make_model(name: str, device: str, dtype: torch.dtype) -> NativeModel:
    """The bundled model, or one of the named shape with random weights."""
    if name == "tiny":
        return pydllm.load(WEIGHTS, device=device, dtype=dtype)
    check_memory(name, device, dtype)
    return random_model(CONFIGS[name], device, dtype)


def make_verifier(name: str, device: str, dtype: torch.dtype) -> NativeModel:
    if name == "tiny":
        return pydllm.load(VERIFIER, device=device, dtype=dtype)
    shape = _SMALL_QWEN if name == "llada-100m" else _QWEN
    vocab = {"vocab_size": CONFIGS[name]["vocab_size"]}
    return random_model(shape | vocab, device, dtype)


def check_memory(name: str, device: str, dtype: torch.dtype) -> None:
    """Refuse a shape whose weights do not fit, before the machine runs out of memory."""
    config = Config(CONFIGS[name])
    family = find_family(config)
    wanted = sum(
        math.prod(slot.shape) * slot.dtype(dtype).itemsize
        for slot in slots(family.names, family.sizes(config, family))
    )
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info(device)[0]
    elif not Path("/proc/meminfo").exists():
        return
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    if wanted > free:
        raise click.UsageError(
            f"--model {name}: expected {wanted / 1e9:.1f} GB of free memory on {device} for its "
            f"{dtype} weights, got {free / 1e9:.1f} GB"
        )


def random_model(settings: dict[str, Any], device: str, dtype: torch.dtype) -> NativeModel:
    config = Config(settings)
    family = find_family(config)
    sizes = family.sizes(config, family)
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
    weights = {}
    for slot in slots(family.names, sizes):
        tensor = torch.empty(slot.shape, dtype=slot.dtype(dtype), device=device)
        if tensor.ndim == 2:
            tensor.normal_(0.0, 0.02, generator=generator)
        elif slot.name.endswith("norm"):
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 0.1, generator=generator)
        weights[slot.name] = tensor
    spec = make_spec(config, family, sizes, None)
    return NativeModel(spec, sizes, weights)
