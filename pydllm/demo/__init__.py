"""The bundled tiny model, its task, and what ``pydllm demo`` shows with them."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights" / "llada-tiny"
