"""No Triton kernel computes an offset in 32 bits that a tensor's size could exceed."""

import json
import os
import subprocess
import sys

from tests.offsets import products
from tests.packages import ROOT

# 32-bit products that are added to pointers, and what bounds them.
BOUNDED = {
    ("_linear_tile_kernel", "first"),  # a column, below the depth
    ("_multiblock_step_kernel", "offs"),  # a position of the generation region
    ("_vocab_stats_cut_kernel", "found"),  # 0 or 1 times the number of rows
}
KERNEL = """
  tt.func public @kernel(%x_ptr: !tt.ptr<f32>, %rows: i32, %width: i32, %stride_x_row: i32) {
    %c16_i32 = arith.constant 16 : i32
    %row = tt.get_program_id x : i32
    %wide = arith.extsi %row : i32 to i64
    %sum:2 = scf.for %i = %row to %rows step %c16_i32 iter_args(%a = %row, %b = %row) -> (i32) {
      %next = arith.addi %a, @TERM@ : i32
      scf.yield %next, %b : i32, i32
    }
    %x = tt.addptr %x_ptr, %sum#0 : !tt.ptr<f32>, i32
    %y = tt.addptr %x_ptr, %@OFFSET@ : !tt.ptr<f32>, i64
"""


def found(term, *lines, offset="wide"):
    head, loop, tail = KERNEL.partition("    %sum:2")
    text = head + "".join(f"    {line}\n" for line in lines) + loop + tail
    return products(text.replace("@TERM@", term).replace("@OFFSET@", offset))


def test_products_are_found_wherever_they_are_added():
    product = "%at_3 = arith.muli %row, %width : i32"
    assert found("%at_3", product) == ["at"]
    assert found("%rows", product) == []
    assert found("%at_3", "%at_3 = arith.muli %row, %c16_i32 : i32") == []
    assert found("%at_3", "%at_3 = arith.muli %stride_x_row, %c16_i32 : i32") == ["at"]
    widened = "%far = arith.extsi %at_3 : i32 to i64"
    assert found("%rows", product, widened, offset="far") == ["at"]
    # A row that is multiplied by a stride in 64 bits.
    in_64 = "%off = arith.muli %far, %wide : i64"
    assert found("%rows", product, widened, in_64, offset="off") == []


def test_offsets_are_computed_in_64_bits():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.offsets"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({row["kernel"] for row in rows}) > 30
    assert {(row["kernel"], name) for row in rows for name in row["products"]} == BOUNDED
