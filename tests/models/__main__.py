"""Logits of every family against independent forwards: how many comparisons are equal.

    python -m tests.models                         # all configurations, 4 random models of each
    python -m tests.models nemotron coda --models 20

For each mask that a model is run under, in fp64 and to 1e-10: all positions at once; windows over a
cache of keys and values; rows of several lengths, padded on the left, each as if alone. Then, in
fp32, ``pydllm verify``: logits and greedy continuations of a class of transformers, where one has
the same weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydllm.models import load
from pydllm.models.native import NativeModel
from pydllm.models.verify import verify
from tests.models import moe_plain
from tests.models.plain import CONFIGS, RECENT, random_plain, write_checkpoint

EXACT = 1e-10
ROWS = 20  # more than the original lengths of scaled rotary embeddings
PAD = (0, 7, 12)
Reference = Callable[[Tensor, dict[str, Any]], Tensor]
Found = tuple[str, float]


def main(arguments: list[str] | None = None) -> int:
    dense = CONFIGS | RECENT
    known = [*dense, *moe_plain.CONFIGS]
    parser = argparse.ArgumentParser(prog="python -m tests.models", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--models", type=int, default=4, help="random models of a configuration")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - set(known))
    if unknown:
        parser.error(f"expected names among {', '.join(known)}, got {', '.join(unknown)}")
    totals: Counter[str] = Counter()
    differs = False
    for name in given.names or known:
        counts: Counter[str] = Counter()
        equal: Counter[str] = Counter()
        worst, public = 0.0, ""
        for seed in range(given.models):
            with tempfile.TemporaryDirectory() as folder:
                make = _dense if name in dense else _mixture
                model, reference, kinds = make(Path(folder), name, seed)
                for title, apart in compare(model, reference, kinds, seed):
                    counts[title] += 1
                    equal[title] += apart <= EXACT
                    worst = max(worst, apart)
                report = verify(folder, device="cpu", dtype=torch.float32, new_tokens=8)
            public = str(report.facts["compared with"])
            for check in report.checks:
                if public in check.name:
                    counts[public] += 1
                    equal[public] += check.passed
        found = [f"{title} {equal[title]} of {count}" for title, count in counts.items()]
        print(f"{name}: {', '.join(found)}; at most {worst:.1e} apart", flush=True)
        differs |= equal != counts
        for title, count in counts.items():
            kind = "public class" if title == public else title
            totals[kind] += count
            totals[f"{kind}, equal"] += equal[title]
    kinds = [kind for kind in totals if not kind.endswith(", equal")]
    found = [f"{kind} {totals[f'{kind}, equal']} of {totals[kind]}" for kind in kinds]
    print(f"in all: {', '.join(found)}")
    return int(differs)


def _dense(folder: Path, name: str, seed: int) -> tuple[NativeModel, Reference, Iterator[str]]:
    plain = random_plain((CONFIGS | RECENT)[name], seed)
    model = load(write_checkpoint(folder, plain), device="cpu", dtype=torch.float64)

    def kinds() -> Iterator[str]:
        yield "full"
        yield "causal"
        if model.spec.attention == "block_causal" and model.spec.context == "block":
            yield "block_causal"

    return model, lambda ids, options: plain(ids, **options)[1], kinds()


def _mixture(folder: Path, name: str, seed: int) -> tuple[NativeModel, Reference, Iterator[str]]:
    config = moe_plain.CONFIGS[name]
    weights = moe_plain.random_weights(config, seed, torch.float64)
    moe_plain.write_moe(folder, config, weights)
    model = load(folder, device="cpu", dtype=torch.float64)
    kinds = iter((model.spec.attention,))  # the independent forward has the model's own mask
    return model, lambda ids, options: moe_plain.forward(config, weights, ids)[1], kinds


def compare(
    model: NativeModel, reference: Reference, kinds: Iterator[str], seed: int
) -> Iterator[Found]:
    """What was compared, and the largest difference of two logits."""
    generator = torch.Generator().manual_seed(seed)
    size = model.spec.block_size or 1
    at_prompt = model.spec.block_origin == "prompt"
    for kind in kinds:
        options = {"full": {}, "causal": {"causal": True}, "block_causal": {"block": size}}[kind]
        shift = [(3 * row) % size if at_prompt and kind == "block_causal" else 0 for row in (1, 2)]
        ids = torch.randint(model.spec.vocab_size, (2, ROWS), generator=generator)
        expected = torch.stack(
            [
                reference(row, options | ({"offset": by} if by else {}))
                for row, by in zip(ids, shift, strict=True)
            ]
        )
        cache = model.new_cache(2, ROWS)
        whole = _run(model, ids, 0, ROWS, cache, kind, shift)
        yield "full", _apart(whole, expected)
        if kind == "full":
            got = _run(model, ids, 6, 13, cache, kind, shift, seen=ROWS)
            yield "cached", _apart(got, expected[:, 6:13])
        else:
            cuts = (3, 4, 13) if kind == "causal" else range(0, ROWS + size, size)
            for row, by in enumerate(shift):  # a window ends where a block does
                own = model.new_cache(1, ROWS)
                ends = [cut - by for cut in cuts if 0 < cut - by < ROWS] + [ROWS]
                starts = [0, *ends[:-1]]
                parts = [
                    _run(model, ids[row : row + 1], start, end, own, kind, [by])
                    for start, end in zip(starts, ends, strict=True)
                ]
                yield "cached", _apart(torch.cat(parts, 1)[0], expected[row])
        ids = torch.randint(model.spec.vocab_size, (len(PAD), ROWS), generator=generator)
        shift = [
            (3 * row) % size if at_prompt and kind == "block_causal" else 0 for row in (0, 1, 2)
        ]
        got = _run(model, ids, 0, ROWS, model.new_cache(3, ROWS), kind, shift, pad=PAD)
        for row, first in enumerate(PAD):
            by = {"offset": shift[row]} if shift[row] else {}
            yield "batch", _apart(got[row, first:], reference(ids[row, first:], options | by))


def _run(
    model: NativeModel,
    ids: Tensor,
    start: int,
    stop: int,
    cache: Any,
    kind: str,
    shift: list[int],
    *,
    seen: int | None = None,
    pad: tuple[int, ...] | None = None,
) -> Tensor:
    """Logits of positions ``[start, stop)``, stored unless more is ``seen``."""

    def numbers(value: int) -> Tensor:
        return torch.full((len(ids),), value, dtype=torch.int32)

    more: dict[str, Any] = {} if pad is None else {"pad": torch.tensor(pad, dtype=torch.int32)}
    if kind == "block_causal" and model.spec.block_origin == "prompt":
        more["block_offset"] = torch.tensor(shift, dtype=torch.int32)
    hidden = model.forward(
        ids[:, start:stop],
        numbers(start),
        cache,
        length=numbers(stop - start),
        kv_len=numbers(stop if seen is None else seen),
        commit=numbers(stop - start if seen is None else 0),
        attention=kind,
        **more,
    )
    return model.head(hidden)


def _apart(got: Tensor, expected: Tensor) -> float:
    apart = (got - expected).abs().max().item()
    return apart if apart == apart else float("inf")


if __name__ == "__main__":
    sys.exit(main())
