"""Families from outside the package."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from pydllm._backend.errors import CheckpointError
from pydllm.models.config import Config
from pydllm.models.families import FAMILIES, REGISTERED, Family, find_family


def register_family(architecture: str, like: Family | str, **changes: Any) -> Family:
    """Let ``load`` read checkpoints of a class that pydllm does not know.

    The registration holds for the process; a package makes it when it is imported.

    Args:
        architecture: the class's name, as ``architectures`` of ``config.json`` has it; ``*`` and
            ``?`` stand for other characters.
        like: the family that it resembles: a ``Family``, or the class name of a known one, such as
            ``"LlamaForCausalLM"``.
        changes: fields of ``Family`` in which it differs: ``attention="full"``,
            ``names=replace(LLAMA_NAMES, head="decoder")``, ``prepare=`` a function that puts the
            configuration into Llama's words.

    Returns:
        The family.

    Raises:
        TypeError: ``architecture`` is not a string, or ``changes`` has what is no field.
        ValueError: the class is known already, or ``like`` is not.

    Example:
        >>> register_family("ToyDiffusionLM", "LlamaForCausalLM", attention="full").attention
        'full'
    """
    if not isinstance(architecture, str):
        raise TypeError(f"architecture: expected a class name, got {architecture!r}")
    if architecture in FAMILIES or architecture in REGISTERED:
        raise ValueError(f"architecture: expected a class that is not known, got {architecture!r}")
    if isinstance(like, str):
        try:
            like = find_family(Config({}), like)
        except CheckpointError:
            known = ", ".join(sorted({*FAMILIES, *REGISTERED}))
            raise ValueError(f"like: expected one of {known}, got {like!r}") from None
    names = [field.name for field in fields(Family)]
    for name in changes:
        if name not in names:
            raise TypeError(f"{name}: expected one of {', '.join(names)}")
    REGISTERED[architecture] = family = replace(like, **changes)
    return family
