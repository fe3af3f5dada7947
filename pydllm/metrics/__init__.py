"""Metrics of decoding: accuracy under parallelism; likelihoods."""

from pydllm.metrics.accuracy_under_parallelism import aup
from pydllm.metrics.comparison import Comparison, Points, compare, read_points
from pydllm.metrics.likelihood import log_likelihood, matches_greedy

__all__ = [
    "Comparison",
    "Points",
    "aup",
    "compare",
    "log_likelihood",
    "matches_greedy",
    "read_points",
]
