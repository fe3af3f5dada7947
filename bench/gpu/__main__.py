"""``python -m bench.gpu``."""

from bench.gpu.suite import main

main()
