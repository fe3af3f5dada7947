"""The published repositories' own code, from checkouts that ``PYDLLM_UPSTREAM_DIR`` names.

    $PYDLLM_UPSTREAM_DIR/LLaDA       github.com/ML-GSAI/LLaDA
    $PYDLLM_UPSTREAM_DIR/Fast-dLLM   github.com/NVlabs/Fast-dLLM (June 2025, or its v1 folder)
    $PYDLLM_UPSTREAM_DIR/d3LLM       github.com/hao-ai-lab/d3LLM
    $PYDLLM_UPSTREAM_DIR/dllm        github.com/ZHZisZZ/dllm (LLaDA2.0's class, as on the hub)

Their models need transformers below 5. Nothing of theirs is part of this package.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pydllm._backend.errors import PydllmError

# None: restatements are compared with.
UPSTREAM_DIR = os.environ.get("PYDLLM_UPSTREAM_DIR") or None


def find(*candidates: str) -> Path | None:
    """The first of the folders that is there; None where no folder was named at all."""
    if UPSTREAM_DIR is None:
        return None
    for name in candidates:
        if (Path(UPSTREAM_DIR) / name).exists():
            return Path(UPSTREAM_DIR) / name
    raise PydllmError(f"PYDLLM_UPSTREAM_DIR={UPSTREAM_DIR}: expected {' or '.join(candidates)}")


@contextlib.contextmanager
def _importing_from(root: Path) -> Iterator[None]:
    """Imports from ``root``, whose packages (``model``, ``utils``) are forgotten afterwards."""
    before, modules = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path[:] = before
        for name in set(sys.modules) - modules:
            if name.partition(".")[0] in ("model", "models", "utils"):
                del sys.modules[name]


def function(root: Path, file: str, name: str) -> Callable[..., Any]:
    """A function of a file, imported as it imports itself: from ``root``."""
    with _importing_from(root):
        place = importlib.util.spec_from_file_location(Path(file).stem, root / file)
        if place is None or place.loader is None:
            raise PydllmError(f"{root / file}: expected a Python file")
        module = importlib.util.module_from_spec(place)
        place.loader.exec_module(module)
    return getattr(module, name)


def llada(
    root: Path, package: str, settings: dict[str, Any], device: str, dtype: torch.dtype
) -> nn.Module:
    """Their LLaDA with random weights, of the shape that ``settings`` (a config.json) states."""
    with _importing_from(root):
        configuration = importlib.import_module(f"{package}.configuration_llada")
        modeling = importlib.import_module(f"{package}.modeling_llada")
    known = {key: value for key, value in settings.items() if key != "architectures"}
    fixed = {"alibi": False, "include_bias": False, "include_qkv_bias": False}
    fixed |= {"weight_tying": False, "rope_full_precision": True, "flash_attention": False}
    fixed |= {"attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0}
    fixed |= {"input_emb_norm": False, "scale_logits": False, "init_device": "cpu"}
    fixed |= {"attention_layer_norm": False, "attention_layer_norm_with_affine": True}
    fixed |= {"layer_norm_with_affine": True, "bias_for_layer_norm": False, "pad_token_id": 126081}
    config = configuration.LLaDAConfig(**(fixed | known))
    return modeling.LLaDAModelLM(config, init_params=True).to(device, dtype).eval()


class LLaDA2:
    """Their LLaDA2.0 of the shape of a config.json, with random weights, and its ``generate``."""

    def __init__(
        self, root: Path, settings: dict[str, Any], device: str, dtype: torch.dtype
    ) -> None:
        with _importing_from(root):
            configuration = importlib.import_module("models.configuration_llada2_moe")
            modeling = importlib.import_module("models.modeling_llada2_moe")
        fixed = {"use_bias": False, "norm_topk_prob": True, "pad_token_id": 0}
        config = configuration.LLaDA2MoeConfig(**(fixed | settings))
        config._attn_implementation = "sdpa"
        self.module = modeling.LLaDA2MoeModelLM(config).to(device, dtype).eval()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def forward(self, *arguments: Any, attention_mask: torch.Tensor, **options: Any) -> Any:
        """Theirs, whose mask is bf16 whatever the weights are."""
        mask = attention_mask.to(self.module.dtype)
        return self.module(*arguments, attention_mask=mask, **options)

    def generate(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        return type(self.module).generate(self, ids, **options)
