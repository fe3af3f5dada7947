"""The tile tuner: what it proposes, without a GPU."""

import pytest
import torch
from click.testing import CliRunner

from bench.ops import tune
from pydllm.kernels import _tiles

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("op", sorted(tune.ROWS))
def test_every_row_is_found_once_in_the_table(op, arch):
    source = tune.SOURCE.read_text()
    for dtype in DTYPES:
        for head_dim in (64, 80, 128, 256, 512):
            row = tune.ROWS[op](arch, dtype, head_dim)
            assert row.replace(row.present, source) == source
            changed = row.replace(row.rivals[0], source)
            assert changed != source or row.rivals[0] == row.present


def test_the_fastest_tile_is_proposed():
    row = tune.ROWS["window_attention"](90, torch.bfloat16, 128)
    slow, fast, wrong = row.rivals[:3]
    diff = tune.proposal(row, {slow: 0.95, fast: 0.8, wrong: float("inf")}, least=0.03)
    assert f"-    (90, 2, 128): {tune.literal(row.present)}," in diff
    assert f"+    (90, 2, 128): {tune.literal(fast)}," in diff
    assert diff.startswith("--- a/kernels/_tiles.py")
    assert tune.proposal(row, {slow: 0.99}, least=0.03) == ""
    assert tune.proposal(row, {}, least=0.03) == ""


def test_defaults_are_left_out():
    assert tune.literal(_tiles.AttentionTile(64, 32, 4, 2)) == "AttentionTile(64, 32, 4, 2)"
    assert tune.literal(_tiles.AttentionTile(64, 32, 4, 2, 255)) == (
        "AttentionTile(64, 32, 4, 2, 255)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["window_attention", "--arch", "70"], "'70' is not one of"),
        (["vocab_stats", "--arch", "90", "--shape", "none"], "no shape of vocab_stats contains"),
        (["head_stats", "--arch", "90", "--case", "x"], "expected the beginning of one of"),
        (["unmask"], "'unmask' is not one of"),
    ],
)
def test_bad_options(arguments, message):
    result = CliRunner().invoke(tune.main, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
