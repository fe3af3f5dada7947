"""What ``auto`` takes on a GPU, and what a backend asked for by name says, decided without one."""

import json
import re
from pathlib import Path

import pytest
import torch

from pydllm import env, ops
from pydllm._backend import cuda, dispatch, preference
from pydllm._backend.errors import BackendError

GPU = torch.device("cuda", 0)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch):
    """An sm_90 on which both kinds of kernels work."""
    monkeypatch.setattr(dispatch, "cuda_missing", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))


def chosen(triton=None, cuda=None, backend=None, **rest):
    return dispatch.choose(
        "rms_norm", backend, GPU, triton=lambda: triton, cuda=lambda: cuda, **rest
    )


def test_auto_takes_cuda_where_a_measurement_says_so(gpu, monkeypatch):
    assert chosen() == "triton"
    assert chosen(triton="not this shape") == "cuda"
    assert chosen(triton="not this shape", cuda="nor this") == "torch"
    for capability, first in ((90, "cuda"), (100, "triton")):
        monkeypatch.setattr(preference, "CUDA_FASTER", {"rms_norm": {capability: "results.csv"}})
        assert chosen() == first
    monkeypatch.setattr(preference, "CUDA_FASTER", {"rms_norm": {90: "results.csv"}})
    assert chosen(cuda="not this shape") == "triton"
    assert "results.csv" in preference.why("rms_norm", 90)


def test_a_name_never_falls_back(gpu):
    assert chosen(backend="cuda") == "cuda"
    with pytest.raises(BackendError, match="backend 'cuda' cannot run this call: not this shape"):
        chosen(backend="cuda", cuda="not this shape")


@pytest.mark.parametrize(
    "capability, hip, reason",
    [
        ((7, 5), None, r"compute capability 8.0 \(Ampere\), the device has 7.5"),
        ((9, 0), "7.0", "ROCm"),
    ],
)
def test_where_the_kernels_do_not_run_auto_takes_torch_and_says_why(
    capability, hip, reason, monkeypatch, caplog
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(dispatch.env, "TRITON_INTERPRET", False)
    monkeypatch.setattr(dispatch._LOGGER, "filters", [])
    with caplog.at_level("INFO", logger="pydllm"):
        assert chosen() == "torch"
    assert re.search(f"rms_norm: not triton: .*{reason}", caplog.text)
    with pytest.raises(BackendError, match=f"backend 'triton' cannot run this call: .*{reason}"):
        chosen(backend="triton")


def test_the_table_names_ops_with_both_kernels_and_results_that_are_there():
    for op, rows in preference.CUDA_FASTER.items():
        assert (ROOT / f"csrc/{op}.cu").exists() and (ROOT / f"kernels/{op}.py").exists()
        for capability, results in rows.items():
            assert capability in (80, 86, 89, 90, 100, 103, 120)
            assert (ROOT / results).exists()


def test_env_says_which_op_goes_where_and_why(monkeypatch):
    facts = env.report()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["ops"]["rms_norm"]["kernels"] == ["triton", "cuda"]
    assert set(facts["ops"]) <= set(dir(ops))
    if not torch.cuda.is_available():
        assert {plan["auto"] for plan in facts["ops"].values()} == {"torch"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    works = {"cuda": None, "triton": None}
    plan = env._plan("rms_norm", works)
    assert plan["auto"] == "triton" and "not measured to be faster on sm_90" in plan["why"]
    monkeypatch.setattr(preference, "CUDA_FASTER", {"rms_norm": {90: "results.csv"}})
    assert env._plan("rms_norm", works)["auto"] == "cuda"
    plan = env._plan("rms_norm", works | {"cuda": "compiled for 80"})
    assert plan["auto"] == "triton" and plan["why"] == "not cuda: compiled for 80"
    plan = env._plan("certainty_loss", works)
    assert plan["auto"] == "triton" and plan["why"] == "not cuda: there is no such kernel"
    assert re.search(r"op rms_norm +triton and cuda kernels; auto: ", env.to_text(facts))


def test_the_compiler_traces_the_choice(gpu, monkeypatch):
    monkeypatch.setattr(preference, "CUDA_FASTER", {"rms_norm": {90: "results.csv"}})

    @torch.compile(fullgraph=True, backend="eager")
    def double(x):
        return 2 * x if chosen() == "cuda" else x

    assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    assert cuda.runs_on("90a", 90)
