"""``patch``: an existing model, as it stands, on pydllm's ops; reversible, one instance alone."""

from pydllm.integrations.patch.patched import Patched, Report, patch

__all__ = ["Patched", "Report", "patch"]
