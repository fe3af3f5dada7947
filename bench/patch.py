"""Time a forward of a transformers model as it is and patched, in one run, turn by turn.

    python -m bench.patch --device cpu
    python -m bench.patch --device cuda --dtype bf16 --shape 8b

Random weights of a Qwen3 with grouped heads, with a mask that hides nothing (the model sees both
ways, as retrained ones do), with left padding, and as a window of 32 tokens over a cache. Before a
call is timed its results are compared.
"""

from __future__ import annotations

import statistics
import time

import click
import torch

import pydllm
from bench.ops.run import DTYPES

_SHAPES = {  # hidden, layers, heads, KV heads, head size, MLP, tokens
    "tiny": (64, 2, 4, 2, 16, 160, 48),
    "100m": (640, 12, 10, 2, 64, 1792, 256),
    "8b": (4096, 36, 32, 8, 128, 12288, 1024),
}
_WINDOW = 32


def make(shape: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, layers, heads, kv_heads, size, mlp, _ = _SHAPES[shape]
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=size,
    )
    with torch.device(device):
        return Qwen3ForCausalLM(config).to(dtype).eval()


def timed(run, device: str) -> float:
    """Seconds; on a CPU those of the process, which others on the machine do not lengthen."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


@click.command()
@click.option("--device", default="cpu")
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), default="fp32")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(_SHAPES)))
@click.option("--backend", default=None, help="Of the ops.")
@click.option("--repeats", default=9)
@torch.no_grad()
def main(device: str, dtype: str, shapes: tuple[str], backend: str | None, repeats: int) -> None:
    for shape in shapes or ("tiny", "100m"):
        torch.manual_seed(0)
        model = make(shape, device, DTYPES[dtype])
        tokens = _SHAPES[shape][-1]
        ids = torch.randint(4096, (2, tokens), device=device)
        mask = torch.zeros(2, 1, tokens, tokens, dtype=model.dtype, device=device)
        padded = torch.ones_like(ids)
        padded[1, : tokens // 4] = 0
        seen = padded[:, None, None].bool().expand(2, 1, tokens, tokens)
        late = seen[:, :, -_WINDOW:]

        def window(ids=ids, late=late, model=model):
            cache = model(ids[:, :-_WINDOW], use_cache=True).past_key_values
            return lambda: _cached(model, ids[:, -_WINDOW:], cache, late)

        calls = {
            "both ways": lambda: model(ids, attention_mask=mask).logits,  # noqa: B023
            "left padding": lambda: model(ids, attention_mask=seen).logits,  # noqa: B023
            f"{_WINDOW} over a cache": window(),
        }
        for name, run in calls.items():
            times: dict[bool, list[float]] = {False: [], True: []}
            expected = run()
            with pydllm.patch(model, backend=backend):
                got = run()
            used = padded[:, -expected.shape[1] :, None]
            error = ((got - expected) * used).abs().max().item()
            turns, runs = (repeats, 25) if shape == "tiny" else (repeats, 1)
            for _ in range(turns):
                times[False] += [timed(run, device) for _ in range(runs + 1)][1:]
                with pydllm.patch(model, backend=backend):
                    times[True] += [timed(run, device) for _ in range(runs + 1)][1:]
            before, after = (statistics.median(times[key]) * 1e3 for key in (False, True))
            click.echo(
                f"{shape:5} {name:16} {before:9.3f} ms  patched {after:9.3f} ms  "
                f"x {before / after:.3f}  difference {error:.1e}"
            )


def _cached(model, ids, cache, mask):
    logits = model(ids, past_key_values=cache, attention_mask=mask, use_cache=True).logits
    cache.crop(-ids.shape[1])
    return logits


if __name__ == "__main__":
    main()
