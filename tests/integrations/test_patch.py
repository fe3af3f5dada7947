"""patch: what it replaces, and that it leaves no trace."""

import copy
import logging
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pydllm
from pydllm import PydllmError
from pydllm.integrations.patch import attention as attention_file
from pydllm.integrations.patch import layers as layers_file
from tests.integrations import stand_ins
from tests.integrations.stand_ins import KINDS, VOCAB, of

IDS = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
LONG = 5  # cached slots
PADDED = torch.ones(2, 12, dtype=torch.long)
PADDED[1, :4] = 0
BLOCKS = (torch.arange(12)[:, None] // 4 >= torch.arange(12) // 4)[None, None]
RANDOM = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(3)) < 0.7


def caches(model, batch=2):
    generator = torch.Generator().manual_seed(4)
    kv = stand_ins.KV_HEADS
    one = torch.randn(batch, kv, LONG, stand_ins.DIM, generator=generator)
    return tuple((one + i, one * (i + 1)) for i in range(len(model.layers)))


CALLS = {
    "dense": lambda m: m(IDS),
    "window over a cache": lambda m: m(IDS[:, :3], None, caches(m)),
    "keys of padding": lambda m: m(IDS, PADDED.bool()[:, None, None]) * PADDED[..., None],
    "rows of padding too": lambda m: (
        m(IDS, PADDED.bool()[:, None, None] & PADDED.bool()[:, None, :, None]) * PADDED[..., None]
    ),
    "block-causal": lambda m: m(IDS, BLOCKS),
    "a mask of no form": lambda m: m(IDS, RANDOM),
}


def run(model):
    with torch.no_grad():
        return {name: call(model) for name, call in CALLS.items()}


def state(model):
    return [dict(module.__dict__) for module in model.modules()]


def assert_state(model, before):
    for now, then in zip(state(model), before, strict=True):
        assert now.keys() == then.keys()
        assert all(now[name] is then[name] for name in then)


def close(got, expected):
    for name in expected:
        largest = expected[name].abs().max().item()
        error = (got[name] - expected[name]).abs().max().item()
        # Two fp32 forwards of two layers: some roundings each of the largest logit.
        assert error <= 64 * torch.finfo(torch.float32).eps * largest, (name, error, largest)


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("kind", KINDS)
def test_use_and_restore(kind, backend):
    model = of(KINDS[kind])()
    expected, before = run(model), state(model)
    classes = {type(module): dict(type(module).__dict__) for module in model.modules()}
    globals_before, sdpa = dict(vars(stand_ins)), F.scaled_dot_product_attention
    patched = pydllm.patch(model, backend=backend, self_check=True)
    close(run(model), expected)
    report = patched.report
    replaced = {found.kind: found.op for found in report.replaced}
    if backend == "torch":
        assert replaced[kind] == "window_attention"
        assert report.calls["window_attention"] >= 10
        # 2 layers of the mask without a form; where layers make their own, some more
        assert report.calls["as before: a mask that the op has no argument for"] >= 2
        assert {"rms_norm", "window_attention"} <= set(replaced.values())
    elif kind == "UnheardOfAttention":
        assert replaced == {}
    else:
        assert replaced == {kind: "SDPA, grouped: keys and values are not repeated"}
        assert report.calls == {"SDPA, grouped": 12}
    assert kind in repr(patched) and ("replaced: 2 x" in str(report)) == bool(replaced)
    patched.restore()
    assert_state(model, before)
    after = run(model)
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert all(dict(kind.__dict__) == then for kind, then in classes.items())
    assert vars(stand_ins).keys() == globals_before.keys()
    assert F.scaled_dot_product_attention is sdpa
    assert patched.report.calls == report.calls  # nothing was called after the end
    patched.restore()  # again: nothing happens
    assert repr(patched).startswith("restored Model")


def test_the_interpreted_kernels():
    model = of(stand_ins.DreamSdpaAttention)()
    expected = run(model)
    with pydllm.patch(model, backend="triton", self_check=True) as patched:
        close(run(model), expected)
    assert patched.report.calls["window_attention"] >= 10
    assert patched.report.calls["rms_norm"] == patched.report.calls["swiglu"] * 2 == 24


def test_a_bias_that_every_block_casts_is_cast_and_read_once():
    """LLaDA in bf16 with padding: the bias stays fp32, and each block would make its own."""
    model = of(stand_ins.LLaDALlamaBlock)().double()
    lowest = torch.finfo(torch.float32).min
    bias = torch.zeros(2, 1, 12, 12).masked_fill(~PADDED.bool()[:, None, None], lowest)
    with torch.no_grad():
        expected = model(IDS, bias)
        with pydllm.patch(model, backend="torch", self_check=True) as patched:
            for _ in range(10):
                got = model(IDS, bias)
            masks = patched._options.masks
            assert (masks.calls, masks.looks) == (20, 1)
            bias[0, :, :, :3] = lowest  # written in place: another mask
            model(IDS, bias)
            assert masks.looks == 2
    assert ((got - expected) * PADDED[..., None]).abs().max() < 1e-12
    assert patched.report.calls["window_attention"] == 22


def test_keys_are_not_repeated_where_the_forward_repeats_them():
    """What makes a CPU faster: SDPA gets the KV heads as they are."""
    model = of(stand_ins.DreamSdpaAttention)()
    seen = []
    real = attention_file.grouped

    def spy(q, k, v, *args, **kwargs):
        seen.append((q.shape[1], k.shape[1]))
        return real(q, k, v, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkey, pydllm.patch(model, backend=None):
        monkey.setattr(attention_file, "grouped", spy)
        run(model)
    assert seen == [(stand_ins.HEADS, stand_ins.KV_HEADS)] * 12


@pytest.mark.parametrize("kind", KINDS)
def test_the_other_model_is_untouched(kind):
    one, other = of(KINDS[kind])(), of(KINDS[kind])(seed=1)
    expected, before = run(other), state(other)
    with pydllm.patch(one, backend="torch") as patched:
        run(one)
        calls = patched.report.calls
        again = run(other)
        assert patched.report.calls == calls
        assert_state(other, before)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["UnheardOfAttention", "DreamSdpaAttention"])
def test_threads(kind):
    """One thread runs a patched model, the other one that is not, at the same time."""
    one, other = of(KINDS[kind])(), of(KINDS[kind])(seed=1)
    expected_one, expected_other = run(one), run(other)
    barrier, failed = threading.Barrier(2), []

    def work(model, check):
        barrier.wait()
        for _ in range(8):
            try:
                check(run(model))
            except BaseException as error:  # noqa: BLE001 - shown by the assertion below
                failed.append(error)

    def exactly(got):
        assert all(torch.equal(got[name], expected_other[name]) for name in got)

    with pydllm.patch(one, backend="torch") as patched:
        threads = [
            threading.Thread(target=work, args=(one, lambda got: close(got, expected_one))),
            threading.Thread(target=work, args=(other, exactly)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        calls = patched.report.calls
    assert failed == []
    attention = {k: v for k, v in calls.items() if not k.startswith(("rms", "swiglu"))}
    assert sum(attention.values()) == 8 * len(CALLS) * 2  # none of the other thread's


def test_patched_and_restored_from_many_threads():
    model = of(stand_ins.DreamSdpaAttention)()
    before, failed = state(model), []

    def work():
        try:
            for _ in range(20):
                with pydllm.patch(model, backend="torch"):
                    pass
        except PydllmError as error:  # another thread's restore came between patch and with
            if "was restored" not in str(error):
                failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    pydllm.patch(model, backend="torch").restore()
    assert_state(model, before)


def test_idempotent():
    model = of(stand_ins.DreamSdpaAttention)()
    before = state(model)
    first = pydllm.patch(model, backend="torch")
    inside = state(model)
    assert pydllm.patch(model, backend="torch") is first
    assert_state(model, inside)
    with pytest.raises(ValueError, match="expected backend 'torch' and self_check False"):
        pydllm.patch(model, self_check=True)
    with pytest.raises(PydllmError, match=r"self_attn: is patched already, with Model: restore"):
        pydllm.patch(model.layers[0])
    first.restore()
    with (
        pydllm.patch(model.layers[0], backend="torch"),
        pytest.raises(PydllmError, match=r"layers\.0: is patched already, with Layer: restore"),
    ):
        pydllm.patch(model)
    with pydllm.patch(model), pydllm.patch(model) as nested:
        pass
    assert not nested.active
    with pytest.raises(PydllmError, match="was restored: call pydllm.patch again"), nested:
        pass
    assert_state(model, before)


def test_an_error_inside_restores():
    model = of(stand_ins.LLaDALlamaBlock)()
    before = state(model)
    with pytest.raises(RuntimeError, match="mine"), pydllm.patch(model):
        raise RuntimeError("mine")
    assert_state(model, before)


def test_an_error_while_patching_restores(monkeypatch):
    model = of(stand_ins.DreamSdpaAttention)()
    before = state(model)
    monkeypatch.setattr(layers_file, "_random", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pydllm.patch(model, backend="torch")
    assert_state(model, before)


WRONG = {
    "attention": (attention_file.ops, "window_attention", "attention of layers.0"),
    "norm": (layers_file.ops, "rms_norm", "layers.0.input_layernorm"),
    "gate": (layers_file.ops, "swiglu", "layers.0.mlp"),
}


@pytest.mark.parametrize("op", WRONG)
def test_self_check_finds_a_wrong_op(op, monkeypatch):
    model = of(stand_ins.DreamSdpaAttention)()
    where, name, said = WRONG[op]
    real = getattr(where, name)
    with pydllm.patch(model, backend="torch", self_check=True), torch.no_grad():
        monkeypatch.setattr(where, name, lambda *a, **k: real(*a, **k) * (1 + 1e-5))
        with pytest.raises(PydllmError, match=f"self-check: .*{said}.*: expected to be within"):
            model(IDS)
        with pytest.raises(PydllmError, match=said):  # and the next call again
            model(IDS)
    monkeypatch.undo()
    with pydllm.patch(model, backend="torch"), torch.no_grad():
        monkeypatch.setattr(where, name, lambda *a, **k: real(*a, **k) * (1 + 1e-5))
        model(IDS)  # not asked for, not checked


def test_what_only_looks_like_a_norm_or_a_gate_is_left():
    model = of(stand_ins.DreamSdpaAttention)()
    model.layers[0].input_layernorm.__class__ = stand_ins.GemmaRMSNorm
    model.layers[1].mlp.act_fn = F.gelu
    model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: None)
    model.layers[1].post_attention_layernorm.bias = torch.zeros(stand_ins.WIDTH)
    expected = run(model)
    with pydllm.patch(model, backend="torch") as patched:
        close(run(model), expected)
    reasons = {found.name: found.reason for found in patched.report.left}
    assert reasons == {
        "layers.0.input_layernorm": "computes something else on a random input",
        "layers.1.mlp": "its activation is not SiLU",
        "layers.0.mlp": "its projections are no plain Linear",
        "layers.1.post_attention_layernorm": "has a bias",
    }


def test_hooks_on_projections_still_run():
    model = of(stand_ins.DreamSdpaAttention)()
    seen = []
    with pydllm.patch(model, backend="torch") as patched, torch.no_grad():
        handle = model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
        model(IDS)
        handle.remove()
        model(IDS)
    assert seen == [1]
    assert patched.report.calls["swiglu"] == 3


def test_a_gradient_is_still_there():
    model = of(stand_ins.DreamSdpaAttention)()
    model(IDS).logsumexp(-1).sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with pydllm.patch(model, backend="torch") as patched:
        model(IDS).logsumexp(-1).sum().backward()
        assert all(what.startswith("as before: a grad") for what in patched.report.calls)
    got = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", ["LLaDALlamaBlock", "UnheardOfAttention"])
def test_dropout_stays(kind, monkeypatch):
    model = of(KINDS[kind])()
    calls = []
    real = F.scaled_dot_product_attention

    def dropping(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        calls.append(dropout_p)
        return real(q, k, v, attn_mask)

    function = "_scaled_dot_product_attention"
    with pydllm.patch(model, backend="torch") as patched, torch.no_grad():
        if kind == "LLaDALlamaBlock":
            monkeypatch.setattr(stand_ins.F, "scaled_dot_product_attention", dropping)
            q = torch.ones(1, stand_ins.HEADS, 2, stand_ins.DIM)
            k = q[:, : stand_ins.KV_HEADS]
            getattr(model.layers[0], function)(q, k, k, dropout_p=0.5)
            assert calls == [0.5]
        else:
            monkeypatch.setattr(
                stand_ins, "deep", lambda q, k, v, _: real(q, k, v, dropout_p=0.999)
            )
            model(IDS)
    assert patched.report.calls["as before: dropout"] >= 1
    assert "window_attention" not in patched.report.calls


def test_autocast_stays_as_it_was():
    model = of(stand_ins.DreamSdpaAttention)()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(IDS)
        with pydllm.patch(model, backend="torch") as patched:
            assert torch.equal(model(IDS), expected)
    assert patched.report.calls["as before: autocast"] == 8


def test_attention_that_calls_no_sdpa_is_found_out():
    model = of(stand_ins.EagerAttention)()
    expected = run(model)
    with pydllm.patch(model, backend="torch") as patched:
        close(run(model), expected)
    missed = [what for what in patched.report.calls if "called no scaled_dot_product" in what]
    assert len(missed) == 2 and "window_attention" not in patched.report.calls


def test_on_a_cpu_attention_without_groups_stays():
    model = stand_ins.Model(lambda: stand_ins.LLaDALlamaBlock(stand_ins.HEADS))
    before = state(model)
    with pydllm.patch(model) as patched:
        now = state(model)
        assert now[0].pop("_pydllm_patched") is patched
        assert all(a.keys() == b.keys() for a, b in zip(now, before, strict=True))
    assert patched.report.replaced == ()
    assert "as many KV heads as query heads" in str(patched.report)


def test_flash_attn_is_left():
    model = of(stand_ins.LLaDALlamaBlock)()
    model.layers[0].flash_attn_func = lambda *_: None
    with pydllm.patch(model) as patched:
        assert [f.reason for f in patched.report.left if f.part == "attention"] == [
            "calls flash_attn"
        ]


def test_a_copy_is_refused():
    model = of(stand_ins.LLaDALlamaBlock)()
    with pydllm.patch(model):
        for fails in (copy.deepcopy, pickle.dumps):
            with pytest.raises(PydllmError, match="restore it first"):
                fails(model)
    copy.deepcopy(model)


def test_what_was_replaced_after_us_stays(caplog):
    model = of(stand_ins.DreamSdpaAttention)()
    patched = pydllm.patch(model)
    mine = model.layers[0].self_attn.forward = lambda *_: None
    with caplog.at_level(logging.WARNING, logger="pydllm"):
        patched.restore()
    assert model.layers[0].self_attn.forward is mine
    assert "replaced after us" in caplog.text


def test_the_report_is_logged_once(caplog):
    model = of(stand_ins.DreamSdpaAttention)()
    with caplog.at_level(logging.INFO, logger="pydllm"):
        pydllm.patch(model)
        pydllm.patch(model)
    assert caplog.text.count("patched Model") == 1
    assert "replaced: 2 x DreamSdpaAttention: attention -> SDPA, grouped" in caplog.text
    assert "left as it is: 4 x DreamRMSNorm" in caplog.text


SUPPORTED = "supported are\n.*LLaDALlamaBlock.*\n.*DreamSdpaAttention(.*\n)*.*ALL_ATTENTION"


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Linear(3, 3)), nn.TransformerEncoderLayer(8, 2), nn.Identity()]
)
def test_nothing_recognised(model):
    before = state(model)
    with pytest.raises(PydllmError, match=f"{type(model).__name__}: found nothing.*{SUPPORTED}"):
        pydllm.patch(model)
    assert_state(model, before)


def test_bad_arguments():
    model = of(stand_ins.DreamSdpaAttention)()
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        pydllm.patch("GSAI-ML/LLaDA-8B-Instruct")
    with pytest.raises(ValueError, match="backend: expected one of auto, .* got 'fast'"):
        pydllm.patch(model, backend="fast")
    model.layers[0].compile()
    with pytest.raises(PydllmError, match=r"layers\.0: expected no compiled module"):
        pydllm.patch(model)


@pytest.mark.parametrize("kind", ["DreamSdpaAttention", "LLaDALlamaBlock", "UnheardOfAttention"])
def test_compiled_afterwards(kind):
    """The whole model is one graph, without a break."""
    model = of(KINDS[kind])()
    expected = run(model)
    with pydllm.patch(model, backend="torch"), torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        close({"dense": compiled(IDS)}, {"dense": expected["dense"]})
        mask = PADDED.bool()[:, None, None]  # its values cannot be known: to SDPA as it is
        close(
            {"keys of padding": compiled(IDS, mask) * PADDED[..., None]},
            {"keys of padding": expected["keys of padding"]},
        )


@pytest.mark.parametrize(
    "kind, name",
    [
        ("LLaDALlamaBlock", "_scaled_dot_product_attention"),
        ("LLaDALlamaBlock", "_cast_attn_bias"),
        ("DreamSdpaAttention", "repeat_kv"),
    ],
)
def test_a_changed_signature_is_refused(monkeypatch, kind, name):
    """Remote code whose functions take other arguments than those that ours stand in for."""
    model = of(KINDS[kind])()
    before = state(model)
    owner = stand_ins if name == "repeat_kv" else getattr(stand_ins, kind)
    monkeypatch.setattr(owner, name, lambda renamed, *, other: None)
    with pytest.raises(PydllmError, match=r"stand_ins .*expected \(.*\), found \(.*other\)"):
        pydllm.patch(model, backend="torch")
    assert_state(model, before)
