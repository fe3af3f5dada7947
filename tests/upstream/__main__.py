"""Compare the drop-in functions and the tests' restatements with the published files.

    python -m tests.upstream --dir CHECKOUTS                  # all of them
    python -m tests.upstream llada d3llm --dir CHECKOUTS --cases 1000 --seed 1

``tests/upstream/sources.py`` says how the checkouts lie. An upstream whose files are absent is
skipped, with the reason. The exit status is 1 if a drop-in or a restatement differs from what was
published.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from tests.upstream import (
    apd_loops,
    block_loops,
    d2f_loops,
    d3llm_loops,
    diffulex_loops,
    dream_loops,
    family_loops,
    freedave_loops,
    llada_loops,
    s2d2_loops,
    sglang_loops,
)
from tests.upstream.compare import Loader, compare
from tests.upstream.sources import Absent, Checkouts

UPSTREAMS: dict[str, Loader] = {
    "llada": llada_loops.load_llada,
    "fast-dllm": llada_loops.load_fast_dllm,
    "fast-dllm-24cc59e": llada_loops.load_fast_dllm_2025,
    "fast-dllm-dream": dream_loops.load_fast_dllm,
    "dream": dream_loops.load_dream,
    "d3llm-llada": d3llm_loops.load_llada,
    "d3llm-dream": d3llm_loops.load_dream,
    "sdar": block_loops.load_sdar,
    "llada2": block_loops.load_llada2,
    "llada2.1": block_loops.load_llada21,
    "d2f": d2f_loops.load_d2f,
    "diffulex": diffulex_loops.load_diffulex,
    "diffusers": block_loops.load_diffusers,
    "sglang": sglang_loops.load_sglang,
    "fast-dllm-v2": family_loops.load_fast_dllm_v2,
    "bd3lm": family_loops.load_bd3lm,
    "stable-diffcoder": family_loops.load_stable_diffcoder,
    "nemotron": family_loops.load_nemotron,
    "s2d2": s2d2_loops.load_s2d2,
    "freedave": freedave_loops.load_freedave,
    "apd": apd_loops.load_apd,
}
SHOWN = 8  # differences of a loop


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.upstream", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(UPSTREAMS)}")
    parser.add_argument("--dir", type=Path, help="the checkouts; default: PYDLLM_UPSTREAM_DIR")
    parser.add_argument("--cases", type=int, default=500, help="of an upstream, at least")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - set(UPSTREAMS))
    if unknown:
        parser.error(f"expected names among {', '.join(UPSTREAMS)}, got {', '.join(unknown)}")
    named = os.environ.get("PYDLLM_UPSTREAM_DIR")
    folder = given.dir or (Path(named) if named else None)
    differing = [name for name in given.names or UPSTREAMS if _run(name, folder, given)]
    return 1 if differing else 0


def _run(name: str, folder: Path | None, given: argparse.Namespace) -> bool:
    """Whether something differs."""
    try:
        loops = UPSTREAMS[name](Checkouts(folder))
    except Absent as reason:
        print(f"{name}: skipped: {reason}")
        return False
    differs = False
    for title, loop in loops.items():
        start = time.perf_counter()
        report = compare(loop, -(-given.cases // len(loops)), given.seed)
        line = f"{name}: {title}: {report.equal} of {report.calls} equal"
        if report.ties:
            line += f", {report.ties} ties"
        if report.restated:
            line += f", restated {report.restated_equal} of {report.restated}"
        if report.failures:
            line += f"; the original failed in {report.failures.total()} more"
        print(f"{line} ({time.perf_counter() - start:.0f} s)", flush=True)
        for text, count in report.failures.most_common(3):
            print(f"    the original, {count} times: {text}", flush=True)
        for text in report.differences[:SHOWN]:
            print(f"    {text}", flush=True)
        hidden = len(report.differences) - SHOWN
        if hidden > 0:
            print(f"    and {hidden} more")
        differs |= bool(report.differences)
    return differs


if __name__ == "__main__":
    sys.exit(main())
