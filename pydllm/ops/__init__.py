"""The public functional API, one file an op."""

from pydllm.ops.commit_branch import commit_branch
from pydllm.ops.draft import draft
from pydllm.ops.head_stats import StatsPartial, head_stats, head_stats_partial, merge_stats
from pydllm.ops.rms_norm import rms_norm
from pydllm.ops.swiglu import swiglu
from pydllm.ops.unmask import Unmasked, unmask
from pydllm.ops.verify import Verified, verify
from pydllm.ops.vocab_stats import VocabStats, vocab_stats
from pydllm.ops.window_attention import window_attention

__all__ = [
    "StatsPartial",
    "Unmasked",
    "Verified",
    "VocabStats",
    "commit_branch",
    "draft",
    "head_stats",
    "head_stats_partial",
    "merge_stats",
    "rms_norm",
    "swiglu",
    "unmask",
    "verify",
    "vocab_stats",
    "window_attention",
]
