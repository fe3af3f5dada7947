"""What needs a GPU, or looks at machine code for one. ``python -m bench.gpu``."""
