"""The check of other packages' signatures, and packages with a changed one.

test_diffusion_gemma.py, test_engines.py and test_patch*.py do the same for what they are about.
"""

import importlib
import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest

from pydllm import PydllmError
from pydllm._backend.signatures import check_called, check_replaced, written


def plain(a, b, c=0): ...


def keywords(a, *, b, c=0, **more): ...


class Thing:
    def __init__(self, a, *, b=1): ...

    def method(self, a, b): ...


@pytest.mark.parametrize(
    ("function", "known"),
    [
        (plain, "a, b, c"),
        (plain, "*, c, a, b"),  # by keyword: the order is free
        (plain, "a, *, c, b"),
        (plain, "a, ..."),
        (keywords, "a, *, b, c, **more"),
        (Thing, "a, *, b"),
        (Thing.method, "a, b"),
        (Thing(1).method, "a, b"),
    ],
)
def test_the_same_signature(function, known):
    assert check_replaced("torch", function, known) == ""
    assert check_replaced("torch", function, {"other": "x", "mine": known}) == "mine"


@pytest.mark.parametrize(
    ("function", "known"),
    [
        (plain, "a, b"),  # one more, which a caller may pass
        (plain, "a, b, c, d"),
        (plain, "b, a, c"),
        (plain, "a, b, x"),
        (plain, "b, ..."),
        (keywords, "a, *, b, c"),
        (keywords, "a, *, b, c, **less"),
        (Thing.method, "a, *, c"),
        (lambda *args, **kwargs: None, "a, b"),
    ],
)
def test_another_signature(function, known):
    with pytest.raises(PydllmError, match=r"expected \(.*\), found \(.*\)"):
        check_replaced("torch", function, known)


@pytest.mark.parametrize(
    ("function", "call", "fits"),
    [
        (plain, "1, 2", True),
        (plain, "1, 2, *, c", True),
        (plain, "1", False),
        (plain, "1, 2, 3, 4", False),
        (plain, "1, 2, *, d", False),
        (keywords, "1, *, b, anything", True),
        (keywords, "1, 2, *, b", False),
        (keywords, "1", False),
        (Thing, "1, *, b", True),
        (Thing.method, "1, 2", True),
        (lambda *args, **kwargs: None, "1, *, b", True),
    ],
)
def test_a_call(function, call, fits):
    if fits:
        assert check_called("torch", function, call) == ""
    else:
        with pytest.raises(PydllmError, match=r"expected \(.*\), found \(.*\)"):
            check_called("torch", function, call)


def test_the_call_that_fits_is_told():
    assert check_called("torch", plain, {"old": "1, *, past", "new": "1, *, b"}) == "new"


def test_the_message_has_version_and_both_signatures():
    import torch

    with pytest.raises(PydllmError) as raised:
        check_replaced("torch", keywords, {"old": "a, past", "new": "a, cache"})
    assert str(raised.value) == (
        f"torch {torch.__version__}: keywords: expected (a, past) or (a, cache), "
        "found (a, *, b, c, **more)"
    )
    with pytest.raises(PydllmError, match=r"no-such-package \(unknown version\): plain"):
        check_called("no-such-package", plain, "1")


def test_ours_is_written_as_it_is_checked():
    assert written(Thing.method) == "a, b" and written(Thing, without=("b",)) == "a"
    check_replaced("torch", Thing, written(Thing))


def install(monkeypatch, **modules):
    """Stand-in modules under their names, ``__`` for a dot."""
    for name, contents in modules.items():
        module = ModuleType(name.replace("__", "."))
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)


RAY = {
    "init": lambda *, include_dashboard, logging_level, log_to_driver: None,
    "is_initialized": lambda: True,
    "cluster_resources": lambda: {},
}
DATA = {
    "from_items": lambda items, *, override_num_blocks: None,
    "ActorPoolStrategy": lambda *, size: None,
}
DATASET = {
    "map": lambda self, fn, *, fn_constructor_args, compute, num_cpus, num_gpus: None,
    "iter_rows": lambda self: None,
}


@pytest.mark.parametrize("changed", [None, *RAY, *DATA, *DATASET])
def test_ray(monkeypatch, changed):
    from pydllm.integrations.jobs.run import _on_ray

    def other(first, second, *, third): ...

    def contents(known):
        return {name: other if name == changed else known[name] for name in known}

    data = contents(DATA) | {"Dataset": type("Dataset", (), contents(DATASET))}
    install(monkeypatch, ray={**contents(RAY), "__version__": "9.9"}, ray__data=data)
    sys.modules["ray"].data = sys.modules["ray.data"]
    if changed is None:
        claimed: list[bool] = []
        job = SimpleNamespace(batches=lambda size: [], claim=lambda: claimed.append(True))
        assert list(_on_ray(job, None, 1, None, None)) == [] and claimed == [True]
    else:
        with pytest.raises(PydllmError, match=r"^ray 9\.9: .*expected \(.*\), found \("):
            list(_on_ray(None, None, 1, None, None))


LM = {
    "loglikelihood": lambda self, requests: None,
    "loglikelihood_rolling": lambda self, requests: None,
    "generate_until": lambda self, requests: None,
    "apply_chat_template": lambda self, chat_history, add_generation_prompt: None,
    "chat_template": lambda self, chat_template=False: None,
    "all_gather": lambda self, tensor: None,
    "gather_object": lambda self, obj, dst=0: None,
    "barrier": lambda self: None,
}


@pytest.mark.parametrize("changed", [None, *LM, "add_partial", "register_model", "cli_evaluate"])
def test_lm_eval(monkeypatch, changed):
    def other(first, second, *, third): ...

    def pick(name, known):
        return other if name == changed else known

    hook = pick("add_partial", lambda self, attr, req, res: None)
    api = {
        "LM": type("LM", (), {name: pick(name, known) for name, known in LM.items()}),
        "CacheHook": type("CacheHook", (), {"add_partial": hook}),
    }
    registry = {"register_model": pick("register_model", lambda *names: lambda kind: kind)}
    install(
        monkeypatch,
        lm_eval={"__version__": "9.9"},
        lm_eval__api={},
        lm_eval__api__model=api,
        lm_eval__api__registry=registry,
    )
    command = ModuleType("lm_eval.__main__")
    command.cli_evaluate = pick("cli_evaluate", lambda: None)
    monkeypatch.setitem(sys.modules, command.__name__, command)
    name = "pydllm.integrations.harness"
    before = sys.modules.pop(name, None)
    try:
        if changed is None:
            importlib.import_module(name).main([])
        else:
            with pytest.raises(PydllmError, match=r"^lm_eval 9\.9: .*expected \(.*\), found \("):
                importlib.import_module(name).main([])
    finally:
        sys.modules.pop(name, None)
        if before is not None:
            sys.modules[name] = before


@pytest.mark.parametrize(
    "name",
    ["__init__", "prepare", "backward", "no_sync", "clip_grad_norm_", "wait_for_everyone"],
)
def test_accelerate(monkeypatch, name):
    accelerate = pytest.importorskip("accelerate")
    from pydllm.distill.run import _accelerator

    monkeypatch.setattr(accelerate.Accelerator, name, lambda self, *, renamed: None)
    with pytest.raises(PydllmError, match=r"^accelerate .*expected \(.*\), found \(.*renamed"):
        _accelerator(SimpleNamespace(accelerate=True, device="cpu"))


@pytest.mark.parametrize("name", ["LoraConfig", "get_peft_model"])
def test_peft(monkeypatch, name):
    peft = pytest.importorskip("peft")
    from pydllm.distill.trainer import add_lora

    monkeypatch.setattr(peft, name, lambda renamed: None)
    with pytest.raises(PydllmError, match=r"^peft .*expected \(.*\), found \(renamed\)"):
        add_lora(None, 4)


@pytest.mark.parametrize("name", ["step", "set_timesteps", "add_noise", "check_eos_finished"])
def test_diffusers(monkeypatch, name):
    from pydllm.integrations.diffusers import BlockRefinementScheduler

    theirs = dict(vars(BlockRefinementScheduler))
    step = theirs["step"]
    signature = inspect.signature(step)
    kept = [p for p in signature.parameters.values() if p.name not in ("compat", "backend")]
    theirs["step"] = lambda *args, **kwargs: None
    theirs["step"].__signature__ = signature.replace(parameters=kept)
    kind = type("BlockRefinementScheduler", (), theirs)
    contents = {"BlockRefinementScheduler": kind, "__version__": "9.9"}
    install(monkeypatch, diffusers=contents)
    BlockRefinementScheduler.from_config({})  # as it is known

    def renamed(self, logits): ...

    monkeypatch.setattr(kind, name, renamed)
    with pytest.raises(PydllmError, match=r"^diffusers 9\.9: .*expected \(.*, found \(logits\)"):
        BlockRefinementScheduler.from_config({})
