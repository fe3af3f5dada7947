"""The native transformer: LLaDA, Dream, Qwen and their like in one forward."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from pydllm import ops
from pydllm._backend.errors import PydllmError
from pydllm._backend.preference import prefers_linear
from pydllm.models.cache import StaticCache
from pydllm.models.families import Sizes
from pydllm.models.forward_arguments import check_forward
from pydllm.models.layer import Layer
from pydllm.models.protocol import Fresh
from pydllm.models.rope import RopeTables
from pydllm.models.spec import ATTENTIONS, ModelSpec
from pydllm.models.workspace import Workspace
from pydllm.ops import QuantizedWeight
from pydllm.ops.rms_norm import OP as RMS_NORM  # its arguments need no check here
from pydllm.ops.swiglu import OP as SWIGLU

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pydllm.models.chat import ChatTemplate


class NativeModel:
    """A transformer with fused projections, over ``pydllm.ops``; implements ``Model``.

    Made by ``pydllm.load``. ``spec`` may be replaced, for instance to add an EOS id.
    """

    # Nothing is added to a product before the residual and the norm that follow it.
    whole_products: ClassVar[bool] = True

    def __init__(
        self,
        spec: ModelSpec,
        sizes: Sizes,
        weights: Mapping[str, Any],
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.spec, self.sizes, self.tokenizer = spec, sizes, tokenizer
        self._embedding, self._norm = weights["embedding"], weights["norm"]
        # Rows past the vocabulary are padding, not tokens.
        self._head = weights.get("head", self._embedding)[: spec.vocab_size]
        bias = weights.get("head_bias")
        self._head_bias = None if bias is None else bias[: spec.vocab_size]
        self._layers = [Layer.of(sizes, weights, f"layers.{i}.") for i in range(sizes.layers)]
        # Set to a list, it is given the experts of each row, (B, T, top_k) for each expert layer.
        self.routed: list[Tensor] | None = None
        self.chat_template: ChatTemplate | None = None
        self.graphs = Workspace()
        self._rope = RopeTables(sizes.rope, self.dtype, self.device)
        self.batch_invariant = False
        self._invariant_graphs = Workspace()

    def deterministic(self) -> Self:
        """This model, with forwards in which the bits of a row depend on no other row.

        Weights are shared; captured graphs are not. Caches are made and used as before. Hidden
        states, logits and statistics of a sequence then have the same bits alone, in any batch,
        and with any number of branches: what ``ops.linear`` promises, and the attention with it.
        """
        if self.sizes.moe is not None and self.device.type == "cpu":
            raise PydllmError(
                "deterministic: the experts of a mixture are batch-invariant in their kernels "
                "alone, on a CPU a matrix library computes them"
            )
        model = copy.copy(self)
        model.batch_invariant, model.graphs = True, self._invariant_graphs
        return model

    def shares_weights(self, other: NativeModel) -> bool:
        """Whether one is the other, or a copy of it."""
        return self._layers is other._layers

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        own = [self._embedding, self._norm, self._head, self._head_bias]
        own += [tensor for layer in self._layers for tensor in vars(layer).values()]
        experts = [layer.experts for layer in self._layers if layer.experts is not None]
        own += [tensor for each in experts for tensor in vars(each).values()]
        places = {t.data_ptr(): t.nbytes for t in own if isinstance(t, Tensor)}
        return sum(places.values())

    @property
    def has_draft_adapter(self) -> bool:
        """Whether ``forward`` takes ``adapter=True``."""
        return any(layer.out_lora_a is not None for layer in self._layers)

    @property
    def has_leaves(self) -> bool:
        """Whether ``forward`` takes ``leaves``; experts that are admitted by block do not."""
        return self.sizes.moe is None or self.sizes.moe.capacity is None

    def new_cache(self, batch: int, max_len: int) -> StaticCache:
        """A cache of ``batch`` sequences of ``max_len`` slots; with 0 slots it keeps nothing."""
        for name, value in (("batch", batch), ("max_len", max_len)):
            if value < 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")
        self._rope.tables(max_len)
        sizes = self.sizes
        return StaticCache.allocate(
            sizes.layers,
            batch,
            max_len,
            sizes.kv_heads,
            sizes.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def forward(
        self,
        ids: Tensor,
        start: Tensor,
        cache: StaticCache,
        *,
        length: Tensor,
        kv_len: Tensor,
        commit: Tensor,
        pad: Tensor | None = None,
        branches: int = 1,
        fresh: Fresh | None = None,
        attention: str | None = None,
        adapter: bool = False,
        block_offset: Tensor | None = None,
        whole: bool = False,
        read_only: bool = False,
        rows: Tensor | None = None,
        leaves: int = 0,
        leaf_rows: int = 1,
        backend: str | None = None,
    ) -> Tensor:
        """Hidden states ``(B, T, hidden)`` of a window, final norm applied; see ``Model.forward``.

        Rows from ``length`` on hold finite numbers without meaning.

        Raises:
            ValueError: shapes or devices do not fit the model or the cache, or ``attention`` is
                one that this model cannot have, or it has no draft adapter, or needs a
                ``block_offset``, or its experts admit rows by block and there are leaves.
            TypeError: ids are not int64, or a number not int32.

        CUDA graphs: safe with a cache that was made before the capture.
        """
        numbers = {"start": start, "length": length, "kv_len": kv_len, "commit": commit}
        attached = leaves * leaf_rows
        given = numbers if pad is None else numbers | {"pad": pad}
        check_forward(self, ids, cache, given, branches, attached)
        width = (ids.shape[1] - attached) // branches
        slots = cache.max_len or width
        cos, sin = self._rope.tables(slots + leaf_rows if leaves else slots)
        eps = self.sizes.eps
        window: dict = {**numbers, "pad": pad, "cos": cos, "sin": sin, "backend": backend}
        window |= self._mask(attention, block_offset)
        if adapter and not self.has_draft_adapter:
            raise ValueError("adapter: expected a model with a draft adapter, this one has none")
        window |= {"branches": branches, "batch_invariant": self.batch_invariant}
        window |= {"leaves": leaves, "leaf_rows": leaf_rows}
        whole = whole and pad is None and leaves == 0
        window["shared"] = ops.SharedWindow(whole=whole, read_only=read_only)
        scale = self._query_scale(width, branches, window, slots)
        adapted: Tensor | bool = bool(adapter)
        if adapter and leaves:
            row = torch.arange(ids.shape[1], device=self.device)
            adapted = (row >= width).to(self.dtype).repeat(ids.shape[0])[:, None]
        # Rows in one dimension: a matrix product of three is split into more calls.
        residual = self._embed(ids.flatten())
        hidden = RMS_NORM(residual, self._layers[0].attn_norm, eps, None, backend=backend)
        following = [layer.attn_norm for layer in self._layers[1:]] + [self._norm]
        for index, layer in enumerate(self._layers):
            window["window"] = self._sliding_window(index, window["causal"])
            stored = (cache.k(index), cache.v(index)) if cache.max_len else (None, None)
            last = layer is self._layers[-1] and layer.experts is None
            wanted = rows if last else None  # nothing looks at the others' last layer
            attended = self._attend(layer, hidden, stored, window, fresh, scale)
            if wanted is not None:
                attended, residual = attended[wanted], residual[wanted]
                adapted = adapted[wanted] if isinstance(adapted, Tensor) else adapted
            # The residual is added by the norm that comes next: the layer's second, then the next
            # layer's first, or the last.
            hidden = self._project_norm(layer, attended, residual, layer.mlp_norm, backend, adapted)
            hidden = self._mlp_norm(layer, hidden, residual, following[index], window)
        if rows is None:
            return hidden.unflatten(0, ids.shape)
        return hidden if self._layers[-1].experts is None else hidden[rows]

    def commit_branch(
        self,
        fresh: Fresh,
        cache: StaticCache,
        *,
        branch: Tensor,
        start: Tensor,
        commit: Tensor,
        branches: int,
        backend: str | None = None,
    ) -> None:
        """Write a candidate's keys and values to the cache; see ``Model.commit_branch``.

        One launch per layer. The stored bits are those that the forward attended to.
        """
        cos, sin = self._rope.tables(cache.max_len)
        for layer, (k, v) in enumerate(fresh):
            ops.commit_branch(
                k,
                v,
                cache.k(layer),
                cache.v(layer),
                branch=branch,
                start=start,
                commit=commit,
                cos=cos,
                sin=sin,
                branches=branches,
                backend=backend,
            )

    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``(..., vocab_size)`` of hidden states ``(..., hidden)``, in the model's dtype."""
        return self._linear(hidden, self._head, self._head_bias, None)

    def head_stats(
        self, hidden: Tensor, rows: Tensor | None = None, **options: Any
    ) -> ops.VocabStats:
        """``ops.head_stats`` of hidden states ``(R, hidden)`` and the model's head."""
        options["batch_invariant"] = self.batch_invariant
        return ops.head_stats(hidden, self._head, bias=self._head_bias, rows=rows, **options)

    def _attend(
        self,
        layer: Layer,
        hidden: Tensor,
        stored: tuple[Tensor, Tensor] | tuple[None, None],
        window: dict,
        fresh: Fresh | None,
        scale: Tensor | None,
    ) -> Tensor:
        """The heads' results ``(B * T, heads * head_dim)``."""
        sizes = self.sizes
        qkv = self._linear(hidden, layer.qkv, layer.qkv_bias, window["backend"])
        qkv = self._windows(qkv, window).unflatten(-1, (-1, sizes.head_dim))
        q, k, v = qkv.split((sizes.heads, sizes.kv_heads, sizes.kv_heads), 2)
        if layer.q_norm is not None and layer.k_norm is not None:
            # Copied: the norm kernel wants rows at one stride, these are some heads of each token.
            # Not fused into the attention, where a committed key could differ by a rounding from
            # the one that was attended to.
            q, k = (
                ops.rms_norm(t.contiguous(), norm, sizes.eps, backend=window["backend"])
                for t, norm in ((q, layer.q_norm), (k, layer.k_norm))
            )
        if fresh is not None:
            fresh.append((k, v))
        if scale is not None:  # commutes with the rotation
            q = q * scale
        attended = ops.window_attention(q, k, v, *stored, **window)
        return attended.view(hidden.shape[0], sizes.heads * sizes.head_dim)

    @staticmethod
    def _windows(rows: Tensor, window: dict) -> Tensor:
        """Rows ``(B * T, n)`` as ``(B, T, n)``."""
        batch = window["start"].shape[0]
        return rows.view(batch, rows.shape[0] // max(batch, 1), rows.shape[1])

    def _mlp_norm(
        self, layer: Layer, hidden: Tensor, residual: Tensor, norm: Tensor, window: dict
    ) -> Tensor:
        """``_mlp``, added to the residual and normalised."""
        backend, eps = window["backend"], self.sizes.eps
        if layer.experts is None and self._merges_norm(hidden, layer.down):
            inner = self._expand(layer, hidden, backend)
            return ops.linear_rms_norm(
                inner, layer.down, norm, eps, residual, layer.down_bias, backend=backend
            )
        return RMS_NORM(self._mlp(layer, hidden, window), norm, eps, residual, backend=backend)

    def _mlp(self, layer: Layer, hidden: Tensor, window: dict) -> Tensor:
        if layer.experts is not None:
            rows = self._windows(hidden, window)
            return layer.experts(rows, window, self.routed).flatten(0, 1)
        backend = window["backend"]
        return self._contract(layer, self._expand(layer, hidden, backend), backend)

    def _expand(self, layer: Layer, hidden: Tensor, backend: str | None) -> Tensor:
        weight, bias = layer.gate_up, layer.gate_up_bias
        if not isinstance(weight, Tensor) or self._takes_ops_linear(hidden):
            return ops.linear_swiglu(hidden, weight, bias, backend=backend)
        return SWIGLU(F.linear(hidden, weight, bias), backend=backend)

    def _mask(self, attention: str | None, block_offset: Tensor | None) -> dict[str, Any]:
        """The mask of a forward, in the words of ``ops.window_attention``."""
        spec = self.spec
        if attention is None:
            if spec.context != "block":
                raise ValueError(
                    f"attention: expected one of {', '.join(ATTENTIONS)} for a model whose context "
                    f"is {spec.context!r}, got None"
                )
            attention = spec.attention
        if attention not in ATTENTIONS or (attention == "block_causal" and not spec.block_size):
            raise ValueError(
                f"attention: expected 'full', 'causal' or {spec.attention!r}, got {attention!r}"
            )
        if attention != "block_causal":
            block_offset = None
        elif spec.block_origin == "prompt" and block_offset is None:
            raise ValueError(
                "block_offset: expected a tensor for a model whose blocks begin at the prompt's "
                "end, got None"
            )
        blocks = spec.block_size if attention == "block_causal" else None
        if blocks and self.sizes.sliding_windows:
            raise ValueError(
                "attention: expected 'full' or 'causal' for a model with sliding windows, "
                "got 'block_causal'"
            )
        return {
            "causal": attention == "causal",
            "block_size": blocks,
            "block_offset": block_offset,
        }

    def _sliding_window(self, layer: int, causal: bool) -> int | None:
        """The op's ``window``: keys at that distance are hidden."""
        width = self.sizes.sliding_windows[layer] if self.sizes.sliding_windows else None
        # As transformers: a causal window counts the query itself, one to both sides does not.
        return width if width is None or causal else width + 1

    def _query_scale(
        self, width: int, branches: int, window: Mapping[str, Any], slots: int
    ) -> Tensor | None:
        """Factor on the queries by position, ``(B, T, 1, 1)`` in the model's dtype, if any."""
        leaves, leaf_rows = window["leaves"], window["leaf_rows"]
        reach = slots + leaf_rows if leaves else slots
        if self.sizes.query_scale is None or reach <= self.sizes.query_scale[1]:
            return None  # 1 at every position below the original length
        beta, original = self.sizes.query_scale
        start, pad = window["start"], window["pad"]
        first = start if pad is None else start - pad
        row = torch.arange(width, device=self.device)
        place = row.repeat(branches)[None]  # of each row, from `start` on
        if leaves:
            root = window["length"][:, None] - leaves + torch.arange(leaves, device=self.device)
            leaf = root[..., None] + torch.arange(1, leaf_rows + 1, device=self.device)
            place = torch.cat((place.expand(len(leaf), -1), leaf.flatten(1)), 1)
        position = first[:, None] + place
        turns = position.clamp(min=0).div(original, rounding_mode="floor")
        scale = 1 + beta * torch.log1p(turns.to(torch.promote_types(self.dtype, torch.float32)))
        return scale.to(self.dtype)[..., None, None]

    def _embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self._embedding)

    def _project_norm(
        self,
        layer: Layer,
        attended: Tensor,
        residual: Tensor,
        norm: Tensor,
        backend: str | None,
        adapter: Tensor | bool,
    ) -> Tensor:
        """``_project``, added to the residual and normalised."""
        eps = self.sizes.eps
        adapts = adapter is not False and layer.out_lora_a is not None
        if not adapts and self._merges_norm(attended, layer.out):
            return ops.linear_rms_norm(
                attended, layer.out, norm, eps, residual, layer.out_bias, backend=backend
            )
        projected = self._project(layer, attended, backend, adapter)
        return RMS_NORM(projected, norm, eps, residual, backend=backend)

    def _project(
        self, layer: Layer, attended: Tensor, backend: str | None, adapter: Tensor | bool
    ) -> Tensor:
        """``adapter``: of all rows, or ``(N, 1)``, 1 in those that have it and 0 in the others."""
        projected = self._linear(attended, layer.out, layer.out_bias, backend)
        if adapter is not False and layer.out_lora_a is not None and layer.out_lora_b is not None:
            low = self._linear(attended, layer.out_lora_a, None, backend)
            low = low * adapter if isinstance(adapter, Tensor) else low
            projected += self._linear(low, layer.out_lora_b, None, backend)
        return projected

    def _contract(self, layer: Layer, inner: Tensor, backend: str | None) -> Tensor:
        return self._linear(inner, layer.down, layer.down_bias, backend)

    def _linear(
        self, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, backend: str | None
    ) -> Tensor:
        """Every matrix product: the library's, or ``ops.linear`` where bits or speed ask for it."""
        if not isinstance(weight, Tensor) or self._takes_ops_linear(x):
            return ops.linear(x, weight, bias, backend=backend)
        return F.linear(x, weight, bias)

    def _merges_norm(self, x: Tensor, weight: Tensor | QuantizedWeight) -> bool:
        """Whether a norm takes a product of ``ops.linear`` as its kernel leaves it."""
        return self.whole_products and (not isinstance(weight, Tensor) or self._takes_ops_linear(x))

    def _takes_ops_linear(self, x: Tensor) -> bool:
        """Whether ``ops.linear`` multiplies ``x`` by weights that the library could take."""
        return self.batch_invariant or prefers_linear(x)
