"""A DiffusionGemma of transformers with random weights: few small layers under the real vocabulary,
so that a step is the sampler's work, which is what this package replaces.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from pydllm._backend.errors import PydllmError

CANVAS, STEPS, VOCAB = 64, 8, 262144


def make(device: str, dtype: torch.dtype, vocab: int = VOCAB) -> Any:
    """The model, or a PydllmError where transformers is older than 5.12."""
    try:
        gemma: Any = importlib.import_module("transformers.models.diffusion_gemma")
        transformers: Any = importlib.import_module("transformers")
        text_config = gemma.DiffusionGemmaTextConfig
    except (ImportError, AttributeError) as error:
        raise PydllmError(
            f"expected transformers 5.12 or later with DiffusionGemma: {error}"
        ) from error
    text = text_config(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        num_global_key_value_heads=1,
        head_dim=16,
        global_head_dim=32,
        sliding_window=256,
        num_experts=4,
        top_k_experts=2,
        max_position_embeddings=4096,
    )
    vision = transformers.Gemma4VisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    ids = {name: vocab - 4 - i for i, name in enumerate(("image", "boi", "eoi"))}
    config = gemma.DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=CANVAS,
        **{f"{name}_token_id": token for name, token in ids.items()},
    )
    torch.manual_seed(0)
    model = gemma.DiffusionGemmaForBlockDiffusion(config).to(device, dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.25)
    return model


@torch.no_grad()
def generate(model: Any, ids: torch.Tensor, new: int) -> tuple[torch.Tensor, int]:
    """Every canvas in all of its steps, the same seed each time; sequences and forwards."""
    torch.manual_seed(3)
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        max_denoising_steps=STEPS,
        confidence_threshold=None,
        stability_threshold=None,
    )
    return getattr(found, "sequences", found), STEPS * -(-new // CANVAS)
