"""The public functional API, one file per op."""

from pydllm.ops.certainty_loss import certainty_loss
from pydllm.ops.commit_branch import commit_branch
from pydllm.ops.draft import draft
from pydllm.ops.edit_block import BlockEdits, EditedBlock, edit_block
from pydllm.ops.edit_tokens import Edited, edit_tokens
from pydllm.ops.experts import experts
from pydllm.ops.head_stats import (
    StatsPartial,
    fold_stats,
    head_stats,
    head_stats_partial,
    merge_stats,
)
from pydllm.ops.linear import QuantizedWeight, linear, linear_rms_norm, linear_swiglu, quantize
from pydllm.ops.mixture_accept import Accepted, mixture_accept, mixture_accept_sparse
from pydllm.ops.mixture_draft import Candidates, MixtureDraft, mixture_draft, round_counter
from pydllm.ops.multiblock_step import MultiBlockState, multiblock_step
from pydllm.ops.renoise import renoise
from pydllm.ops.rms_norm import rms_norm
from pydllm.ops.route import Routes, route
from pydllm.ops.swiglu import swiglu
from pydllm.ops.unmask import Ending, Unmasked, unmask
from pydllm.ops.verify import Verified, verify
from pydllm.ops.vocab_stats import VocabStats, vocab_stats
from pydllm.ops.window_attention import SharedWindow, window_attention

__all__ = [
    "Accepted",
    "BlockEdits",
    "Candidates",
    "Edited",
    "EditedBlock",
    "Ending",
    "MixtureDraft",
    "MultiBlockState",
    "QuantizedWeight",
    "Routes",
    "SharedWindow",
    "StatsPartial",
    "Unmasked",
    "Verified",
    "VocabStats",
    "certainty_loss",
    "commit_branch",
    "draft",
    "edit_block",
    "edit_tokens",
    "experts",
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
    "quantize",
    "renoise",
    "rms_norm",
    "round_counter",
    "route",
    "swiglu",
    "unmask",
    "verify",
    "vocab_stats",
    "window_attention",
]
