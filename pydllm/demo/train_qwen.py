"""Train the bundled models in Qwen's layout, on the same task and tokenizer as the LLaDA one.

    python -m pydllm.demo.train_qwen sdar --out out/sdar-tiny         # block-causal, block 8
    python -m pydllm.demo.train_qwen verifier --out out/verifier-tiny   # autoregressive

Training runs transformers' Qwen3, whose ``state_dict`` is the checkpoint; decoding does without it.
The block-causal model sees each noisy block beside the clean blocks before it: the sequence stands
twice in the input, noisy and clean, and a mask says who sees whom (as BD3-LM, arXiv 2503.09573).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pydllm.demo.task import ANSWER_LENGTH, draw_problem, vocabulary
from pydllm.demo.train import EOS, MASK, PAD, build_tokenizer, run_training, save_checkpoint

BLOCK = 8
_CONFIG: dict[str, Any] = {
    "vocab_size": len(vocabulary()),
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
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
CONFIGS: dict[str, dict[str, Any]] = {
    "sdar": _CONFIG
    | {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "block_size": BLOCK,
        "mask_token_id": MASK,
    },
    "verifier": _CONFIG
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 3,
    },
}


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
        masked |= is_answer & ~masked.any(1, keepdim=True)
        block = torch.arange(length) // BLOCK
        own = block[:, None] == block
        before = block[:, None] > block
        nothing = torch.zeros_like(own)
        # Rows ask, columns answer; noisy first, clean behind.
        visible = torch.cat((torch.cat((own, before), 1), torch.cat((nothing, own | before), 1)))
        bias = torch.where(visible, 0.0, -torch.inf)[None, None]
        positions = torch.arange(length).repeat(2)[None]
        inputs = torch.cat((ids.masked_fill(masked, MASK), ids), 1)
        logits = model(inputs, attention_mask=bias, position_ids=positions).logits[:, :length]
        return F.cross_entropy(logits[masked], ids[masked])

    return loss_of


def causal_loss(model: nn.Module, size: int, seed: int) -> Callable[[int], Tensor]:
    """Cross-entropy of the next token over the answers."""

    def loss_of(step: int) -> Tensor:
        ids, is_answer = draw_batch(size, seed, step)
        logits = model(ids[:, :-1]).logits
        return F.cross_entropy(logits[is_answer[:, 1:]], ids[:, 1:][is_answer[:, 1:]])

    return loss_of


@click.command()
@click.argument("kind", type=click.Choice(sorted(CONFIGS)))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option("--steps", default=3000, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--learning-rate", default=2.5e-3, show_default=True)
@click.option("--threads", type=int, help="CPU threads (default: torch's choice).")
def main(
    kind: str,
    out: Path,
    steps: int,
    batch_size: int,
    seed: int,
    learning_rate: float,
    threads: int | None,
) -> None:
    """Train the block-causal model or the autoregressive verifier; run again to resume."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = CONFIGS[kind]
    ours = ("architectures", "model_type", "block_size", "mask_token_id")
    settings = {key: value for key, value in config.items() if key not in ours}
    model = Qwen3ForCausalLM(Qwen3Config(**settings, attn_implementation="sdpa"))
    make_loss = block_diffusion_loss if kind == "sdar" else causal_loss
    run_training(model, make_loss(model, batch_size, seed), steps, learning_rate, out)
    save_checkpoint(model, config, out)


if __name__ == "__main__":
    main()
