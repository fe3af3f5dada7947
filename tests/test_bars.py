"""The bars of ``make bars``, on a sample of the kernels, and that each bar can be missed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.gpu import bars, sass, step_model

REPOSITORY = Path(__file__).resolve().parent.parent

LISTING = """
.L_x_1:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   LDG.E.U16 R2, [R4.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], [R6.64] ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   DEPBAR.LE SB0, {groups} ;
        /*0050*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/              @!P0 BRA `(.L_x_2) ;
        /*0080*/                   EXIT ;
"""


def run(*arguments: str, change: str = "") -> subprocess.CompletedProcess[str]:
    """``bench/gpu/bars.py`` in a process of its own: here kernels are interpreted."""
    start = f"import sys\nfrom bench.gpu import bars\n{change}\n"
    return process(f"{start}sys.argv = {['bars.py', *arguments]}\nbars.main()")


def process(code: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )


@pytest.mark.parametrize("groups", [0, 6])
def test_a_listing_is_read(groups):
    (loop,) = sass.loops(LISTING.format(groups=hex(groups)), least=2)
    assert loop.instructions == 7
    assert (loop.narrow_loads, loop.copies, loop.mma, loop.mma_waits) == (1, 1, 1, 1)
    assert loop.copies_in_flight == groups
    assert not loop.loads_used_at_once


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("window_attention", "LLaDA, 32 rows, 2k"),
        ("window_attention", "LLaDA, 8 branches of 32"),
        ("route", "sdar-30b torch.bfloat16"),
        ("head_stats", "128 rows"),
        ("verify", "8x32"),
    ],
)
def test_the_bars_are_met(op, case):
    done = run(op, "--case", case)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert op in done.stdout


def test_a_known_miss_is_known_in_its_case_alone():
    assert bars.expected("experts_expand", "unaligned torch.float16") == {"narrow", "overlap"}
    assert bars.expected("experts_expand", "llada2-mini torch.float16") == set()


def test_a_row_of_head_stats_is_summed_alike_in_a_tile_of_few_rows_and_of_many():
    """The same matrix instruction, and as many warps along a row in every sum and maximum."""
    code = """
import re
from bench.gpu import bars, resources
for rows in (32, 128):
    tile, _ = resources.record(bars.head_stats(rows, 0.7), 90)
    text = resources.compile_kernel(tile, 90).asm["ttgir"]
    reduced = set(re.findall(r"\\}\\) : \\(tensor<[^#>]*#(\\w+)", text))
    layout = re.search(r"warpsPerCTA = \\[(\\d+), (\\d+)\\], instrShape = (\\[.*?\\])", text)
    print(tile.constexprs["BLOCK_R"], reduced, *layout.groups(), sep="|")
"""
    few, many = (line.split("|") for line in process(code).stdout.splitlines())
    assert (few[0], many[0]) == ("64", "128")
    assert few[1] == many[1] == "{'mma'}"
    assert few[3:] == many[3:]
    assert int(many[2]) == 2 * int(few[2])


def test_bars_that_are_missed_are_reported():
    change = "bars.ISSUE, bars.WAITS, bars.FLIGHT = 20, 0, 10**6"
    done = run("window_attention", "--case", "LLaDA, 32 rows, 2k", change=change)
    assert done.returncode == 1, done.stdout + done.stderr[-2000:]
    assert all(bar in done.stdout for bar in ("issue:", "serial:", "flight:"))


def test_the_model_of_a_step():
    """Its floors by hand, and that it says what it is."""
    llada = step_model.MODELS["LLaDA-8B"]
    layer = 4 * 4096 * 4096 + 3 * 4096 * 12288
    assert llada.weight_bytes == 2 * (32 * layer + 126464 * 4096)
    moved = llada.weight_bytes + 32 * 2048 * 32 * 128 * 2 * 2
    best = step_model.achievable(step_model.GPUS["h100"], llada, 1, 2048)
    assert best == pytest.approx(moved / (0.9 * 3.35e12))
    for batch in (1, 8, 32):
        found = step_model.step(step_model.GPUS["h100"], llada, batch, 2048)
        predicted = sum(kernel.count * kernel.seconds for kernel in found)
        assert predicted > step_model.achievable(step_model.GPUS["h100"], llada, batch, 2048)
    result = CliRunner().invoke(step_model.main, ["--gpu", "h100", "--kernels"])
    assert result.exit_code == 0
    assert "nothing here was measured" in result.output


def test_the_model_of_a_step_has_the_launches_of_the_native_forward():
    """Counted in the forward of both models, by the library and by ``ops.linear``."""
    code = """
import json
from bench.gpu import launches
for name, window in (("llada-8b", 32), ("dream-7b", 33)):
    for linear in (False, True):
        print(json.dumps(launches.launches(name, 1, window, 2048, linear)))
"""
    done = process(code)
    assert done.returncode == 0, done.stderr[-2000:]
    counted = [json.loads(line) for line in done.stdout.splitlines()]
    wanted = [
        step_model.step(step_model.GPUS["h100"], model, 1, 2048, step_model.Launching(linear))
        for model in step_model.MODELS.values()
        for linear in (False, True)
    ]
    for found, kernels in zip(counted, wanted, strict=True):
        count = {kernel.name: kernel.count for kernel in reversed(kernels)}  # the first merge
        head = sum(count.pop(name) for name in ("head_stats", "unmask", "host between two steps"))
        assert head == 3 and count.pop("small kernels of torch") == step_model.SMALL_KERNELS
        assert found.pop("torch embedding") == 1
        attention = ("window_attention", "window_attention_merge")
        assert [found.pop(name) for name in attention] == [
            count.pop("window_attention"),
            count.pop("  merge"),
        ]
        assert found["rms_norm"] == sum(n for name, n in count.items() if "rms_norm" in name)
        assert found.get("linear_merge", 0) == count.get("  merge of splits", 0)
        assert sum(found.values()) == sum(count.values())
