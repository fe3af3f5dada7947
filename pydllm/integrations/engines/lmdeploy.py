"""LMDeploy: its unmasking processor on this package's ops.

LMDeploy has no plug-ins: call ``install()`` before the engine is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pydllm import ops
from pydllm._backend.errors import PydllmError
from pydllm._backend.signatures import check_replaced
from pydllm.integrations._rules import span
from pydllm.integrations.engines.accept import write

_USER = "lmdeploy.pytorch.strategies.dllm.model_agent"
# The name that the configuration has for the block's length, by version.
_LENGTHS = ("dllm_block_length", "block_length")


def install() -> Callable[[], None]:
    """Let LMDeploy make our processor in place of its own; returns what takes that back.

    Raises:
        PydllmError: LMDeploy is missing, or its processor has another interface.
    """
    try:
        user: Any = importlib.import_module(_USER)
        consts = importlib.import_module("lmdeploy.pytorch.consts")
    except ImportError as error:
        raise PydllmError(f"LMDeploy with dLLM strategies is not here: {error}") from error
    original = user.UnmaskingProcessor
    check_replaced("lmdeploy", original, "dllm_config")
    check_replaced("lmdeploy", original.__call__, "logits, input_ids, token_ids, dllm_mask")
    states = (consts.DLLM_MASKED, consts.DLLM_UNMASKED, consts.DLLM_CACHED)

    def make(dllm_config: Any) -> Any:
        return UnmaskingProcessor(dllm_config, states, original(dllm_config))

    user.UnmaskingProcessor = make

    def uninstall() -> None:
        user.UnmaskingProcessor = original

    return uninstall


class UnmaskingProcessor:
    """Which masked positions of each block are decided, as LMDeploy calls it.

    Args:
        dllm_config: LMDeploy's.
        states: what it calls a masked, an unmasked and a cached position.
        original: LMDeploy's own, for strategies that ours does not cover.
    """

    def __init__(self, dllm_config: Any, states: tuple[int, int, int], original: Any) -> None:
        self.dllm_config, self.states, self.original = dllm_config, states, original
        lengths = [getattr(dllm_config, name, None) for name in _LENGTHS]
        found = next((length for length in lengths if length is not None), None)
        if found is None:
            raise PydllmError(f"LMDeploy's DLLMConfig: expected {' or '.join(_LENGTHS)}, has none")
        self.block: int = found
        strategy = getattr(dllm_config, "unmasking_strategy", None)
        self.strategy = None if strategy is None else strategy.name.lower()

    def __call__(
        self, logits: Tensor, input_ids: Tensor, token_ids: Tensor, dllm_mask: Tensor
    ) -> Any:
        """New states and tokens, each ``(blocks * length,)``.

        Args:
            logits: ``(blocks * length, V)``.
            input_ids, token_ids: what the positions hold, and what was sampled for them.
            dllm_mask: the states.
        """
        masked, unmasked, cached = self.states
        rules = ("low_confidence_static", "low_confidence_dynamic", "sequential")
        if self.strategy not in rules:
            return self.original(logits, input_ids, token_ids, dllm_mask)
        blocks = dllm_mask.view(-1, self.block)
        full = (blocks == unmasked).all(1, keepdim=True)
        blocks = torch.where(full, cached, blocks)
        is_masked = blocks == masked
        token_ids = torch.where(is_masked.flatten(), token_ids, input_ids)
        steps = self.dllm_config.denoising_steps or self.block
        count = max(1, min(self.block // steps, self.block))
        if self.strategy == "sequential":
            accepted = span(is_masked, count) & is_masked
            return torch.where(accepted, unmasked, blocks).flatten(), token_ids
        # The op writes into the states themselves: a masked one may become an unmasked one.
        x = torch.where(is_masked, masked, unmasked).long()
        options: dict[str, Any] = {"rule": "quota", "quota": x.new_full((len(x),), count).int()}
        if self.strategy == "low_confidence_dynamic":
            threshold = self.dllm_config.confidence_threshold
            options = {"rule": "threshold", "threshold": threshold}
        chosen = logits.gather(1, token_ids[:, None]).squeeze(1).float()
        score = (chosen - ops.vocab_stats(logits).logsumexp).exp().to(logits.dtype).view(x.shape)
        token = torch.full_like(x, unmasked)
        write(x, token, score, mask_id=masked, **options)
        states = torch.where(is_masked, x.to(blocks.dtype), blocks)
        return states.flatten(), token_ids
