"""The same weights in a class of transformers, whose forward a model's is compared with.

Every dense family is a Llama, Qwen 2, Qwen 3 or Ministral 3 under another name and another mask; a
mixture of experts whose router is a softmax is a Qwen 3 MoE.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pydllm._backend.errors import PydllmError
from pydllm.models.checkpoint import Shards, read_config
from pydllm.models.families import LLAMA_NAMES, Sizes, find_family
from pydllm.models.rope import rope_section
from pydllm.models.weights import slots

_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Trunk:
    """A module of transformers with a checkpoint's weights, called with any mask.

    Attributes:
        name: of its class.
        module: in eval mode.

    Raises:
        PydllmError: transformers is missing, or has no such class; says which.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        try:
            import transformers
        except ImportError as error:
            raise PydllmError(f"transformers cannot be imported ({error})") from error
        config = read_config(folder)
        family = find_family(config)
        sizes = family.sizes(config, family)
        config = config if family.prepare is None else family.prepare(config)
        kind = _kind(sizes)
        self.name = f"{kind}ForCausalLM"
        if not hasattr(transformers, self.name):
            raise PydllmError(f"transformers {transformers.__version__} has no {self.name}")
        values = _values(sizes)
        section = rope_section(config)
        theta = section if section.get("rope_theta") is not None else config
        values["rope_theta"] = theta.number("rope_theta")
        rope = {key: section.get(key) for key in sorted(section.keys()) if key != "rope_theta"}
        if sizes.query_scale is not None:
            values["rope_parameters"] = rope | {"rope_theta": values["rope_theta"]}
        elif rope.keys() - {"partial_rotary_factor"}:
            values["rope_scaling"] = rope
        for key in ("max_position_embeddings", "partial_rotary_factor"):
            if config.get(key) is not None:
                values[key] = config.get(key)
        values["attn_implementation"] = "eager"
        settings = getattr(transformers, f"{kind}Config")(**values)
        with torch.device("meta"):
            module = getattr(transformers, self.name)(settings)
        shards = Shards(folder)
        if sizes.moe is not None:
            shards.read_layout(family.names, sizes, str(folder))
            if hasattr(module, "set_experts_implementation"):
                module.set_experts_implementation("eager")
        state: dict[str, Tensor] = {}
        own, theirs = slots(family.names, sizes), slots(LLAMA_NAMES, sizes)
        for mine, other in zip(own, theirs, strict=True):
            for (name, _), (renamed, _) in zip(mine.sources, other.sources, strict=True):
                state[renamed] = shards.tensor(name).to(device, dtype)
        _fuse_experts(module, state)
        module.load_state_dict(state, strict=False, assign=True)
        if sizes.tied:
            module.lm_head.weight = module.model.embed_tokens.weight
        left = [name for name, tensor in module.named_parameters() if tensor.is_meta]
        if left:
            raise PydllmError(f"{self.name}: no weights for {left[0]}")
        # Its buffers are no part of the state: made anew, on the device.
        module.model.rotary_emb = type(module.model.rotary_emb)(config=settings).to(device)
        self.module: nn.Module = module.eval()
        self._dtype = dtype
        self._slides = bool(sizes.sliding_windows)

    @torch.no_grad()
    def logits(self, ids: Tensor, visible: Tensor) -> Tensor:
        """``(B, T, embeddings)`` of ``ids (B, T)``; ``visible (T, T)`` bool, query by key."""
        options: dict[str, Any] = {}
        if not self._slides:  # those narrow the causal mask by themselves, and take no other
            mask = torch.zeros(visible.shape, dtype=self._dtype, device=ids.device)
            mask = mask.masked_fill(~visible, torch.finfo(mask.dtype).min)
            options["attention_mask"] = mask.expand(len(ids), 1, -1, -1)
        return self.module(ids, **options).logits


def _kind(sizes: Sizes) -> str:
    if sizes.moe is not None:
        if sizes.moe.sigmoid or sizes.moe.shared or not sizes.qk_norm or sizes.qkv_bias:
            raise PydllmError("transformers has no such mixture of experts")
        return "Qwen3Moe"
    if sizes.head_bias:
        raise PydllmError("transformers has no such class with a bias of the head")
    if sizes.rope.rotary != sizes.head_dim:
        raise PydllmError("transformers has no such class whose heads rotate in part")
    if sizes.query_scale is not None:
        return "Ministral3"
    if sizes.qk_norm:
        return "Qwen3"
    if sizes.sliding_windows and not sizes.qkv_bias:
        return "Mistral"
    return "Qwen2" if sizes.qkv_bias and not sizes.out_bias else "Llama"


def _values(sizes: Sizes) -> dict[str, Any]:
    """The keys of a configuration in transformers."""
    values: dict[str, Any] = {
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.intermediate,
        "vocab_size": sizes.embeddings,
        "rms_norm_eps": sizes.eps,
        "tie_word_embeddings": sizes.tied,
        "pad_token_id": None,
    }
    if not (sizes.qkv_bias and not sizes.out_bias):
        values |= {"attention_bias": sizes.qkv_bias, "mlp_bias": sizes.mlp_bias}
    if sizes.sliding_windows:
        width = next(width for width in sizes.sliding_windows if width is not None)
        kinds = [
            "full_attention" if window is None else "sliding_attention"
            for window in sizes.sliding_windows
        ]
        values |= {"sliding_window": width, "use_sliding_window": True, "layer_types": kinds}
    if sizes.moe is not None:
        values |= {
            "num_experts": sizes.moe.experts,
            "num_experts_per_tok": sizes.moe.top_k,
            "moe_intermediate_size": sizes.moe.width,
            "norm_topk_prob": sizes.moe.renormalize,
            "mlp_only_layers": [i for i, sparse in enumerate(sizes.moe.sparse) if not sparse],
            "decoder_sparse_step": 1,
        }
    return values


def _fuse_experts(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Stack the experts of a layer where the module does (transformers 5)."""
    for name, tensor in module.state_dict().items():
        for fused, parts in _FUSED.items():
            if name.endswith(f"experts.{fused}"):
                prefix = name.removesuffix(fused)
                experts = [
                    torch.cat([state.pop(f"{prefix}{i}.{part}.weight") for part in parts])
                    for i in range(tensor.shape[0])
                ]
                state[name] = torch.stack(experts)
