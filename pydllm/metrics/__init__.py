"""Metrics of decoding: accuracy under parallelism."""

from pydllm.metrics.accuracy_under_parallelism import aup

__all__ = ["aup"]
