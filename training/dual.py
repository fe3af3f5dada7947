"""Train one model both ways: ``python -m training.dual --out out/dual-tiny``.

The layout is that of Nemotron-Labs-Diffusion's Qwen 3 sister. Each sequence stands twice in the
input. The clean copy is causal, and its row i predicts token i + 1. In the noisy copy a block sees
itself and the clean tokens before it, and a mask predicts its own position. The two losses are
added. Blocks have a random length and begin anywhere, because self-speculation drafts from wherever
it stands; their first token is mostly known, as it is in decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from training.llada import (
    MASK,
    cross_entropy,
    hide_names,
    run_training,
    save_weights,
    training_options,
)
from training.qwen import BLOCK, CONFIGS, build, draw_batch, needed, two_streams

CONFIG: dict[str, Any] = CONFIGS["qwen3"] | {
    "architectures": ["DiffEncoderModel"],
    "model_type": "diff_encoder",
    "num_hidden_layers": 4,
    "block_size": BLOCK,
    "mask_token_id": MASK,
}
_LENGTHS = (4, 16)  # of a block in training, both included
_KNOWN = 0.75  # share of the blocks whose first token is given
_HIDDEN = 0.5  # blocks whose other tokens are all masks


def noise(ids: Tensor, is_answer: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The block of each position, and which are masked, both ``(B, S)``.

    Blocks begin at the answer, less a random part of a block.
    """
    size, length = ids.shape

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (size, 1), generator=generator)

    def share(per: int) -> Tensor:
        return torch.rand(size, per, generator=generator)

    block_length = draw(*_LENGTHS)
    place = torch.arange(length) - is_answer.int().argmax(1, keepdim=True)
    place = place + draw(0, _LENGTHS[1]) % block_length + length // _LENGTHS[0] * block_length
    block = place // block_length
    blocks = int(block.max()) + 1
    hidden, ratio = (share(blocks) < _HIDDEN).gather(1, block), share(blocks).gather(1, block)
    masked = hidden | hide_names(ids, share(length) < ratio, generator)
    known = (share(blocks) < _KNOWN).gather(1, block) & (place % block_length == 0)
    masked &= is_answer & ~known
    return block, masked | (is_answer & ~masked.any(1, keepdim=True))


def two_way_loss(model: nn.Module, size: int, seed: int) -> Callable[[int], Tensor]:
    """Cross-entropy of the masks of the noisy copy plus that of the next token of the clean one."""

    def loss_of(step: int) -> Tensor:
        ids, is_answer, first = needed(*draw_batch(size, seed, step), BLOCK)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        block, masked = noise(ids, is_answer, generator)
        inputs, positions, visible = two_streams(ids, masked, block, first, causal=True)
        bias = torch.where(visible, 0.0, -torch.inf)
        logits = model(inputs, attention_mask=bias, position_ids=positions).logits
        noisy, clean = logits.split((ids.shape[1] - first, ids.shape[1]), 1)
        diffusion = cross_entropy(noisy[masked[:, first:]], ids[masked])
        following = is_answer[:, 1:]
        return diffusion + cross_entropy(clean[:, :-1][following], ids[:, 1:][following])

    return loss_of


def checkpoint_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights under the layout's names."""
    return {
        name.replace("model.", "encoder.", 1).replace("lm_head.", "diffusion_head."): value
        for name, value in model.state_dict().items()
    }


@click.command()
@training_options(
    "Checkpoint in Qwen 3's or SDAR's layout to start from.", steps=2000, learning_rate=2e-3
)
def main(
    out: Path,
    parent: Path | None,
    steps: int,
    batch_size: int,
    seed: int,
    learning_rate: float,
    threads: int | None,
) -> None:
    """Train the model; run the same command again to resume."""
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = build(CONFIG, parent)
    run_training(model, two_way_loss(model, batch_size, seed), steps, learning_rate, out)
    save_weights(checkpoint_weights(model), CONFIG, out)


if __name__ == "__main__":
    main()
