"""An op: declared once, registered with PyTorch, run by the backend that a call gets."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from pydllm._backend import env
from pydllm._backend.constants import constant_result
from pydllm._backend.context import call_in_op_context
from pydllm._backend.dispatch import Reason, choose
from pydllm._backend.errors import BackendError

_LIBRARY = torch.library.Library("pydllm", "DEF")
_ROOMS = {"triton": "pydllm.kernels", "cuda": "pydllm._backend.cuda"}


class Kernel(NamedTuple):
    """One backend's kernels of an op."""

    supports: Callable[..., Reason]
    launch: Callable[..., Any]


class Op:
    """``pydllm::<name>``: its schema, its fake, its definition, and its kernels by convention.

    An instance is called with the schema's arguments; the last, ``str backend``, is what the call
    chooses. The first argument is a tensor, its device is the op's. The kernels are
    ``pydllm.kernels.<file>.<name>`` and ``pydllm._backend.cuda.<file>.<name>``, imported when a
    call first asks for them. They, ``reference``, and ``supports`` beside them (None, or the reason
    why a call cannot be run) take the same arguments in the same order.

    Args:
        schema: of PyTorch's dispatcher, mutated arguments marked ``Tensor(a!)``, ending in
            ``str backend``.
        fake: what the results are like, from the schema's arguments.
        reference: the definition, the backend ``"torch"``.
        file: the kernels' file; the op's name by default.
        supports: the name of ``supports`` in that file.
        opaque: torch runs as one op, too: under ``torch.compile`` it would be hundreds of nodes.
        pdl: backends whose launcher takes ``pdl``, programmatic dependent launch.
    """

    # Set by _load. Attributes, not a dictionary: the compiler looks at them after the load.
    triton: Kernel | None = None
    cuda: Kernel | None = None

    def __init__(
        self,
        schema: str,
        fake: Callable[..., Any],
        reference: Callable[..., Any],
        *,
        file: str | None = None,
        supports: str = "supports",
        opaque: bool = False,
        pdl: tuple[str, ...] = (),
    ) -> None:
        self.name = name = schema.partition("(")[0]
        self._reference, self._opaque, self.pdl = reference, opaque, pdl
        loaded = set()

        @constant_result  # the compiler runs it instead of tracing an import
        def load(backend: str) -> None:
            room = f"{_ROOMS[backend]}.{file or name}"
            if backend in loaded or importlib.util.find_spec(room) is None:
                return
            module = importlib.import_module(room)
            if hasattr(module, name):
                launch = getattr(module, name)
                if env.PDL and backend in pdl:
                    launch = partial(launch, pdl=True)
                setattr(self, backend, Kernel(getattr(module, supports), launch))
            loaded.add(backend)

        self._load = load
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, self._run, key)
        torch.library.register_fake(f"pydllm::{name}", fake, lib=_LIBRARY)
        self._registered = getattr(torch.ops.pydllm, name).default

    def __call__(self, *arguments: Any, backend: str | None = None) -> Any:
        """Run a checked call on the backend that ``choose`` says."""
        wanted = env.BACKEND if backend is None else backend
        if (
            arguments[0].device.type == "cpu"
            and (wanted == "auto" or wanted == "torch")
            and not torch.is_autocast_enabled("cpu")
            and not (self._opaque and torch.compiler.is_compiling())
        ):
            return self._reference(*arguments)  # as run(choose()) does, in fewer calls
        return self.run(self.choose(*arguments, backend=backend), *arguments)

    def choose(self, *arguments: Any, backend: str | None) -> str:
        """The backend that runs a checked call."""
        device = arguments[0].device
        wanted = env.BACKEND if backend is None else backend
        if wanted == "torch" or (wanted == "auto" and device.type == "cpu"):
            return "torch"  # as dispatch.choose would say, at no cost
        self._load("cuda")
        return choose(
            self.name,
            backend,
            device,
            triton=partial(self._why_not, "triton", *arguments),
            cuda=None if self.cuda is None else partial(self.cuda.supports, *arguments),
        )

    def run(self, chosen: str, *arguments: Any) -> Any:
        """Run a checked call on a backend that was chosen before."""
        if chosen == "torch" and not (self._opaque and torch.compiler.is_compiling()):
            return call_in_op_context(arguments[0].device, self._reference, *arguments)
        return self._registered(*arguments, chosen)

    def _why_not(self, backend: str, *arguments: Any) -> Reason:
        """Asked when Triton is known to be there: the kernels' files import it."""
        self._load(backend)
        kernel = self.triton
        if kernel is None:
            return f"{self.name} has no {backend} kernel"
        return kernel.supports(*arguments)

    def _run(self, *arguments: Any) -> Any:
        *rest, backend = arguments
        function = self._reference
        if backend != "torch":
            self._load(backend)
            kernel = self.triton if backend == "triton" else self.cuda
            if kernel is None:
                raise BackendError(f"{self.name} has no {backend} kernel")
            function = kernel.launch
        return call_in_op_context(rest[0].device, function, *rest)
