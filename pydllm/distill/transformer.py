"""The transformer that is trained: plain modules whose ``state_dict`` is the checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pydllm.models.checkpoint import Shards, read_config
from pydllm.models.families import Family, Sizes, find_family
from pydllm.models.load import find_mask
from pydllm.models.overrides import make_spec
from pydllm.models.spec import ModelSpec
from pydllm.models.tokenizer import read_tokenizer
from pydllm.models.weights import check_tensors, slots


class Transformer(nn.Module):
    """A diffusion language model of any family that ``pydllm.load`` reads, differentiable.

    ``pydllm.models.NativeModel`` decodes and has no backward pass; this is the same forward over
    modules with the checkpoint's names and shapes, so that what was trained is saved as it stands.
    Shapes: ``B`` sequences, ``S`` positions, ``D`` hidden width.
    """

    def __init__(self, family: Family, sizes: Sizes, spec: ModelSpec) -> None:
        super().__init__()
        self.family, self.sizes, self.spec = family, sizes, spec
        shapes = {
            name: shape for slot in slots(family.names, sizes) for name, shape in slot.sources
        }
        for name, shape in shapes.items():
            path, _, kind = name.rpartition(".")
            if kind == "bias":
                continue
            module: nn.Module
            if path == family.names.embedding:
                module = nn.Embedding(shape[0], shape[1])
            elif len(shape) == 1:
                module = nn.RMSNorm(shape[0], sizes.eps)
            else:
                module = nn.Linear(shape[1], shape[0], bias=f"{path}.bias" in shapes)
            self._put(path, module)

    def _put(self, path: str, module: nn.Module) -> None:
        """Register a module under a dotted path, with containers where there are none."""
        *parents, name = path.split(".")
        place: nn.Module = self
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        place.add_module(name, module)

    def _at(self, path: str) -> Any:
        return self.get_submodule(path)

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``(vocab_size, D)`` and bias of the head; rows past the vocabulary left out."""
        names, vocab = self.family.names, self.spec.vocab_size
        head = self._at(names.embedding if self.sizes.tied else names.head)
        bias = getattr(head, "bias", None)
        return head.weight[:vocab], None if bias is None else bias[:vocab]

    def linear_names(self) -> str:
        """A regular expression that matches every projection of every layer, and nothing else.

        Whole paths, since LLaDA calls its head and its down-projections alike.
        """
        names = self.family.names
        inner = [*names.qkv, names.out, *names.gate_up, names.down]
        layer = re.escape(names.layer).replace(r"\{\}", r"\d+")
        return f"{layer}({'|'.join(map(re.escape, inner))})"

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states ``(B, S, D)``, final norm applied.

        Args:
            ids: ``(B, S)`` int64.
            lengths: ``(B,)``, positions in use; those after them are seen by nobody.
        """
        names, sizes = self.family.names, self.sizes
        place = torch.arange(ids.shape[1], device=ids.device)
        visible = (place < lengths[:, None])[:, None, None, :]
        x = self._at(names.embedding)(ids)
        angle = place[:, None] * sizes.rope.frequencies().to(ids.device)
        wide, factor = torch.promote_types(x.dtype, torch.float32), sizes.rope.attention_factor
        cos, sin = ((t * factor).to(wide) for t in (angle.cos(), angle.sin()))
        for index in range(sizes.layers):
            layer = names.layer.format(index)
            x = x + self._attend(layer, self._at(layer + names.attn_norm)(x), cos, sin, visible)
            h = self._at(layer + names.mlp_norm)(x)
            gate, up = (self._at(layer + name)(h) for name in names.gate_up)
            x = x + self._at(layer + names.down)(F.silu(gate) * up)
        return self._at(names.norm)(x)

    def _attend(self, layer: str, h: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        names, head_dim = self.family.names, self.sizes.head_dim
        q, k, v = (self._at(layer + name)(h).unflatten(-1, (-1, head_dim)) for name in names.qkv)
        if self.sizes.qk_norm:
            q = self._at(layer + "self_attn.q_norm")(q)
            k = self._at(layer + "self_attn.k_norm")(k)
        q, k, v = (t.transpose(1, 2) for t in (_rotate(q, cos, sin), _rotate(k, cos, sin), v))
        grouped = self.sizes.heads != self.sizes.kv_heads
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)
        return self._at(layer + names.out)(attended.transpose(1, 2).flatten(-2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x (B, S, H, d)``; ``cos`` and ``sin`` are ``(S, rotary / 2)``."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
    return torch.cat((rotated, rest), -1)


def load_transformer(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """The transformer of a checkpoint, its weights in ``dtype``.

    Raises:
        CheckpointError: as ``pydllm.load``.
        ValueError: a model whose attention is not full: distillation trains with the whole
            sequence in sight, which a causal or block-causal model does not have.
    """
    config = read_config(folder)
    family = find_family(config)
    sizes = family.sizes(config, family)
    mask = find_mask(read_tokenizer(folder), sizes.embeddings)
    spec = make_spec(config, family, sizes, mask)
    if sizes.moe is not None:
        raise ValueError(f"{folder}: expected a dense model, got a mixture of experts")
    if spec.attention != "full":
        raise ValueError(f"{folder}: expected a model with full attention, got {spec.attention!r}")
    shards = Shards(folder)
    wanted = list(slots(family.names, sizes))
    check_tensors(wanted, shards.found, family.names, str(folder))
    with torch.device("meta"):
        model = Transformer(family, sizes, spec)
    state = {
        name: shards.tensor(name).to(device, dtype) for slot in wanted for name, _ in slot.sources
    }
    model.load_state_dict(state, assign=True)
    return model.train()
