"""The bundled tiny models, their task, and what ``pydllm demo`` shows with them."""

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"
_DIFFUSION = ("llada-tiny", "dream-tiny", "sdar-tiny", "llada2-tiny", "dual-tiny")

# The diffusion models, by the name of their folder; the first is the default of the command line.
# A wheel has the first alone, the repository all of them.
MODELS = {name: _WEIGHTS / name for name in _DIFFUSION if (_WEIGHTS / name).is_dir()}
WEIGHTS = _WEIGHTS / _DIFFUSION[0]
# The causal model that verifies for them; not in a wheel.
VERIFIER = _WEIGHTS / "verifier-tiny"

# What ``pydllm compare --sweep`` knows; pydllm/demo/sweep.py has the settings.
SWEEPS = ("static", "threshold", "factor", "entropy_bound", "freedave", "apd", "multiblock")
