"""How a module's attention is reached, one function a way; all change the instance alone."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pydllm._backend.signatures import check_called, check_replaced
from pydllm.integrations.patch.attention import Attention

SDPA = "scaled_dot_product_attention"
TABLE = "ALL_ATTENTION_FUNCTIONS"


def code_names(function: Callable[..., Any]) -> set[str]:
    """Names that a function's code, and that of functions inside it, looks up."""

    def walk(code: types.CodeType) -> Iterator[str]:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from walk(constant)

    code = getattr(inspect.unwrap(function), "__code__", None)
    return set() if code is None else set(walk(code))


def sdpa_like(attention: Attention) -> Callable[..., Tensor]:
    """A function with the arguments of ``scaled_dot_product_attention``.

    Keys and values may come with fewer heads than the queries even without ``enable_gqa``.
    """

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        def original() -> Tensor:
            k, v = key, value
            if not enable_gqa and k.ndim == 4 and k.shape[1] != query.shape[1]:
                k, v = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (k, v))
            return F.scaled_dot_product_attention(
                query, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )

        if dropout_p or query.ndim != 4 or key.ndim != 4:
            attention.leave("dropout" if dropout_p else "not four dimensions")
            return original()
        return attention(
            original, query, key, value, attn_mask, causal=bool(is_causal), scale=scale
        )

    return scaled_dot_product_attention


def method_of_block(module: nn.Module, attention: Attention) -> types.MethodType:
    """LLaDA's blocks: their ``_scaled_dot_product_attention``, whatever its copy's arguments are.

    All copies ignore ``is_causal`` and see both ways; so does this.
    """
    original = getattr(module, f"_{SDPA}")
    check_replaced(type(module).__module__, original, "q, k, v, ...")
    names = [*inspect.signature(original).parameters][3:]

    def _scaled_dot_product_attention(
        self: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        named = dict(zip(names, args, strict=False)) | kwargs
        plainly = functools.partial(original, q, k, v, *args, **kwargs)
        if named.get("dropout_p") or named.get("mask") is not None or named.get("is_causal"):
            attention.leave("dropout" if named.get("dropout_p") else "arguments of its own")
            return plainly()
        return attention(plainly, q, k, v, named.get("attn_mask"))

    return types.MethodType(_scaled_dot_product_attention, module)


class _View:
    """A module, or a table, in which some names mean something else."""

    def __init__(self, real: Any, **names: Any) -> None:
        self.__dict__.update(names)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


class _Table(_View):
    """``ALL_ATTENTION_FUNCTIONS`` in which "sdpa" is another function."""

    def __getitem__(self, key: str) -> Any:
        return self.__dict__["sdpa"] if key == "sdpa" else self.__dict__["_real"][key]


def rebound(
    module: nn.Module, attention: Attention, interface: Callable[..., Any], *, repeats: bool
) -> types.MethodType | None:
    """The module's own ``forward`` with the names of SDPA bound to the op.

    The code that runs is the model's, with all that its copy does to caches and positions; what it
    calls ``scaled_dot_product_attention``, by whatever path, is ours. Nothing outside the new
    function changes: neither the class, nor its module, nor torch.

    Args:
        module: its class defines a plain ``forward``.
        interface: takes the place of ``ALL_ATTENTION_FUNCTIONS["sdpa"]``, which is its first
            argument.
        repeats: take ``repeat_kv`` out as well: the op reads a KV head once for its group.

    Returns:
        The bound method; None where the forward names no SDPA, or is decorated.
    """
    forward = getattr(type(module), "forward", None)
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        return None
    names, ours = code_names(forward), sdpa_like(attention)
    if SDPA not in names and TABLE not in names:
        return None
    functional = _View(F, **{SDPA: ours})
    network = _View(nn, functional=functional)
    views = {id(F): functional, id(nn): network, id(torch): _View(torch, nn=network)}
    changed: dict[str, Any] = {
        name: views[id(value)]
        for name, value in forward.__globals__.items()
        if name in names and id(value) in views
    }
    if SDPA in forward.__globals__:
        changed[SDPA] = ours
    if TABLE in names and TABLE in forward.__globals__:
        table = forward.__globals__[TABLE]
        changed[TABLE] = _Table(table, sdpa=functools.partial(interface, table["sdpa"]))
    if repeats and "matmul" not in names and "repeat_kv" in forward.__globals__:
        check_called(type(module).__module__, forward.__globals__["repeat_kv"], "states, repeats")
        changed["repeat_kv"] = _as_it_is
    # Without a name: the compiler takes the names of a named scope from the module of that name.
    scope = {**forward.__globals__, **changed}
    scope.pop("__name__", None)
    function = types.FunctionType(
        forward.__code__,
        scope,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    function.__kwdefaults__, function.__module__ = forward.__kwdefaults__, forward.__module__
    return types.MethodType(function, module)


def _as_it_is(states: Tensor, _: int) -> Tensor:
    return states


class _Scope(TorchFunctionMode):
    """SDPA means the op for the calls of this thread, while it is entered."""

    def __init__(self, ours: Callable[..., Tensor], real: Callable[..., Tensor]) -> None:
        super().__init__()
        self._ours, self._real, self.reached = ours, real, False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is self._real:
            self.reached = True
            return self._ours(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def scoped(module: nn.Module, attention: Attention, missed: Callable[[], None]) -> types.MethodType:
    """The module's ``forward`` inside which SDPA means the op, however deep it is called.

    For modules of which nothing is known. PyTorch keeps such scopes by thread: another thread,
    another model and this one outside the call see the SDPA they always saw.

    Args:
        missed: called when a forward has not reached SDPA.
    """
    original, ours = module.forward, sdpa_like(attention)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # which cannot trace such a scope
            return original(*args, **kwargs)
        with _Scope(ours, F.scaled_dot_product_attention) as scope:
            result = original(*args, **kwargs)
        if not scope.reached:
            missed()
        return result

    return types.MethodType(forward, module)
