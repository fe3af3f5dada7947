"""Plain PyTorch, one file per op: the definition, the ``torch`` backend and the tests' oracle."""

from pydllm.reference.certainty_loss import certainty_loss, certainty_loss_backward
from pydllm.reference.commit_branch import commit_branch
from pydllm.reference.draft import draft
from pydllm.reference.edit_block import edit_block
from pydllm.reference.edit_tokens import edit_tokens
from pydllm.reference.experts import activate, experts, experts_grouped
from pydllm.reference.head_stats import (
    fold_stats,
    head_stats,
    head_stats_partial,
    merge_stats,
)
from pydllm.reference.linear import linear, linear_rms_norm, linear_swiglu
from pydllm.reference.mixture_accept import mixture_accept, mixture_accept_sparse
from pydllm.reference.mixture_draft import mixture_draft
from pydllm.reference.multiblock_step import multiblock_step
from pydllm.reference.renoise import renoise
from pydllm.reference.rms_norm import rms_norm
from pydllm.reference.route import route
from pydllm.reference.swiglu import swiglu
from pydllm.reference.unmask import unmask
from pydllm.reference.verify import verify
from pydllm.reference.vocab_stats import vocab_stats
from pydllm.reference.window_attention import window_attention

__all__ = [
    "activate",
    "certainty_loss",
    "certainty_loss_backward",
    "commit_branch",
    "draft",
    "edit_tokens",
    "experts",
    "experts_grouped",
    "fold_stats",
    "head_stats",
    "head_stats_partial",
    "linear",
    "linear_rms_norm",
    "linear_swiglu",
    "merge_stats",
    "mixture_accept",
    "mixture_accept_sparse",
    "mixture_draft",
    "multiblock_step",
    "renoise",
    "rms_norm",
    "route",
    "swiglu",
    "unmask",
    "verify",
    "vocab_stats",
    "window_attention",
]
