"""The exceptions of pydllm. Bad arguments raise the built-in ValueError or TypeError."""


class PydllmError(Exception):
    """Base of every error that is not simply a bad argument."""


class BackendError(PydllmError, RuntimeError):
    """A backend that was asked for by name cannot run this call."""


class CheckpointError(PydllmError, ValueError):
    """A checkpoint is missing something, or holds something else than expected."""
