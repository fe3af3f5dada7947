"""The expert layer of the native transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydllm import ops
from pydllm.models.moe import MoeSizes
from pydllm.ops import QuantizedWeight

TENSORS = ("router", "router_bias", "shared_gate_up", "shared_down")


@dataclass(frozen=True)
class Experts:
    """Weights of a layer's router and experts; None where the family has none.

    Attributes:
        router: ``(E, hidden)``, fp32 for sigmoid scores, otherwise in the model's dtype.
        gate_up, down: ``(E, 2I, hidden)`` and ``(E, hidden, I)``, of the experts that are held
            here; quantised both or none.
        router_bias: ``(E,)`` fp32.
        shared_gate_up, shared_down: ``(2S, hidden)`` and ``(hidden, S)``.
    """

    sizes: MoeSizes
    router: Tensor
    gate_up: Tensor | QuantizedWeight
    down: Tensor | QuantizedWeight
    router_bias: Tensor | None = None
    shared_gate_up: Tensor | None = None
    shared_down: Tensor | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Any], sizes: MoeSizes) -> Experts | None:
        """From a layer's slots, where experts are stacked in two dimensions; None if dense."""
        if "router" not in tensors:
            return None
        own = {name: tensors[name] for name in TENSORS if name in tensors}
        gate_up, down = tensors["gate_up"], tensors["down"]
        if not isinstance(gate_up, QuantizedWeight):  # which has three
            hidden = gate_up.shape[1]
            gate_up = gate_up.view(sizes.stored, -1, hidden)
            down = down.view(sizes.stored, hidden, -1)
        return cls(sizes, gate_up=gate_up, down=down, **own)

    def __call__(
        self, hidden: Tensor, window: Mapping[str, Any], routed: list[Tensor] | None
    ) -> Tensor:
        """``(B, T, hidden)`` of normalised rows; rows that are not in use are routed nowhere.

        Args:
            window: ``start``, ``length``, ``pad``, ``branches``, ``leaves`` and ``backend`` of the
                forward.
            routed: a list that is given the experts of each row.
        """
        sizes, start, pad = self.sizes, window["start"], window["pad"]
        length, branches = window["length"], window["branches"]
        if pad is not None:
            start = start - pad
        if window.get("leaves"):
            if sizes.capacity is not None:
                raise ValueError(
                    "leaves: expected 0 with experts that are admitted by block, "
                    f"got {window['leaves']}"
                )
            length = start = None  # rows that are not in use are routed as the others
        routes = ops.route(
            hidden,
            self.router,
            self.router_bias,
            top_k=sizes.top_k,
            score=sizes.score,
            renormalize=sizes.renormalize,
            scale=sizes.scale,
            groups=sizes.groups,
            topk_groups=sizes.topk_groups,
            capacity=sizes.capacity,
            block_size=sizes.block_size,
            length=length,
            start=start,
            branches=branches,
            backend=window["backend"],
        )
        if routed is not None:
            routed.append(routes.ids)
        backend = window["backend"]
        if sizes.held is not None:
            return self._held(hidden, routes, sizes.held, backend)
        return ops.experts(
            hidden,
            self.gate_up,
            self.down,
            *routes,
            shared_gate_up=self.shared_gate_up,
            shared_down=self.shared_down,
            backend=backend,
        )

    def _held(self, hidden: Tensor, routes: ops.Routes, held: range, backend: str | None) -> Tensor:
        """The sum over the experts that are held here, and this process's part of the shared one.

        The shared expert is for every row in use, also for one whose experts are all elsewhere,
        so it is a mixture of its own, of one expert.
        """
        ids, weights = routes
        own = ops.experts(
            hidden, self.gate_up, self.down, ids - held.start, weights, backend=backend
        )
        if self.shared_gate_up is None or self.shared_down is None:
            return own
        unused = (ids[..., :1] >= self.sizes.experts).int()  # 1 is no expert of one
        one = torch.ones_like(weights[..., :1])
        shared = self.shared_gate_up[None], self.shared_down[None]
        return own + ops.experts(hidden, *shared, unused, one, backend=backend)
