"""The public functional API, one file an op."""

from pydllm.ops.certainty_loss import certainty_loss
from pydllm.ops.commit_branch import commit_branch
from pydllm.ops.head_stats import StatsPartial, head_stats, head_stats_partial, merge_stats
from pydllm.ops.rms_norm import rms_norm
from pydllm.ops.swiglu import swiglu
from pydllm.ops.unmask import Unmasked, unmask
from pydllm.ops.vocab_stats import VocabStats, vocab_stats
from pydllm.ops.window_attention import window_attention

__all__ = [
    "StatsPartial",
    "Unmasked",
    "VocabStats",
    "certainty_loss",
    "commit_branch",
    "head_stats",
    "head_stats_partial",
    "merge_stats",
    "rms_norm",
    "swiglu",
    "unmask",
    "vocab_stats",
    "window_attention",
]
