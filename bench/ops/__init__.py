"""The ops: times, tiles and bytes. ``python -m bench.ops --list``."""
