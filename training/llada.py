"""Train a model in LLaDA's layout: ``python -m training.llada --out out/tiny``.

It learns `training.turns`. The bundled models learnt ``pydllm.demo.task`` with this script as it
was at the revision that their cards name.

The model below is plain PyTorch and its ``state_dict`` has exactly the names and shapes of a LLaDA
checkpoint, so the file it writes is read by the same code that reads LLaDA-8B. It shares nothing
with the inference code and is therefore also an independent check of it.

Seeded and resumable: batch ``n`` depends on the seed and ``n`` alone, and ``--out`` keeps a
training state from which the same command goes on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F

from pydllm.demo.task import ANSWER_LENGTH, FRIENDS, draw_problem, vocabulary

SAVE_EVERY = 100
MASK, EOS, PAD, FIRST_FRIEND = range(4)
_EMBEDDINGS = ("wte.weight", "embed_tokens.weight")
_HEADS = ("transformer.ff_out.weight", "lm_head.weight")
# Words of the first bundled models' task, which stood at the beginning of a sentence.
_BEFORE = ("first", "then", "next", "now")
CONFIG = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "d_model": 128,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 4,
    "mlp_hidden_size": 256,
    "vocab_size": len(vocabulary()),
    "embedding_size": len(vocabulary()),
    "max_sequence_length": 128,
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 500000.0,
    "include_bias": False,
    "include_qkv_bias": False,
    "weight_tying": False,
    "mask_token_id": MASK,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.attn_norm = nn.RMSNorm(width, eps)
        self.ff_norm = nn.RMSNorm(width, eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        h = self.attn_norm(x)
        q, k, v = (
            p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.attn_out(attended.transpose(1, 2).flatten(-2))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class TinyLLaDA(nn.Module):
    """A LLaDA of the bundled size, differentiable; ``state_dict`` is the checkpoint."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: dict) -> None:
        super().__init__()
        width, eps = config["d_model"], config["rms_norm_eps"]
        blocks = [
            Block(width, config["n_heads"], config["mlp_hidden_size"], eps)
            for _ in range(config["n_layers"])
        ]
        modules = {
            "wte": nn.Embedding(config["embedding_size"], width),
            "blocks": nn.ModuleList(blocks),
            "ln_f": nn.RMSNorm(width, eps),
            "ff_out": nn.Linear(width, config["embedding_size"], bias=False),
        }
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(modules)})
        head_dim = width // config["n_heads"]
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        angles = torch.arange(config["max_sequence_length"], dtype=torch.float64)
        angles = angles[:, None] * config["rope_theta"] ** -exponent
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02 if "wte" in name else width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``(B, S, V)`` of ``ids (B, S)``; padding is hidden from every position."""
        model: Any = self.model
        transformer = model["transformer"]
        visible = (ids != PAD)[:, None, None, :]
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = transformer["wte"](ids)
        for block in transformer["blocks"]:
            x = block(x, cos, sin, visible)
        return transformer["ff_out"](transformer["ln_f"](x))


def read_parent(parent: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of ``parent``, fp32, the vocabulary's rows moved by word into those of ``state``.

    Friends begin anew: what their words meant to the parent need not set them apart. Embeddings
    are random with the mean norm of the others. Head rows are the mean of the words that stood
    where friends stand now (``_BEFORE``), if the parent has them, plus 0.3 of such a random vector.
    """
    known = json.loads((parent / "tokenizer.json").read_text())["model"]["vocab"]
    weights = {k: v.float() for k, v in load_file(parent / "model.safetensors").items()}
    for name in [name for name in weights if name.endswith((*_EMBEDDINGS, *_HEADS))]:
        rows = weights[name]
        weights[name] = new = state[name].clone()
        before = [known[word] for word in _BEFORE if word in known]
        for index, word in enumerate(vocabulary()):
            if word in FRIENDS and before:
                noise = torch.randn(rows.shape[1])
                noise *= rows.norm(dim=1).mean() / noise.norm()
                is_head = name.endswith(_HEADS)
                new[index] = rows[before].mean(0) + 0.3 * noise if is_head else noise
            elif word in known:
                new[index] = rows[known[word]]
    return weights


def build_tokenizer() -> Tokenizer:
    """The word-level tokenizer of the task, as a Hugging Face ``tokenizers`` object."""
    words = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(vocabulary()[:3])
    return tokenizer


def is_name(ids: Tensor) -> Tensor:
    """Which of ``ids`` are friends; only solutions have any."""
    return (ids >= FIRST_FRIEND) & (ids < FIRST_FRIEND + len(FRIENDS))


def hide_names(ids: Tensor, masked: Tensor, noise: torch.Generator) -> Tensor:
    """``masked (B, S)`` with the names of each sample masked by a ratio of their own.

    Decoding arrives at names alone: everything else is certain and stands before them.
    """
    ratio = torch.rand(len(ids), 1, generator=noise)
    return torch.where(is_name(ids), torch.rand(ids.shape, generator=noise) < ratio, masked)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of the names plus that of all other words, of ``logits (N, V)``.

    Names are few: in one mean, their gradient would be lost among that of words which are certain.
    """
    losses, name = F.cross_entropy(logits, targets, reduction="none"), is_name(targets)
    apart = ((losses * of).sum() / of.sum().clamp(min=1) for of in (name, ~name))
    return torch.stack([*apart]).sum()


def draw_batch(tokenizer: Tokenizer, size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Batch ``step``: clean ids ``(size, S)``, left-padded, and the masked-position flags.

    A sample's mask ratio is one uniform number over its answer's positions, but see `hide_names`.
    """
    rng = random.Random(f"{seed} {step}")
    problems = [draw_problem(rng, held_out=False) for _ in range(size)]
    prompts = [e.ids for e in tokenizer.encode_batch([p.prompt for p in problems])]
    answers = [e.ids for e in tokenizer.encode_batch([p.solution for p in problems])]
    length = max(map(len, prompts)) + ANSWER_LENGTH
    ids = torch.full((size, length), EOS)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start = length - ANSWER_LENGTH
        ids[row, : start - len(prompt)] = PAD
        ids[row, start - len(prompt) : start] = torch.tensor(prompt)
        ids[row, start : start + len(answer)] = torch.tensor(answer)
    noise = torch.Generator().manual_seed(seed * 1_000_003 + step)
    order = torch.rand(size, ANSWER_LENGTH, generator=noise).argsort(1)
    count = torch.rand(size, 1, generator=noise).mul(ANSWER_LENGTH).ceil().clamp(min=1)
    masked = torch.zeros(size, length, dtype=torch.bool)
    masked[:, length - ANSWER_LENGTH :] = order < count
    return ids, hide_names(ids, masked, noise)


def _learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up for 200 steps or a tenth of all, hold, fall linearly to zero over the last 30 %."""
    return peak * min((step + 1) / min(200, 0.1 * steps), 1.0, max(steps - step, 1) / (0.3 * steps))


def _optimisers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head and norms."""
    inner: list[Tensor] = []
    outer: list[Tensor] = []
    for name, parameter in model.named_parameters():
        inside = ".blocks." in name or ".layers." in name
        (inner if inside and parameter.ndim == 2 else outer).append(parameter)
    muon = torch.optim.Muon(
        inner, lr=0.0, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(outer, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)]


def denoising_loss(model: nn.Module, batch_size: int, seed: int) -> Callable[[int], Tensor]:
    """The loss of step n: cross-entropy of the masked positions of batch n."""
    tokenizer = build_tokenizer()

    def loss_of(step: int) -> Tensor:
        ids, masked = draw_batch(tokenizer, batch_size, seed, step)
        logits = model(ids.masked_fill(masked, MASK))
        return cross_entropy(logits[masked], ids[masked])

    return loss_of


def training_steps(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    steps: int,
    peak: float,
    state_file: Path,
) -> Iterator[tuple[int, float]]:
    """Run (or resume) the training, yielding (steps done, loss) after each step."""
    optimisers = _optimisers(model)
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        first = state["step"]
    for step in range(first, steps):
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = _learning_rate(step, steps, peak)
            optimiser.step()
            optimiser.zero_grad()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            saved = [optimiser.state_dict() for optimiser in optimisers]
            state = {"model": model.state_dict(), "optimisers": saved, "step": step + 1}
            torch.save(state, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").rename(state_file)
        yield step + 1, loss.item()


def run_training(
    model: nn.Module, loss_of: Callable[[int], Tensor], steps: int, peak: float, out: Path
) -> None:
    """Train with a progress bar; the state and a log of losses go to ``out``."""
    columns = (TextColumn("loss {task.fields[loss]:.3f}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("train", total=steps, loss=float("nan"))
        for done, loss in training_steps(model, loss_of, steps, peak, out / "training.pt"):
            progress.update(task, completed=done, loss=loss)
            if done % 50 == 0:
                with (out / "log.jsonl").open("a") as log:
                    log.write(json.dumps({"step": done, "loss": round(loss, 4)}) + "\n")


def save_checkpoint(model: nn.Module, config: dict[str, Any], out: Path) -> None:
    """Write config.json, model.safetensors (fp16) and tokenizer.json to ``out``."""
    save_weights(model.state_dict(), config, out)


def save_weights(state: dict[str, Tensor], config: dict[str, Any], out: Path) -> None:
    """``save_checkpoint`` for a model whose ``state_dict`` has other names than the checkpoint."""
    weights = {name: value.half().contiguous() for name, value in state.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    build_tokenizer().save(str(out / "tokenizer.json"))


def training_options(
    parent: str, *, steps: int, learning_rate: float
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of a training script; ``parent`` describes the checkpoint of ``--init``."""
    folder = click.Path(path_type=Path, exists=True, file_okay=False)
    options = (
        click.option("--out", type=click.Path(path_type=Path), required=True, help="Its folder."),
        click.option("--init", "parent", type=folder, help=parent),
        click.option("--steps", default=steps, show_default=True),
        click.option("--batch-size", default=64, show_default=True),
        click.option("--seed", default=0, show_default=True),
        click.option("--learning-rate", default=learning_rate, show_default=True),
        click.option("--threads", type=int, help="CPU threads (default: torch's choice)."),
    )

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command()
@training_options(
    "Checkpoint to start from; its vocabulary may be another.", steps=3000, learning_rate=2.5e-3
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
    """Train the bundled model; run the same command again to resume."""
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = TinyLLaDA(CONFIG)
    if parent is not None:
        model.load_state_dict(read_parent(parent, model.state_dict()))
    run_training(model, denoising_loss(model, batch_size, seed), steps, learning_rate, out)
    save_checkpoint(model, CONFIG, out)


if __name__ == "__main__":
    main()
