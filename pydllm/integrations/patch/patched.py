"""``patch``: the handle it returns, and the report of what it did."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from pydllm._backend import env
from pydllm._backend.dispatch import triton_missing
from pydllm._backend.errors import PydllmError
from pydllm._checks import check_bool
from pydllm.integrations.patch.attention import Options
from pydllm.integrations.patch.families import SUPPORTED, Found, changes

_LOGGER = logging.getLogger("pydllm.patch")
_HANDLE = "_pydllm_patched"  # of a patched model
_LOCK = threading.RLock()
_MISSING = object()


@dataclass(frozen=True)
class Report:
    """What a patch did.

    Attributes:
        replaced: the modules whose computation is another now.
        left: the modules that were recognised and stay as they are; ``reason`` says why.
        calls: what became of the calls so far: by op, or ``"as before: <reason>"``.
    """

    replaced: tuple[Found, ...]
    left: tuple[Found, ...]
    calls: dict[str, int]

    def __str__(self) -> str:
        lines = []
        for found, title in ((self.replaced, "replaced"), (self.left, "left as it is")):
            counts = Counter((f.kind, f.part, f.op, f.reason) for f in found)
            for (kind, part, op, reason), count in counts.items():
                means = f"{part} -> {op}" if title == "replaced" else part
                why = f" ({reason})" if reason else ""
                lines.append(f"{title}: {count} x {kind}: {means}{why}")
        if self.calls:
            said = ", ".join(f"{what} {count}" for what, count in sorted(self.calls.items()))
            lines.append(f"calls: {said}")
        return "\n".join(lines)


class Patched:
    """A patched model; ``restore`` or the end of a ``with`` puts everything back.

    Attributes:
        model: the model.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model, self._options = model, options
        self._found: list[Found] = []
        self._undo: list[tuple[nn.Module, str, Any, Any]] = []
        self._entered, self.active = 0, False

    @property
    def report(self) -> Report:
        """What was replaced and what was not, and what became of the calls until now."""
        with self._options.lock:
            calls = dict(self._options.calls)
        replaced = tuple(found for found in self._found if found.op is not None)
        return Report(replaced, tuple(f for f in self._found if f.op is None), calls)

    def restore(self) -> None:
        """Put everything back; does nothing where that has happened."""
        with _LOCK:
            if not self.active:
                return
            self.active = False
            for module, name, before, ours in reversed(self._undo):
                if module.__dict__.get(name) is not ours:
                    kind = type(module).__name__
                    _LOGGER.warning("%s.%s was replaced after us and stays so", kind, name)
                elif before is _MISSING:
                    del module.__dict__[name]
                else:
                    module.__dict__[name] = before
            self._undo.clear()

    def __enter__(self) -> Patched:
        with _LOCK:
            if not self.active:
                raise PydllmError("this patch was restored: call pydllm.patch again")
            self._entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        with _LOCK:
            self._entered -= 1
            if self._entered <= 0:
                self.restore()

    def __repr__(self) -> str:
        state = "patched" if self.active else "restored"
        return f"{state} {type(self.model).__name__}\n{self.report}"

    def __reduce_ex__(self, _: Any) -> NoReturn:
        raise PydllmError("a patched model cannot be copied or pickled: restore it first")

    def _install(self) -> None:
        self.active = True
        try:
            for found, wanted in changes(self.model, self._options):
                self._found.append(found)
                for module, name, ours in wanted:
                    self._set(module, name, ours)
                    self._set(module, _HANDLE, self)
            self._set(self.model, _HANDLE, self)
        except BaseException:
            self.restore()
            raise

    def _set(self, module: nn.Module, name: str, ours: Any) -> None:
        before = module.__dict__.get(name, _MISSING)
        if before is not ours:
            module.__dict__[name] = ours
            self._undo.append((module, name, before, ours))


def patch(model: nn.Module, *, self_check: bool = False, backend: str | None = None) -> Patched:
    """Let a loaded model's attention, norms and gates run on pydllm's ops, as it stands.

    The model's own code goes on running: its forward, its cache, its generate. What is replaced are
    calls inside of it, on this instance alone: no class, no import and no other model changes, and
    ``restore`` puts back what was there. See ``docs/patch.md`` for what is replaced where.

    Args:
        model: LLaDA, Dream, SDAR, LLaDA-MoE, Fast-dLLM v2, A2D, LLaDA2, DiffusionGemma, any model
            of transformers with ``attn_implementation="sdpa"``, or one whose modules named
            ``*Attention`` call ``scaled_dot_product_attention``.
        self_check: compare the first call of everything replaced with the original, both against
            fp64, and raise where the replacement is off by more than twice the original's error.
        backend: of the ops; None takes ``PYDLLM_BACKEND`` (default ``auto``). With ``auto`` a model
            on a CPU keeps what the torch backend does no faster: all but attention with fewer KV
            heads than query heads. A backend by name replaces everything, and a call that it cannot
            run raises BackendError.

    Returns:
        The handle: ``restore()``, a context manager, ``report``. Patching a patched model returns
        its handle.

    Raises:
        PydllmError: nothing was recognised, or the model is compiled already.
        TypeError: no module.
        ValueError: no backend's name, or other options than those the model is patched with.

    A call stays as it was where a gradient is wanted, under autocast and with dropout, and where a
    mask hides what the op has no argument for. Rows of padding come out as zeros. Calls may come
    from any thread.

    Example:
        >>> with patch(model):  # doctest: +SKIP
        ...     out = generate(model, prompt)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    wanted = env.BACKEND if backend is None else backend
    if wanted not in env.BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(env.BACKENDS)}, got {wanted!r}")
    check_bool("self_check", self_check)
    with _LOCK:
        held = model.__dict__.get(_HANDLE)
        if held is not None and held.model is model:
            if (held._options.wanted, held._options.self_check) != (wanted, self_check):
                raise ValueError(
                    f"model: expected backend {held._options.wanted!r} and self_check "
                    f"{held._options.self_check}, as it is patched, got {wanted!r} and "
                    f"{self_check} (restore it first)"
                )
            return held
        for name, module in model.named_modules():
            if _compiled(module):
                raise PydllmError(f"{name or 'model'}: expected no compiled module: patch first")
            other = module.__dict__.get(_HANDLE)
            if other is not None:
                raise PydllmError(
                    f"{name or 'model'}: is patched already, with {type(other.model).__name__}: "
                    "restore that first"
                )
        patched = Patched(model, Options(_resolve(model, wanted), self_check, wanted))
        patched._install()
    if not patched._found:
        patched.restore()
        raise PydllmError(
            f"{type(model).__name__}: found nothing to replace; supported are\n{SUPPORTED}"
        )
    _LOGGER.info("%r", patched)
    return patched


def _compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``Module.compile`` has been at it."""
    return type(module).__name__ == "OptimizedModule" or bool(
        getattr(module, "_compiled_call_impl", None)
    )


def _resolve(model: nn.Module, wanted: str) -> str | None:
    """The backend for the ops; None: a CPU's torch is left to itself."""
    if wanted != "auto":
        return wanted
    return wanted if any(triton_missing(d) is None for d in _accelerators(model)) else None


def _accelerators(model: nn.Module) -> Iterator[torch.device]:
    return (p.device for p in model.parameters() if p.device.type not in ("cpu", "meta"))
