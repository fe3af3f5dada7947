"""What a module's own forward does besides its weights: hooks, replaced forwards, other layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from pydllm._backend.errors import CheckpointError

_PATCHED = "_pydllm_patched"  # set by pydllm.patch: the same computation on other kernels
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# accelerate's hooks that move inputs; offloaded weights are on the meta device and refused there.
_ACCELERATE = ("ModelHook", "AlignDevicesHook", "SequentialHook")
_LAYERS = (nn.Linear, nn.Embedding)


def check_unhooked(module: nn.Module) -> None:
    """Raise where a loaded module computes something that its weights do not tell.

    A native model takes weights alone: a forward hook, a forward that was replaced on an instance
    and a Linear or Embedding with a forward of its own would be left out. accelerate's hooks on one
    device, transformers' hooks that record outputs and ``pydllm.patch`` change no result.

    Raises:
        CheckpointError: names the submodule and the way out.
    """
    root = type(module).__name__
    for name, part in module.named_modules():
        reason = _reason(part)
        if reason is not None:
            raise CheckpointError(
                f"{root}: {name or 'the module'}: expected a module that computes what its class "
                f"does, found {reason}, which would be left out; pydllm.patch(module) keeps it"
            )


def _reason(part: nn.Module) -> str | None:
    for kind in _HOOKS:
        for hook in getattr(part, kind).values():
            if not getattr(hook, "__module__", "").startswith("transformers.utils."):
                hook_name = getattr(hook, "__qualname__", type(hook).__name__)
                return f"the {kind.strip('_').replace('_', ' ').rstrip('s')} {hook_name}"
    replaced = "forward" in part.__dict__ and _PATCHED not in part.__dict__
    if replaced and not _moves_inputs(part):
        return "a forward that was replaced"
    for layer in _LAYERS:
        if isinstance(part, layer) and type(part).forward is not layer.forward:
            return f"{type(part).__name__}, a {layer.__name__} with a forward of its own"
    return None


def _moves_inputs(part: Any) -> bool:
    """Whether the forward is accelerate's wrapper around the class's own, with its own hooks."""
    wrapper = getattr(part.__dict__["forward"], "func", None)
    inner = getattr(part.__dict__.get("_old_forward"), "__func__", None)
    hooks = [part.__dict__.get("_hf_hook")]
    hooks += getattr(hooks[0], "hooks", ())
    return (
        getattr(wrapper, "__module__", None) == "accelerate.hooks"
        and inner is type(part).forward
        and all(
            type(hook).__module__ == "accelerate.hooks" and type(hook).__name__ in _ACCELERATE
            for hook in hooks
        )
    )
