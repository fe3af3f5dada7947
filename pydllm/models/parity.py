"""A loaded model against the module whose weights it shares, and what loading does to modules."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pydllm._backend.errors import CheckpointError
from pydllm.models.checkpoint import Shards
from pydllm.models.families import Names, Sizes
from pydllm.models.native import NativeModel
from pydllm.models.weights import Slot

_BATCH, _TOKENS = 2, 16
_SHOWN = 3


@dataclass(frozen=True)
class Parity:
    """How far a model's logits are from those of a module.

    Attributes:
        difference: the largest absolute difference of two logits.
        largest: the module's largest absolute logit.
        relative: norm of the differences over the norm of the module's logits.
        limit: what ``relative`` may be: 32 roundings a layer in the model's dtype, at most 1/4.
    """

    difference: float
    largest: float
    relative: float
    limit: float

    def __str__(self) -> str:
        return (
            f"largest difference {self.difference:.3e} of logits up to {self.largest:.3e}, "
            f"relative {self.relative:.3e} (allowed {self.limit:.3e})"
        )


@torch.no_grad()
def check(
    model: NativeModel, module: nn.Module, *, ids: Tensor | None = None, backend: str | None = None
) -> Parity:
    """Compare a model's logits with those of a module's own forward.

    Args:
        model: from ``load``, of ``module`` or of the checkpoint that it came from.
        module: in eval mode. It is called with the ids alone where that makes it see what ``model``
            sees, and otherwise with a 4-D mask.
        ids: ``(B, T)`` int64; None: 2 x 16 random ones.
        backend: as in ``pydllm.ops``.

    Returns:
        The differences; ``str`` of it is a sentence.

    Raises:
        CheckpointError: the logits do not agree: a forward is not what its weights say. On
            transformers 5 it may well be the module's, see ``load``.
        ValueError: the module is in training mode, or ids do not fit.
    """
    name = type(module).__name__
    if module.training:
        raise ValueError(f"module: expected {name} in eval mode, got it in training mode")
    spec = model.spec
    if ids is None:
        size = spec.block_size or 1
        length = max(min(_TOKENS, spec.max_positions) // size, 1) * size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(spec.vocab_size, (_BATCH, length), generator=generator)
        ids = ids.to(model.device)
    batch, length = ids.shape
    zero, whole = (
        torch.full((batch,), n, dtype=torch.int32, device=model.device) for n in (0, length)
    )
    hidden = model.forward(
        ids,
        zero,
        model.new_cache(batch, 0),
        length=whole,
        kv_len=whole,
        commit=zero,
        backend=backend,
    )
    got = model.head(hidden).double()
    expected = _logits(module(ids, **_mask(model, module, length)))[..., : got.shape[-1]].double()
    if got.shape != expected.shape:
        raise CheckpointError(
            f"{name}: expected logits {tuple(got.shape)}, found {tuple(expected.shape)}"
        )
    eps = torch.finfo(model.dtype).eps
    parity = Parity(
        difference=(got - expected).abs().max().item(),
        largest=expected.abs().max().item(),
        relative=((got - expected).norm() / expected.norm()).item(),
        limit=min(32 * (model.sizes.layers + 1) * eps, 0.25),
    )
    if not parity.relative <= parity.limit:
        raise CheckpointError(f"{name}: its forward is not that of its weights: {parity}")
    return parity


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def _mask(model: NativeModel, module: nn.Module, length: int) -> dict[str, Tensor]:
    """The arguments with which a module sees what the model does."""
    spec, device = model.spec, model.device
    if spec.block_size is not None:  # SDAR: 1 is visible
        block = torch.arange(length, device=device) // spec.block_size
        return {"attention_mask": (block <= block[:, None])[None, None].to(model.dtype)}
    causal = any(
        kind.__name__.startswith(("Qwen2", "Qwen3", "Llama")) for kind in type(module).__mro__
    ) and not type(module).__name__.startswith("A2D")
    if spec.attention == "full" and causal:  # nothing hidden, in the words of transformers
        return {"attention_mask": torch.zeros(1, 1, length, length, dtype=model.dtype)}
    return {}


def warn_of_damage(
    module: nn.Module,
    config: Any,
    names: Names,
    sizes: Sizes,
    wanted: Sequence[Slot],
    state: Mapping[str, Tensor],
) -> None:
    """Warn of what transformers 5 does to modules in silence.

    Rotary buffers that are uninitialised memory after ``from_pretrained`` of classes with their own
    ``_init_weights`` (the model here has its own tables and does not mind, the module's forward
    does), and weights that were drawn anew after they were loaded, which both mind.
    """
    name = type(module).__name__
    frequency = sizes.rope.frequencies()
    broken = [
        key
        for key, buffer in module.named_buffers()
        if key.endswith("inv_freq")
        and buffer.shape == frequency.shape
        and buffer.device.type != "meta"
        # bf16 keeps 8 bits; uninitialised memory is off by more.
        and not torch.allclose(buffer.double().cpu(), frequency, rtol=2**-7, atol=0)
    ]
    if broken:
        warnings.warn(
            f"{name}: {_some(broken)} is not that of rope_theta {sizes.rope.theta:g}: the module's "
            "own forward is wrong (transformers 5 leaves rotary buffers uninitialised where a "
            "class has its own _init_weights); pydllm's is not, it computes its own tables",
            RuntimeWarning,
            stacklevel=4,
        )
    folder = _folder(config)
    if folder is None:
        return
    try:
        shards = Shards(folder)
        if sizes.moe is not None:
            shards.read_layout(names, sizes, str(folder))
    except CheckpointError:  # the module did not come from there
        return
    keys = [key for slot in wanted for key, _ in slot.sources if key in shards.found]
    changed = [key for key in keys if not _same_row(shards, key, state[key])]
    if changed:
        warnings.warn(
            f"{name}: {len(changed)} of {len(keys)} tensors are not those of {folder}: "
            f"{_some(changed)}. Unless they were changed on purpose, transformers (5.0 to 5.12, a "
            "class used directly) drew them anew after loading: give pydllm.load the directory",
            RuntimeWarning,
            stacklevel=4,
        )


def _folder(config: Any) -> Path | None:
    """The directory that a module was loaded from, if it is one."""
    path = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None)
    if not isinstance(path, str) or not path or not Path(path).is_dir():
        return None
    return Path(path)


def _same_row(shards: Shards, key: str, tensor: Tensor) -> bool:
    """Whether the first row of a matrix, or the whole of a vector, is the stored one."""
    if tensor.device.type == "meta" or shards.found[key].shape != tuple(tensor.shape):
        return True  # another check's business
    stored = shards.rows(key, 1 if tensor.ndim > 1 else len(tensor))
    return torch.equal(tensor.detach()[: len(stored)].cpu(), stored.to(tensor.dtype))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
