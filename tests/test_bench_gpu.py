"""The GPU suite without a GPU: its jobs, ledger and report; and the bench of steps on a CPU."""

import csv
import json
from types import SimpleNamespace

import click
import pytest
import torch
from click.testing import CliRunner

from bench import shapes, steps
from bench.baselines import loops
from bench.gpu import first
from bench.gpu import roofline as watch
from bench.gpu import suite as gpu
from bench.ops import run
from pydllm.testing import random_normal
from tests.models import moe_plain

ROOT = gpu.ROOT


def test_every_part_lists_commands_whose_files_exist(tmp_path):
    # Collecting all tests takes a while, and test_csrc.py compiles.
    parts = [part for part in gpu.PARTS if part not in ("build", "tests")]
    result = CliRunner().invoke(gpu.main, ["--dry", *parts])
    assert result.exit_code == 0, result.output
    assert "no such file" not in result.output
    for part in gpu.PARTS:
        listed = gpu.jobs(part, tmp_path, "90a")
        assert listed and len({job.name for job in listed}) == len(listed)
        assert all(job.limit < gpu.BUDGET for job in listed), "a job has to fit into one call"


def test_every_file_with_gpu_tests_and_every_op_has_a_job(tmp_path):
    names = [job.command[-1] for job in gpu.jobs("tests", tmp_path, "90a")]
    assert "tests/decoding/test_host_reads.py" in names and len(names) > 5
    assert all((ROOT / name).exists() for name in names)
    micro = {job.name.split()[1] for job in gpu.jobs("micro", tmp_path, "90a")}
    assert micro == set(run.CASES)


def test_a_missing_file_fails_the_dry_run(tmp_path, monkeypatch):
    job = gpu.Job("x", gpu.python("-m", "bench.nothing"), 1)
    monkeypatch.setattr(gpu, "jobs", lambda part, out, arch: [job])
    assert gpu.dry(("micro",), tmp_path) == 1


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "80"), ((9, 0), "90a"), ((10, 0), "100"), ((12, 0), "120")]
)
def test_arch_of(capability, arch):
    assert gpu.arch_of(capability) == arch


def test_jobs_are_noted_and_taken_up(tmp_path):
    code = {
        "good": "print('fine')",
        "bad": "raise SystemExit(4)",
        "slow": "import time; time.sleep(9)",
    }
    ledger = gpu.Ledger(tmp_path)
    made = {name: gpu.Job(name, gpu.python("-c", text), 60) for name, text in code.items()}
    assert gpu.run(made["good"], ledger, 60) == "ok"
    assert "fine" in (tmp_path / "logs/good.log").read_text()
    assert gpu.run(made["bad"], ledger, 60) == "failed (4)"
    assert gpu.run(made["slow"], ledger, 0.5) == "to do"  # the budget's end, not the job's fault
    short = gpu.Job("short", made["slow"].command, 0.5)
    assert gpu.run(short, ledger, 60) == "too long"
    absent = gpu.Job("absent", ("x",), 1, needs="no-such-program")
    assert gpu.run(absent, ledger, 60).startswith("skipped")
    again = gpu.Ledger(tmp_path)
    assert [again.status(name) for name in ("good", "bad", "slow", "never")] == [
        "ok",
        "failed (4)",
        "to do",
        "to do",
    ]
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps(state | {"commit": "another"}))
    assert gpu.Ledger(tmp_path).status("good") == "to do"


@pytest.mark.parametrize(
    ("codes", "status", "message"),
    [([0, 0], 0, "0 failed, 0 left"), ([0, 1], 1, "1 failed"), ([0, None], 3, "0 failed, 1 left")],
)
def test_exit_status(codes, status, message, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: "NVIDIA X 1")
    monkeypatch.setattr(gpu.torch.cuda, "get_device_capability", lambda: (9, 0))
    text = {None: "import time; time.sleep(9)"}
    listed = [
        gpu.Job(f"job{n}", gpu.python("-c", text.get(code, f"raise SystemExit({code})")), 60)
        for n, code in enumerate(codes)
    ]
    monkeypatch.setattr(gpu, "jobs", lambda part, out, arch: listed)
    result = CliRunner().invoke(gpu.main, ["build", "--out", str(tmp_path), "--budget", "1"])
    assert result.exit_code == status and message in result.output, result.output


def test_without_a_gpu_it_says_so():
    result = CliRunner().invoke(gpu.main, ["build"])
    assert result.exit_code == 1 and "expected a CUDA device" in result.output


def write(path, columns, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def test_report(tmp_path):
    row = {"op": "unmask", "shape": "quota-1x32", "dtype": "bf16", "gpu": "X", "date": "today"}
    times = {"cuda": 0.5, "triton": 0.25, "torch": 2.0, "torch.compile": 1.0}
    write(
        tmp_path / "ops.csv",
        run.COLUMNS,
        [row | {"backend": name, "ms_p50": ms} for name, ms in times.items()],
    )
    step = {"model": "llada-8b", "batch": 1, "prompt": 128, "algorithm": "static", "rows": 32}
    step |= {"floor_ms": 5.0, "of_floor": 1.2, "ms_p50": 6.0, "gpu": "X", "torch": "2.13"}
    write(
        tmp_path / "steps.csv",
        [*steps.COLUMNS, "gpu", "driver", "torch", "triton", "cuda", "commit", "command", "date"],
        [step | {"count": 3}, step | {"count": 30, "ms_p50": 7.0}, {"step": "all"}],
    )
    table = gpu.report(tmp_path)
    assert (
        "| unmask | quota-1x32 | bf16 | 0.5000 | 0.2500 | 1.0000 (torch.compile) | 4.00x |" in table
    )
    assert "| llada-8b | 1 | 128 | static | 32 | 7.00 | 5.00 | 1.20 |" in table
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- gpu results -->\nold\n<!-- end of gpu results -->\nb\n")
    result = CliRunner().invoke(
        gpu.main, ["report", "--out", str(tmp_path), "--readme", str(readme)]
    )
    assert result.exit_code == 0, result.output
    text = readme.read_text()
    assert table in text and "old" not in text and text.startswith("a\n") and text.endswith("b\n")


def test_steps(tmp_path):
    file, picture = tmp_path / "steps.csv", tmp_path / "steps.png"
    options = "--model tiny --device cpu --prompt 6 --new 4 --block 2 --no-compiled --batch 2"
    options += f" --algorithm threshold --csv {file} --plot {picture}"
    result = CliRunner().invoke(steps.main, options.split())
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(file.open()))
    timed = [row for row in rows if row["floor_ms"]]
    assert {row["algorithm"] for row in rows} == {"threshold", "baseline"}
    assert len(timed) >= 2 and picture.stat().st_size > 1000
    for row in timed:
        assert float(row["ms_p50"]) > 0 and float(row["floor_ms"]) > 0
        assert int(row["launches"]) > 10 and int(row["rows"]) in (4, 32)
    (whole,) = [row for row in rows if row["step"] == "all"]
    assert float(whole["tokens_per_s"]) > 0 and float(whole["run_ms"]) > 0


def test_the_floor_counts_weights_keys_and_products():
    model = steps.make_model("tiny", "cpu", run.DTYPES["fp32"])
    layers, head = watch.parameters(model)
    sizes = model.sizes
    kind = watch.Kind(work=[watch.Work(model, 2, 8, 100)], heads=[(model, 8)])
    slot = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim
    moved = 4 * (layers + head + slot * 108)
    slow_copy = watch.Rates(copy=1e6, matmul=1e15)
    milliseconds, bound = kind.floor(slow_copy)
    assert bound == "bytes" and milliseconds == pytest.approx(1e3 * moved / 1e6)
    operations = 2 * 8 * (layers + head) + 4 * sizes.layers * sizes.heads * sizes.head_dim * 8 * 54
    milliseconds, bound = kind.floor(watch.Rates(copy=1e15, matmul=1e6))
    assert bound == "flops" and milliseconds == pytest.approx(1e3 * operations / 1e6)


# Distinct experts and GB of a forward of LLaDA2.0-mini in bf16 by rows, when routes are even and
# independent, worked out by hand from its dimensions: 0.64 GB that every row reads, the head's
# 0.64, and 6.29 MB for an expert of each of 19 layers.
MINI = {1: (8, 2.24), 8: (57, 8.2), 16: (102, 13.5), 32: (163, 20.8), 64: (222, 27.9)}
MINI |= {128: (252, 31.4), 256: (256, 31.9)}


@pytest.mark.parametrize("rows", MINI)
def test_the_floor_of_a_mixture(rows):
    dtype = run.DTYPES["bf16"]
    model = shapes.random_model(shapes.CONFIGS["llada2-mini"], "meta", dtype)
    distinct, gigabytes = MINI[rows]
    read, used = watch.experts(model, rows)
    one = 3 * 2048 * 512
    assert round(read / one / 19) == distinct and used == 8 * one * 19
    kind = watch.Kind(work=[watch.Work(model, 1, rows, 0)], heads=[(model, rows)])
    milliseconds, bound = kind.floor(watch.Rates(copy=1e12, matmul=1e30))
    rounding = 0.006 if rows == 1 else 0.051
    assert bound == "bytes" and milliseconds == pytest.approx(gigabytes, abs=rounding)
    routers = 19 * 256 * 2048
    assert watch.weight_bytes(model, 0) - 2 * watch.parameters(model)[0] == 2 * (routers + 19 * 256)


def test_what_does_not_fit_is_refused_before_it_is_made():
    result = CliRunner().invoke(steps.main, ["--model", "llada2-mini", "--device", "cpu"])
    assert result.exit_code == 2 and "expected a GPU for a mixture of experts" in result.output
    shape = shapes.CONFIGS["llada2-mini"] | {"num_hidden_layers": 2000}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.CONFIGS, "large", shape)
        message = "--model large: expected 6[0-9]+.. GB of free memory on cpu for its torch.float32"
        with pytest.raises(click.UsageError, match=message):
            shapes.make_model("large", "cpu", run.DTYPES["fp32"])


@pytest.mark.parametrize("name", ["llada2", "llada-moe-mixed"])
def test_the_plain_forward_takes_mixtures(name):
    config = moe_plain.CONFIGS[name] | {"block_size": 32}
    model = shapes.random_model(config, "cpu", run.DTYPES["fp32"])
    ids = torch.arange(18).view(2, 9)
    got, _ = loops.PlainForward(model)(ids)
    at, zero = torch.full((2,), 9, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    cache = model.new_cache(2, 0)
    hidden = model.forward(ids, zero, cache, length=at, kv_len=at, commit=zero)
    torch.testing.assert_close(got, model.head(hidden), rtol=0, atol=1e-5)


def test_the_first_six_minutes_are_rehearsed_on_a_cpu(tmp_path, monkeypatch):
    """Budgets add up, a step that fails or runs out of time is reported, and the rest goes on."""
    assert sum(budget for _, budget, _ in first.STEPS) == first.SECONDS == 360
    assert [name for name, *_ in first.STEPS][-1] == "baselines"

    def broken(run):
        yield {"got": 1}
        raise RuntimeError("a driver")

    def endless(run):
        while True:
            yield {"got": 2}

    steps = (*first.STEPS[:1], ("broken", 5, broken), ("endless", 1, endless))
    monkeypatch.setattr(first, "STEPS", (*steps, ("last", 5, lambda run: iter([{"got": 3}]))))
    run = first.Run("cpu", "tiny")
    first.execute(run, tmp_path, 3.0)
    report = json.loads((tmp_path / "first.json").read_text())
    assert report["results"]["broken"] == [{"got": 1}] and report["results"]["last"] == [{"got": 3}]
    assert any("broken: RuntimeError: a driver" in line for line in report["could_not"])
    assert any("endless: out of time after" in line for line in report["could_not"])
    assert any("CUDA kernels" in line for line in report["could_not"])
    assert "## last\n\n| got |" in (tmp_path / "first.md").read_text()


@pytest.mark.parametrize("name", ["correctness", "decisions", "baselines"])
def test_a_first_step_runs_on_a_cpu(name, monkeypatch):
    monkeypatch.setattr(first.Run, "milliseconds", lambda self, call: [call(), 1.0][1])
    once = SimpleNamespace(p50=1.0)
    monkeypatch.setattr(first, "time_calls", lambda *_, **__: once)
    function = next(function for step, _, function in first.STEPS if step == name)
    run = first.Run("cpu", "tiny")
    rows = list(function(run))
    assert rows and all(row.get("right", True) and row.get("invariant", True) for row in rows)


def test_the_layers_that_are_measured_three_ways_are_one_computation():
    x, norm = random_normal(5, 64, seed=0), random_normal(64, seed=1)
    sizes = ((96, 64), (64, 64), (80, 64), (64, 40))
    layers = [[random_normal(*size, seed=2 + layer) / 8 for size in sizes] for layer in range(2)]
    library, own, fused = (
        first.multiply_layers(how, x, norm, layers)
        for how in ("F.linear", "ops.linear", "ops.linear, fused")
    )
    assert torch.equal(fused, own)
    torch.testing.assert_close(own, library, rtol=1e-4, atol=1e-5)
