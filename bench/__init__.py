"""Benchmarks: ops, whole decodings, what they are compared with, and what needs a GPU."""
