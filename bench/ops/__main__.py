"""``python -m bench.ops``."""

from bench.ops.run import main

main()
