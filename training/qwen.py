"""Train models in Qwen's layout, on the same task and tokenizer as the LLaDA one.

    python -m training.qwen qwen2 --out out/verifier-tiny      # autoregressive
    python -m training.qwen dream --init out/verifier-tiny --out out/dream-tiny
    python -m training.qwen qwen3 --out out/qwen3-tiny         # autoregressive
    python -m training.qwen sdar --init out/qwen3-tiny --out out/sdar-tiny

The two diffusion models start from an autoregressive one, as Dream and SDAR themselves did: Dream's
logits stay shifted by one position, SDAR's do not. Training runs transformers' Qwen2 and Qwen3,
whose ``state_dict`` is the checkpoint; decoding does without them. The block-causal model sees each
noisy block beside the clean blocks before it: the sequence stands twice in the input, noisy and
clean, and a mask says who sees whom (as BD3-LM, arXiv 2503.09573).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from pydllm.demo.task import ANSWER_LENGTH, draw_problem, vocabulary
from training.llada import (
    EOS,
    MASK,
    PAD,
    build_tokenizer,
    cross_entropy,
    hide_names,
    read_parent,
    run_training,
    save_checkpoint,
)

BLOCK = 8
_CONFIG: dict[str, Any] = {
    "vocab_size": len(vocabulary()),
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_QWEN2 = _CONFIG | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
_QWEN3 = _CONFIG | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
_DIFFUSION = {"num_hidden_layers": 4, "mask_token_id": MASK}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "dream": _QWEN2 | _DIFFUSION | {"architectures": ["DreamModel"], "model_type": "Dream"},
    "sdar": _QWEN3
    | _DIFFUSION
    | {"architectures": ["SDARForCausalLM"], "model_type": "sdar", "block_size": BLOCK},
}


def build(config: dict[str, Any], parent: Path | None = None) -> nn.Module:
    """The model of ``config`` to train, from scratch or from the checkpoint ``parent``.

    A layer that the parent lacks adds zero to its input until training changes it, so the model
    begins as its parent. Layers that the parent has beyond those of ``config`` are left out.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    ours = ("architectures", "model_type", "block_size", "mask_token_id")
    settings = {key: value for key, value in config.items() if key not in ours}
    settings["attn_implementation"] = "sdpa"
    model: nn.Module
    if config["model_type"] in ("qwen2", "Dream"):
        del settings["head_dim"], settings["attention_bias"]
        model = Qwen2ForCausalLM(Qwen2Config(**settings))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**settings))
    if parent is None:
        return model
    weights = {
        name: value
        for name, value in read_parent(parent, model.state_dict()).items()
        if ".layers." not in name or int(name.split(".")[2]) < config["num_hidden_layers"]
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    new = [name for name in missing if ".layers." not in name]
    if new or unexpected:
        raise click.UsageError(
            f"--init {parent}: expected a model in the layout of {config['model_type']}, "
            f"lacks {new or 'nothing'}, has {unexpected or 'nothing'} that does not belong"
        )
    for name in missing:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(model.get_parameter(name))
    return model


def draw_batch(size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Batch ``step``: ids ``(size, S)``, and which are answers, which end of sequence fills up."""
    tokenizer = build_tokenizer()
    rng = random.Random(f"{seed} {step}")
    problems = [draw_problem(rng, held_out=False) for _ in range(size)]
    prompts = [e.ids for e in tokenizer.encode_batch([p.prompt for p in problems])]
    answers = [e.ids for e in tokenizer.encode_batch([p.solution for p in problems])]
    longest = max(map(len, prompts)) + ANSWER_LENGTH
    longest += -longest % BLOCK
    ids = torch.full((size, longest), EOS)
    is_answer = torch.ones(size, longest, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        ids[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        is_answer[row, : len(prompt)] = False
    return ids, is_answer


def needed(ids: Tensor, is_answer: Tensor, reach: int) -> tuple[Tensor, Tensor, int]:
    """A batch without what decoding never computes, and where its first answer begins.

    ``reach`` positions after the first EOS of an answer count; blocks after those are not decoded.
    """
    place = torch.arange(ids.shape[1])
    end = (is_answer & (ids == EOS)).int().argmax(1, keepdim=True)
    is_answer = is_answer & (place < end + reach)
    length = int(end.max()) + reach
    length = min(ids.shape[1], length + -length % BLOCK)
    return ids[:, :length], is_answer[:, :length], int(is_answer.int().argmax(1).min())


def shifted_diffusion_loss(model: nn.Module, size: int, seed: int) -> Callable[[int], Tensor]:
    """Cross-entropy of masked answer tokens, each from the row of the position before it.

    A sequence ends ``ANSWER_LENGTH`` behind its prompt, as in decoding: what fills up the batch is
    seen by nobody. (A model that sees it counts its steps from where it ends.)
    """

    def loss_of(step: int) -> Tensor:
        ids, is_answer = draw_batch(size, seed, step)
        place = torch.arange(ids.shape[1])
        inside = place < is_answer.int().argmax(1, keepdim=True) + ANSWER_LENGTH
        is_answer &= inside
        noise = torch.Generator().manual_seed(seed * 1_000_003 + step)
        ratio = torch.rand(size, 1, generator=noise)
        masked = is_answer & (torch.rand(ids.shape, generator=noise) < ratio)
        masked = hide_names(ids, masked, noise)
        masked |= is_answer & ~masked.any(1, keepdim=True)
        bias = torch.where(inside, 0.0, -torch.inf)[:, None, None].expand(-1, 1, len(place), -1)
        logits = model(ids.masked_fill(masked, MASK), attention_mask=bias).logits
        return cross_entropy(logits[:, :-1][masked[:, 1:]], ids[masked])

    return loss_of


def two_streams(
    ids: Tensor, masked: Tensor, block: Tensor, first: int = 0, *, causal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """A sequence twice in one input: noisy from position ``first`` on, then clean.

    A noisy block sees itself and the clean blocks before it. ``block (B or 1, S)`` is the block of
    each position. Clean rows see their own block and those before, or, ``causal``, what stands
    before them.

    Returns:
        Inputs ``(B, 2 S - first)``, their positions ``(1, 2 S - first)``, and which rows see which
        ``(B or 1, 1, 2 S - first, 2 S - first)`` bool.
    """
    place = torch.arange(ids.shape[1])
    own = block[:, first:, None] == block[:, None, first:]
    before = block[:, first:, None] > block[:, None]
    nothing = torch.zeros_like(before).transpose(1, 2)
    past = (place[:, None] >= place)[None] if causal else block[:, :, None] >= block[:, None]
    # Rows ask, columns answer.
    rows = (torch.cat((own, before), 2), torch.cat((nothing, past.expand(len(block), -1, -1)), 2))
    inputs = torch.cat((ids.masked_fill(masked, MASK)[:, first:], ids), 1)
    return inputs, torch.cat((place[first:], place))[None], torch.cat(rows, 1)[:, None]


def block_diffusion_loss(model: nn.Module, size: int, seed: int) -> Callable[[int], Tensor]:
    """Cross-entropy of masked answer tokens, each block seeing itself and the clean ones before."""

    def loss_of(step: int) -> Tensor:
        ids, is_answer = draw_batch(size, seed, step)
        length = ids.shape[1]
        noise = torch.Generator().manual_seed(seed * 1_000_003 + step)
        # One mask ratio a block and sample.
        blocks = -(-length // BLOCK)
        ratio = torch.rand(size, blocks, generator=noise).repeat_interleave(BLOCK, 1)[:, :length]
        masked = is_answer & (torch.rand(size, length, generator=noise) < ratio)
        masked = hide_names(ids, masked, noise)
        masked |= is_answer & ~masked.any(1, keepdim=True)
        block = (torch.arange(length) // BLOCK)[None]
        inputs, positions, visible = two_streams(ids, masked, block)
        bias = torch.where(visible, 0.0, -torch.inf)
        logits = model(inputs, attention_mask=bias, position_ids=positions).logits[:, :length]
        return cross_entropy(logits[masked], ids[masked])

    return loss_of


def causal_loss(model: nn.Module, size: int, seed: int) -> Callable[[int], Tensor]:
    """Cross-entropy of the next token over the answers."""

    def loss_of(step: int) -> Tensor:
        ids, is_answer = draw_batch(size, seed, step)
        logits = model(ids[:, :-1]).logits
        return cross_entropy(logits[is_answer[:, 1:]], ids[:, 1:][is_answer[:, 1:]])

    return loss_of


LOSSES = {
    "qwen2": causal_loss,
    "qwen3": causal_loss,
    "dream": shifted_diffusion_loss,
    "sdar": block_diffusion_loss,
}


@click.command()
@click.argument("kind", type=click.Choice(sorted(CONFIGS)))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option(
    "--init",
    "parent",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Checkpoint to start from.",
)
@click.option("--layers", type=click.IntRange(1), help="Default: 3, and 4 for diffusion models.")
@click.option("--steps", default=2000, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--learning-rate", default=2.5e-3, show_default=True)
@click.option("--threads", type=int, help="CPU threads (default: torch's choice).")
def main(
    kind: str,
    out: Path,
    parent: Path | None,
    layers: int | None,
    steps: int,
    batch_size: int,
    seed: int,
    learning_rate: float,
    threads: int | None,
) -> None:
    """Train one of the models in Qwen's layout; run the same command again to resume."""
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = CONFIGS[kind] | ({} if layers is None else {"num_hidden_layers": layers})
    model = build(config, parent)
    run_training(model, LOSSES[kind](model, batch_size, seed), steps, learning_rate, out)
    save_checkpoint(model, config, out)


if __name__ == "__main__":
    main()
