"""SGLang: dLLM algorithms that decide on the device, found through ``sglang.srt.plugins``.

``--dllm-algorithm PydllmLowConfidence`` (or another of ``ALGORITHMS``) uses one; with
``PYDLLM_REPLACE=1`` SGLang's own LowConfidence and JointThreshold are replaced by ours under their
own names, with the same tokens. Options come from ``--dllm-algorithm-config``, with SGLang's names
and defaults.

A step reads the logits once, writes the tokens into ``forward_batch.input_ids`` in place, and
copies one small list to the host, which the interface asks for. Under tensor parallelism SGLang
gathers the logits, so that every rank decides alike.

What a step can decide is one block of each request, from one forward. FreeDave's candidates and
d3LLM's several blocks at a time need forwards that the interface has no words for: use
``pydllm.generate`` for those. d3LLM's rule within a block is ``PydllmEntropyThreshold``.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from typing import Any

import torch
from torch import Tensor

from pydllm._backend import env
from pydllm._backend.errors import PydllmError
from pydllm._backend.signatures import check_called, check_replaced, version_of
from pydllm.integrations import _rules
from pydllm.integrations.engines.accept import above, decide, propose

_LOG = logging.getLogger("pydllm")
_PACKAGE = "sglang.srt.dllm.algorithm"
# What SGLang's releases ask of an algorithm, by the signature of the LowConfidence they have.
_STEPS = {
    "logits": "forward_batch, full_logits, states",
    "output": "forward_batch, logits_output, states",
}
_OVERRIDDEN = {"init_step_state": "forward_batch", "max_steps": "block_size"}
_RETURNED = "List[torch.Tensor], bool]"  # what run gives since it takes batches


def register() -> None:
    """The plug-in's entry point; called by SGLang in each of its processes."""
    try:
        package = importlib.import_module(_PACKAGE)
    except ImportError as error:
        _LOG.info("SGLang has no dLLM algorithms here (%s): nothing is registered", error)
        return
    known = package.algo_name_to_cls
    interface = interface_of(known["LowConfidence"])
    base = importlib.import_module(f"{_PACKAGE}.base").DllmAlgorithm
    check_called("sglang", base, "config")
    for method, signature in _OVERRIDDEN.items():
        if hasattr(base, method):
            check_replaced("sglang", getattr(base, method), signature)
    for name, rules in ALGORITHMS.items():
        made = type(name, (_MIXINS[interface], rules, base), {})
        known[name] = made
        replaced = name.removeprefix("Pydllm")
        if env.REPLACE and replaced in known:
            known[replaced] = made
            _LOG.info("SGLang's %s is replaced by pydllm's", replaced)


def interface_of(algorithm: type) -> str:
    """``logits``, ``output`` or ``run``: which interface an installed algorithm has.

    Raises:
        PydllmError: none of them.
    """
    step, run = (getattr(algorithm, name, None) for name in ("step", "run"))
    if step is not None:
        return check_replaced("sglang", step, _STEPS)
    if run is not None:
        check_replaced("sglang", run, "model_runner, forward_batch")
        returned = str(inspect.signature(run).return_annotation).replace("typing.", "")
        if _RETURNED in returned:
            return "run"
        found = f"run that returns {returned}"
    else:
        found = "neither step nor run"
    expected = " or ".join(f"step({signature})" for signature in _STEPS.values())
    raise PydllmError(
        f"sglang {version_of('sglang')}: {algorithm.__name__}: expected {expected} or "
        f"run(model_runner, forward_batch) that returns ...{_RETURNED}, found {found}"
    )


class _Rule:
    """What an algorithm does to one block of each request.

    ``advance(x, logits, states)`` writes a step into ``x (B, L)`` and returns which blocks were
    complete before it.
    """

    block_size: int
    mask_id: int

    def new_states(self, x: Tensor) -> list[Any]:
        return [None] * x.shape[0]

    def extra_steps(self) -> int:
        """Steps that a block may take besides one a mask."""
        return 0


class _Threshold(_Rule):
    """A rule of ``ops.unmask`` that looks at masks alone."""

    rule, option, default = "threshold", "threshold", 0.95

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.limit = float(config.algorithm_config.get(self.option, self.default))

    def advance(self, x: Tensor, logits: Tensor, states: list[Any]) -> list[bool]:
        done = (x != self.mask_id).all(1)
        decide(logits, x, mask_id=self.mask_id, **self.options(x, logits.dtype))
        return done.tolist()

    def options(self, x: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        return {"rule": self.rule, self.option: self.limit}


class _LowConfidence(_Threshold):
    """SGLang's LowConfidence: probabilities above a threshold, at least one per step."""

    def options(self, x: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        return above(self.limit, x, dtype)


class _EntropyBound(_Threshold):
    """EB-Sampler (arXiv 2505.24857): as many as an entropy budget in nats allows."""

    rule, option, default = "entropy_bound", "bound", 0.1


class _EntropyThreshold(_Threshold):
    """d3LLM's rule (arXiv 2601.07568) in one block: entropies up to a threshold in nats."""

    rule, default = "entropy", 0.45


class _Factor(_Threshold):
    """Fast-dLLM's factor rule (arXiv 2505.22618)."""

    rule, option, default = "factor", "factor", 1.0


class _JointThreshold(_Rule):
    """SGLang's JointThreshold: masks above a threshold, and edits of tokens above another one."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        options = config.algorithm_config
        self.threshold = float(options.get("threshold", 0.5))
        self.edit_threshold = float(options.get("edit_threshold", 0))
        self.max_post_edit_steps = int(options.get("max_post_edit_steps", 16))
        self.penalty = float(options.get("penalty_lambda", 0))

    def extra_steps(self) -> int:
        return self.max_post_edit_steps

    def new_states(self, x: Tensor) -> list[Any]:
        masks = (x == self.mask_id).sum(1).tolist()
        return [
            {"finished": False, "edits": 0, "masks": count, "prompt": x.shape[1] - count}
            for count in masks
        ]

    def advance(self, x: Tensor, logits: Tensor, states: list[Any]) -> list[bool]:
        done = [state["finished"] for state in states]
        for state in states:
            if not state["finished"] and state["masks"] == 0:
                state["edits"] += 1
                state["finished"] = state["edits"] > self.max_post_edit_steps
        # What may change, and where editing may begin: one copy to the device for both.
        width = x.shape[1]
        numbers = [[0 if s["finished"] else width for s in states], [s["prompt"] for s in states]]
        length, prompt = torch.tensor(numbers, dtype=torch.int32, device=x.device)
        if self.penalty > 0:
            before = torch.nn.functional.pad(x[:, :-1], (1, 0)).flatten()
            amount = logits.new_full((x.shape[0], width, 1), -self.penalty)
            amount[:, 0] = 0
            logits = logits.scatter_add(1, before[:, None], amount.flatten(0, 1))
        token, score, _ = propose(logits, x)
        masked, place = x == self.mask_id, torch.arange(width, device=x.device)
        active = length[:, None] > 0
        known = active & ~masked & (place >= prompt[:, None])
        edited = known & (token != x) & (score > self.edit_threshold)
        one = torch.ones_like(length)[:, None]
        chosen = edited | (active & _rules.above(score, masked, self.threshold, one))
        x.copy_(torch.where(chosen, token, x))
        counts = torch.stack(((x == self.mask_id).sum(1), chosen.sum(1))).tolist()
        for state, remaining, accepted in zip(states, *counts, strict=True):
            if not state["finished"]:
                state["masks"] = remaining
                state["finished"] = accepted == 0
        return done


class _Blocks:
    """Blocks of token ids as the op wants them: int64, one row a request."""

    def _advance(self, forward_batch: Any, logits: Tensor, states: list[Any]) -> list[bool]:
        ids = forward_batch.input_ids
        x = ids.view(-1, self.block_size)  # type: ignore[attr-defined]
        wide = x if x.dtype == torch.int64 else x.long()
        done = self.advance(wide, logits.flatten(0, -2), states)  # type: ignore[attr-defined]
        if wide is not x:
            x.copy_(wide)
        return done

    def init_step_state(self, forward_batch: Any) -> list[Any]:
        ids = forward_batch.input_ids
        return self.new_states(ids.view(-1, self.block_size))  # type: ignore[attr-defined]

    def max_steps(self, block_size: int) -> int:
        return block_size + self.extra_steps() + 1  # type: ignore[attr-defined]


class _LogitsInterface(_Blocks):
    def step(self, forward_batch: Any, full_logits: Tensor, states: list[Any]) -> list[bool]:
        return self._advance(forward_batch, full_logits, states)


class _OutputInterface(_Blocks):
    def step(self, forward_batch: Any, logits_output: Any, states: list[Any]) -> list[bool]:
        logits = getattr(logits_output, "full_logits", None)
        if not isinstance(logits, Tensor):
            raise PydllmError(
                "SGLang's logits_output: expected full_logits, a tensor, "
                f"got {type(logits).__name__} (start the server without compact consumer state)"
            )
        return self._advance(forward_batch, logits, states)


class _RunInterface(_Blocks):
    _checked = False  # the runner's signature

    def run(self, model_runner: Any, forward_batch: Any) -> tuple[Any, list[Tensor], bool]:
        if not self._checked:
            check_called("sglang", model_runner.forward, "forward_batch, *, pp_proxy_tensors")
            self._checked = True

        def forward() -> Any:
            return model_runner.forward(forward_batch, pp_proxy_tensors=None)

        size = self.block_size  # type: ignore[attr-defined]
        mask = self.mask_id  # type: ignore[attr-defined]
        x = forward_batch.input_ids.view(-1, size)
        first = (x != mask).sum(1).tolist()
        if all(start == size for start in first):  # nothing to decode: keys and values are wanted
            out = forward()
            return out.logits_output, [], out.can_run_graph
        states = self.init_step_state(forward_batch)
        for _ in range(self.max_steps(size)):
            out = forward()
            if all(self._advance(forward_batch, out.logits_output.full_logits, states)):
                break  # this forward has stored the keys and values of the final tokens
        else:
            out = forward()
        x = forward_batch.input_ids.view(-1, size)
        tokens = [row[start:] for row, start in zip(x, first, strict=True)]
        return out.logits_output, tokens, out.can_run_graph


_MIXINS = {"logits": _LogitsInterface, "output": _OutputInterface, "run": _RunInterface}
ALGORITHMS: dict[str, type] = {
    "PydllmLowConfidence": _LowConfidence,
    "PydllmJointThreshold": _JointThreshold,
    "PydllmEntropyBound": _EntropyBound,
    "PydllmEntropyThreshold": _EntropyThreshold,
    "PydllmFactor": _Factor,
}
