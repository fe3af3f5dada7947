"""Metrics of decoding: accuracy under parallelism."""

from pydllm.metrics.accuracy_under_parallelism import aup
from pydllm.metrics.comparison import Comparison, Points, compare, read_points

__all__ = ["Comparison", "Points", "aup", "compare", "read_points"]
