"""Pseudo-trajectory distillation (d3LLM, arXiv 2601.07568): trajectories, loss, training."""

from pydllm.distill.loss import RowLosses, linear_certainty_loss
from pydllm.distill.masking import (
    Noisy,
    Window,
    draw_window,
    least_ratio,
    make_noisy,
    window_length,
)
from pydllm.distill.published import Recorded, read_published
from pydllm.distill.recipe import PRESETS, Recipe
from pydllm.distill.trainer import add_lora, train
from pydllm.distill.trajectories import (
    Trajectories,
    extract,
    join,
    load_trajectories,
    save_trajectories,
)
from pydllm.distill.transformer import Transformer, load_transformer

__all__ = [
    "PRESETS",
    "Noisy",
    "Recipe",
    "Recorded",
    "RowLosses",
    "Trajectories",
    "Transformer",
    "Window",
    "add_lora",
    "draw_window",
    "extract",
    "join",
    "least_ratio",
    "linear_certainty_loss",
    "load_trajectories",
    "load_transformer",
    "make_noisy",
    "read_published",
    "save_trajectories",
    "train",
    "window_length",
]
