"""The bench of ops on a CPU: rows as JSON, the roofline, and other packages' baselines."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from bench.ops import peers, plot, run
from bench.ops.cases import CASES
from pydllm._backend.errors import BackendError


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    """Of a machine that copies 1 GB a second, and multiplies at 1 TFLOP a second."""
    monkeypatch.setattr(run, "copy_rate", lambda device: 1e9)
    monkeypatch.setattr(run, "matmul_rate", lambda device, dtype: 1e12)


def bench(*arguments):
    done = CliRunner().invoke(run.main, [*arguments, "--device", "cpu", "--seconds", "0.001"])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_rows_as_json(tmp_path):
    picture = tmp_path / "deep/linear.png"
    lines = bench("linear", "--shape", "tiny-32", "--json", "--plot", str(picture)).splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["backend"] for row in rows] == ["torch", "F.linear"]
    for row in rows:
        assert (row["op"], row["shape"], row["dtype"]) == ("linear", "tiny-32", "fp32")
        assert row["operations"] == 2 * 32 * 384 * 128
        assert row["bytes"] == 4 * (32 * 128 + 384 * 128 + 32 * 384)
        assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["gbps"] == pytest.approx(row["bytes"] / row["ms_p50"] / 1e6)
        assert row["peak_frac"] == pytest.approx(row["gbps"])
        assert row["commit"] and row["torch"] and row["date"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_several_ops_have_a_plot_and_rows_in_the_table_each(tmp_path):
    table = tmp_path / "ops.csv"
    picture = tmp_path / "roof.png"
    bench("head_stats", "linear", "--shape", "tiny-32", "--csv", str(table), "--plot", str(picture))
    rows = list(csv.DictReader(table.open()))
    assert [row["op"] for row in rows] == ["head_stats"] * 3 + ["linear"] * 2
    assert {file.name for file in tmp_path.glob("*.png")} == {
        "head_stats-roof.png",
        "linear-roof.png",
    }


def test_a_baseline_that_fails_is_noted_and_a_backend_that_fails_is_not(monkeypatch):
    def broken(inputs, backend=None):
        raise NotImplementedError("a layout\nand more")

    monkeypatch.setitem(CASES["linear"].BASELINES, "broken", lambda: broken)
    lines = bench("linear", "--shape", "tiny-32", "--json").splitlines()
    rows = {row["backend"]: row for row in map(json.loads, lines)}
    assert rows["broken"]["note"] == "NotImplementedError: a layout"
    assert rows["F.linear"]["ms_p50"] > 0
    monkeypatch.setattr(CASES["linear"], "call", broken)
    with pytest.raises(NotImplementedError, match="a layout"):
        list(run.measure("linear", ("torch",), "fp32", "cpu", "tiny-32", 0.001))


def test_without_an_op_all_that_have_the_shape_are_timed(monkeypatch):
    seen = []
    monkeypatch.setattr(run, "measure", lambda op, *_: seen.append(op) or [timed(op=op, shape="s")])
    bench("--json", "--shape", "llada-8b-32")
    assert "rms_norm" in seen and "head_stats" in seen and "unmask" not in seen
    done = CliRunner().invoke(run.main, ["unmask", "--shape", "no-such"])
    assert done.exit_code == 2 and "no shape of unmask contains 'no-such'" in done.output


def test_the_roof():
    assert plot.roof(0.5, 1e9, 1e12) == 5e8  # bytes bind
    assert plot.roof(1000, 1e9, 1e12) == 1e12  # the ridge
    assert plot.roof(1e5, 1e9, 1e12) == 1e12  # products bind


def timed(**values):
    row = {"op": "x", "dtype": "bf16", "backend": "torch", "ms_p50": 2.0}
    return row | {"bytes": 4e6, "operations": None} | values


def drawn(rows, monkeypatch, tmp_path):
    """The axes of a plot."""
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure.axes[0]))
    plot.draw(rows, 1e9, 1e12, tmp_path / "x.png")
    (axis,) = kept
    return axis, {line.get_label(): line.get_xydata().tolist() for line in axis.lines}


def test_a_plot_of_operations(monkeypatch, tmp_path):
    rows = [timed(operations=8e6), timed(operations=4e10, backend="triton")]
    rows.append(timed(backend="gone") | {"note": "cannot"})
    del rows[2]["ms_p50"]
    axis, lines = drawn(rows, monkeypatch, tmp_path)
    assert lines["torch"] == [[2.0, 4e9]] and lines["triton"] == [[1e4, 2e13]]
    assert lines["roof"] == [[2 / 3, 2e9 / 3], [1e3, 1e12], [3e4, 1e12]]
    assert set(lines) == {"torch", "triton", "roof"}
    assert axis.get_xscale() == axis.get_yscale() == "log"


def test_a_plot_of_bytes(monkeypatch, tmp_path):
    _, lines = drawn([timed()], monkeypatch, tmp_path)
    assert lines["torch"] == [[4e6, 2e9]]
    assert [y for _, y in lines["copy rate"]] == [1e9, 1e9]


def test_nothing_that_was_timed_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one that was timed"):
        plot.draw([{"op": "x", "note": "cannot"}], 1.0, 1.0, tmp_path / "x.png")


def small(op):
    """The inputs of a case's first tiny shape."""
    case = CASES[op]
    name = next(name for name in case.SHAPES if "tiny" in name)
    return case.make(torch.float32, "cpu", **case.SHAPES[name])


COUNTED = [
    op
    for op, case in CASES.items()
    if hasattr(case, "operations") and any("tiny" in name for name in case.SHAPES)
]


@pytest.mark.parametrize("op", COUNTED)
def test_twice_the_rows_are_twice_the_operations(op):
    case = CASES[op]
    sizes = next(sizes for name, sizes in case.SHAPES.items() if "tiny" in name)
    once, twice = (
        case.operations(case.make(torch.float32, "cpu", **sizes | {"rows": k * sizes["rows"]}))
        for k in (1, 2)
    )
    assert twice == 2 * once > 0


@pytest.mark.parametrize(
    ("op", "label", "name"),
    [
        ("rms_norm", "FlashInfer", "flashinfer"),
        ("rms_norm", "Liger", "liger_kernel"),
        ("swiglu", "FlashInfer", "flashinfer"),
        ("swiglu", "Liger", "liger_kernel"),
        ("window_attention", "flash-attn alone", "flash_attn"),
        ("window_attention", "FlashInfer alone", "flashinfer"),
    ],
)
def test_a_peer_that_is_not_there_says_how_to_get_it(op, label, name, monkeypatch):
    def gone(module):
        raise ImportError(module)

    monkeypatch.setattr(peers.importlib, "import_module", gone)
    run_it = CASES[op].BASELINES[label]()
    with pytest.raises(BackendError, match=rf"{name} is not installed \(pip install "):
        run_it(small(op))


def test_a_peer_on_a_cpu_says_that_it_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: SimpleNamespace())
    with pytest.raises(BackendError, match="flash_attn needs a GPU, the tensors are on cpu"):
        peers.flash_attn(*torch.ones(3, 1, 2, 1, 8).unbind())


class Ragged:
    """FlashInfer's wrapper in torch, from the offsets that it is planned with."""

    def __init__(self, workspace, layout):
        assert workspace.dtype == torch.uint8 and layout == "NHD"

    def plan(self, rows, keys, heads, kv_heads, head_dim, *, causal, q_data_type):
        assert not causal and rows.dtype == keys.dtype == torch.int32
        self.rows, self.keys = rows.tolist(), keys.tolist()
        self.sizes = (heads, kv_heads, head_dim)

    def run(self, q, k, v):
        heads, kv_heads, head_dim = self.sizes
        assert q.shape == (self.rows[-1], heads, head_dim)
        assert k.shape == v.shape == (self.keys[-1], kv_heads, head_dim)
        spans = zip(self.rows, self.rows[1:], self.keys, self.keys[1:], strict=False)
        return torch.cat([attend(q[a:b], k[c:d], v[c:d]) for a, b, c, d in spans])


def attend(q, k, v):
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(-2, -3)


def add_and_norm(x, residual, weight, eps):
    residual.add_(x)
    x.copy_(F.rms_norm(residual, weight.shape, weight, eps))


def silu_and_mul(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


STAND_INS = {
    "flashinfer": SimpleNamespace(
        BatchPrefillWithRaggedKVCacheWrapper=Ragged,
        fused_add_rmsnorm=add_and_norm,
        silu_and_mul=silu_and_mul,
    ),
    "flash_attn": SimpleNamespace(flash_attn_func=lambda q, k, v, causal: attend(q, k, v)),
    "liger_kernel.ops": SimpleNamespace(
        LigerFusedAddRMSNormFunction=SimpleNamespace(
            apply=lambda x, r, w, eps: (F.rms_norm(x + r, w.shape, w, eps), x + r)
        ),
        LigerSiLUMulFunction=SimpleNamespace(apply=lambda gate, up: F.silu(gate) * up),
    ),
}


@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "window_attention"])
def test_peers_are_given_what_they_take(op, monkeypatch):
    """Stand-ins of their functions in torch come to the op's result, at grouped heads as well."""
    monkeypatch.setattr(peers, "package", lambda name, *_: STAND_INS[name])
    case = CASES[op]
    sizes = next(s for n, s in case.SHAPES.items() if "tiny" in n)
    if op == "window_attention":
        sizes = {**sizes, "heads": 4, "batch": 3, "rows": 8, "branches": 2}
    inputs = case.make(torch.float32, "cpu", **sizes)
    labels = {"FlashInfer", "Liger", "FlashInfer alone", "flash-attn alone"} & set(case.BASELINES)
    assert len(labels) == 2
    for label in labels:
        baseline = case.BASELINES[label]()
        for _ in range(2):  # and again, from what was planned or prepared
            assert run.is_right(case, inputs, baseline, strict=False), label


def test_an_8_bit_weight_is_widened_once_and_not_while_it_is_timed(monkeypatch):
    from pydllm.ops import QuantizedWeight

    case = CASES["linear"]
    inputs = case.make(torch.float32, "cpu", rows=4, width=128, depth=128, kind="int8")
    widened = []
    plain = QuantizedWeight.dequantize
    monkeypatch.setattr(
        QuantizedWeight,
        "dequantize",
        lambda weight, dtype: widened.append(1) or plain(weight, dtype),
    )
    dense = case.BASELINES["F.linear"]()
    for _ in range(3):
        dense(run.copied(inputs))
    assert len(widened) == 1
