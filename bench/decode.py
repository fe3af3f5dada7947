"""Time whole decodings against a loop that does what published code does at every step.

    python bench/decode.py --device cpu --model llada-100m
    python bench/decode.py --device cuda --model llada-8b --dtype bf16 --csv bench/results/h100.csv

The weights are random, of the named model's shape: nothing is downloaded, and the time does not
depend on them. The published-style loop runs a plain PyTorch forward over all positions, the LM
head and an fp64 softmax on every row and a top-k per sequence, on the same weights in the same run.
All write as many tokens a forward; the last column is the share of tokens equal to that loop's.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from run import DTYPES, provenance

import pydllm
from pydllm.demo import WEIGHTS
from pydllm.models import NativeModel
from pydllm.models.config import Config
from pydllm.models.families import find_family, make_spec
from pydllm.models.weights import slots

_LLADA = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 500000.0,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
}
CONFIGS = {
    "llada-100m": _LLADA
    | {"d_model": 768, "n_heads": 12, "n_kv_heads": 12, "n_layers": 12, "mlp_hidden_size": 2048},
    "llada-8b": _LLADA
    | {"d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288},
    "dream-7b": {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "mask_token_id": 151666,
        "eos_token_id": 151643,
    },
}


def make_model(name: str, device: str, dtype: torch.dtype) -> NativeModel:
    """The bundled model, or one of the named shape with random weights."""
    if name == "tiny":
        return pydllm.load(WEIGHTS, device=device, dtype=dtype)
    config = Config(CONFIGS[name])
    family = find_family(config)
    sizes = family.sizes(config, family)
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for slot in slots(family.names, sizes):
        tensor = torch.empty(slot.shape, dtype=dtype, device=device)
        if tensor.ndim == 2:
            tensor.normal_(0.0, 0.02, generator=generator)
        elif slot.name.endswith("norm"):
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 0.1, generator=generator)
        weights[slot.name] = tensor
    spec = make_spec(config, family, sizes, None)
    return NativeModel(spec, sizes, weights)


class PublishedLoop:
    """A low-confidence loop as published code has it, on a native model's weights.

    Every step: all positions through the layers, repeated KV heads, the LM head on every row, an
    fp64 softmax over every row, and a top-k for each sequence. Logits are shifted by concatenation
    for the models that need it. No cache, no early stop.
    """

    def __init__(self, model: NativeModel) -> None:
        self.model = model

    def _logits(self, x: Tensor) -> Tensor:
        model, sizes = self.model, self.model.sizes
        half = sizes.rotary // 2
        cos, sin = (t[: x.shape[1]] for t in model._rope.tables(x.shape[1]))

        def rotate(t: Tensor) -> Tensor:
            wide = t.float()
            first, second = wide[..., :half], wide[..., half : 2 * half]
            turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
            return torch.cat((turned.to(t.dtype), t[..., 2 * half :]), -1)

        def norm(t: Tensor, weight: Tensor) -> Tensor:
            wide = t.float()
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + sizes.eps)
            return (wide * scale).to(t.dtype) * weight

        hidden = F.embedding(x, model._embedding)
        heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
        for layer in model._layers:
            qkv = F.linear(norm(hidden, layer.attn_norm), layer.qkv, layer.qkv_bias)
            q, k, v = qkv.unflatten(-1, (-1, sizes.head_dim)).transpose(1, 2).split(heads, 1)
            q, k = rotate(q), rotate(k)
            k, v = (t.repeat_interleave(sizes.heads // sizes.kv_heads, 1) for t in (k, v))
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            hidden = hidden + F.linear(attended, layer.out)
            gate, up = F.linear(norm(hidden, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            hidden = hidden + F.linear(F.silu(gate) * up, layer.down)
        logits = F.linear(norm(hidden, model._norm), model._head)
        if model.spec.shift_logits:
            logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)
        return logits

    @torch.no_grad()
    def decode(self, prompts: Tensor, new: int, block: int, per_step: int) -> Tensor:
        mask_id = self.model.spec.mask_id
        x = F.pad(prompts, (0, new), value=mask_id)
        for stop in range(prompts.shape[1] + block, x.shape[1] + 1, block):
            for _ in range(block // per_step):
                logits = self._logits(x)
                token = logits.argmax(-1)
                confidence = F.softmax(logits.double(), -1).gather(-1, token[..., None])[..., 0]
                masked = x == mask_id
                confidence[:, stop:] = -torch.inf
                confidence = torch.where(masked, confidence, -torch.inf)
                for row in range(x.shape[0]):
                    chosen = confidence[row].topk(per_step).indices
                    x[row, chosen] = token[row, chosen]
        return x


def contenders(
    model: NativeModel, prompts: Tensor, new: int, block: int, per_step: int, backend: str | None
) -> dict[str, Callable[[], tuple[Tensor, int]]]:
    """What is timed, by name: functions that return the sequences and the number of forwards."""

    def published() -> tuple[Tensor, int]:
        return PublishedLoop(model).decode(prompts, new, block, per_step), new // per_step

    def ours(cache: str) -> tuple[Tensor, int]:
        algorithm = pydllm.Static(block, per_step, cache=cache)
        rows = list(prompts.cpu())
        result = pydllm.generate(model, rows, algorithm, max_new_tokens=new, backend=backend)
        return torch.stack(result.sequences), int(result.nfe.max())

    return {
        "published-style loop": published,
        "pydllm, no cache": lambda: ours("none"),
        "pydllm, prefix cache": lambda: ours("prefix"),
        "pydllm, dual cache": lambda: ours("dual"),
    }


@click.command()
@click.option("--model", "name", default="llada-100m", type=click.Choice(["tiny", *CONFIGS]))
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), help="Default: bf16 on cuda.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1))
@click.option("--prompt", "prompt_length", default=128, show_default=True, type=click.IntRange(1))
@click.option("--new", default=128, show_default=True, type=click.IntRange(1))
@click.option("--block", default=32, show_default=True, type=click.IntRange(1))
@click.option("--tokens-per-step", "per_step", default=1, show_default=True)
@click.option("--repeat", default=1, show_default=True, help="Rounds; the median is printed.")
@click.option("--backend", type=click.Choice(["auto", "cuda", "triton", "torch"]))
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Append rows to it.")
def main(
    name: str,
    device: str,
    dtype: str | None,
    batch: int,
    prompt_length: int,
    new: int,
    block: int,
    per_step: int,
    repeat: int,
    backend: str | None,
    csv_file: Path | None,
) -> None:
    """Time the decoders on one model's shape."""
    if new % block or block % per_step:
        raise click.UsageError(
            "expected --new to be a multiple of --block and --block of --tokens-per-step, "
            f"got {new}, {block} and {per_step}"
        )
    dtype = dtype or ("bf16" if device.startswith("cuda") else "fp32")
    model = make_model(name, device, DTYPES[dtype])
    # Ends of sequence would let our decoders stop early: the work is to be the same.
    model.spec = pydllm.models.ModelSpec(**(vars(model.spec) | {"eos_ids": ()}))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, model.spec.vocab_size, (batch, prompt_length), generator=generator)
    prompts = prompts.masked_fill(prompts == model.spec.mask_id, 3).to(device)
    functions = contenders(model, prompts, new, block, per_step, backend)
    seconds: dict[str, list[float]] = {label: [] for label in functions}
    results: dict[str, tuple[Tensor, int]] = {}
    for _ in range(repeat):
        for label, function in functions.items():
            started = time.perf_counter()
            results[label] = function()
            seconds[label].append(time.perf_counter() - started)
    expected = results["published-style loop"][0].cpu()
    rows = []
    for label, (sequences, forwards) in results.items():
        median = statistics.median(seconds[label])
        same = (sequences.cpu() == expected)[:, prompt_length:].float().mean().item()
        rows.append(
            {
                "decoder": label,
                "seconds": round(median, 3),
                "forwards": forwards,
                "ms_per_forward": round(1e3 * median / forwards, 3),
                "tokens_per_s": round(batch * new / median, 2),
                "speedup": round(statistics.median(seconds["published-style loop"]) / median, 2),
                "same_tokens": round(same, 3),
            }
        )
    table = Table(*rows[0], title=f"{name}, {dtype}, batch {batch}, {prompt_length} + {new} tokens")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if csv_file is not None:
        csv_file.parent.mkdir(parents=True, exist_ok=True)
        facts = {"model": name, "dtype": dtype, "batch": batch, "prompt": prompt_length}
        facts |= {"new": new, "block": block, "tokens_per_step": per_step}
        provenances = provenance(device) | {
            "command": "python bench/decode.py " + " ".join(sys.argv[1:])
        }
        new_file = not csv_file.exists()
        with csv_file.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*facts, *rows[0], *provenances])
            if new_file:
                writer.writeheader()
            writer.writerows(facts | row | provenances for row in rows)


if __name__ == "__main__":
    main()
