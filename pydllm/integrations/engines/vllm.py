"""vLLM's dllm-plugin: its ``batched_remask`` as two launches that read the logits once.

Loaded through ``vllm.general_plugins``; does nothing without ``PYDLLM_REPLACE=1``.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pydllm._backend import env
from pydllm._backend.signatures import check_replaced
from pydllm.integrations._rules import near_best
from pydllm.integrations.engines.accept import propose

_LOG = logging.getLogger("pydllm")
_MODULE = "dllm_plugin.sampling.diffusion_sampler"
# What is further on is passed through.
_SIGNATURE = "logits, input_draft, mask_token_id, threshold, ..."


def register() -> None:
    """The plug-in's entry point; called by vLLM in each of its processes."""
    if not env.REPLACE:
        return
    try:
        module: Any = importlib.import_module(_MODULE)
    except ImportError as error:
        _LOG.info("vLLM has no dllm-plugin here (%s): nothing is replaced", error)
        return
    original = module.batched_remask
    check_replaced("dllm-plugin", original, _SIGNATURE)
    module.batched_remask = make_batched_remask(original)
    _LOG.info("%s.batched_remask is replaced by pydllm's", _MODULE)


def make_batched_remask(original: Callable[..., Any]) -> Callable[..., Any]:
    """``batched_remask`` with the original for calls that ours does not cover."""

    def remask(
        logits: Tensor, input_draft: Tensor, mask_token_id: int, threshold: float, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if any(options.values()):  # a temperature, fp64, or a tensor to write to
            return original(logits, input_draft, mask_token_id, threshold, **options)
        return batched_remask(logits, input_draft, mask_token_id, threshold)

    return remask


def batched_remask(
    logits: Tensor, input_draft: Tensor, mask_token_id: int, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dInfer's threshold rule on a batch of blocks, as dllm-plugin calls it.

    Args:
        logits: ``(B, L, V)`` fp32, fp16 or bf16; taken as fp32.
        input_draft: ``(B, L)``, tokens and masks.
        threshold: a probability in [0, 1].

    Returns:
        The draft with what was accepted, like ``input_draft``; ``(B,)`` bool, whether no mask is
        left; ``(B,)`` int64, how many positions changed.
    """
    draft = input_draft.long()
    token, prob, _ = propose(logits.flatten(0, 1).float(), draft)
    chosen = near_best(prob, (draft == mask_token_id) & (token != mask_token_id), threshold)
    draft = torch.where(chosen, token, draft)
    return draft.to(input_draft.dtype), (draft != mask_token_id).all(1), chosen.sum(1)
