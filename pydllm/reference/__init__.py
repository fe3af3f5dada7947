"""Plain PyTorch, one file an op: the definition, the ``torch`` backend and the tests' oracle."""

from pydllm.reference.commit_branch import commit_branch
from pydllm.reference.draft import draft
from pydllm.reference.head_stats import head_stats, head_stats_partial, merge_stats
from pydllm.reference.rms_norm import rms_norm
from pydllm.reference.swiglu import swiglu
from pydllm.reference.unmask import unmask
from pydllm.reference.verify import verify
from pydllm.reference.vocab_stats import vocab_stats
from pydllm.reference.window_attention import window_attention

__all__ = [
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
