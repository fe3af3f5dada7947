"""A model spread over processes (gloo, on the CPU) against the same model in one."""

import json
import math
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

import pydllm
from pydllm.demo import MODELS, VERIFIER
from pydllm.demo.task import held_out_problems
from pydllm.models.checkpoint import Shards, read_config
from pydllm.models.families import find_family
from pydllm.models.partition import Partition
from pydllm.models.weights import slots
from tests.models.plain import CONFIGS, LLADA, RECENT, random_plain, write_checkpoint

TWO_HEADS = LLADA | {"n_heads": 2, "n_kv_heads": 2}
EVERY = CONFIGS | RECENT
SHAPES = {2: [name for name in EVERY if name != "sdar"], 4: ["llada", "llada-gqa", "two-heads"]}


def _enter(rank, size, folder, function, arguments):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=limit)
    torch.save(function(size, *arguments), folder / f"{rank}.pt")
    dist.destroy_process_group()


def spread(folder, size, function, *arguments):
    """What ``function(size, *arguments)`` returns in each of ``size`` processes."""
    folder.mkdir()
    settings = (size, folder, function, arguments)
    # Forked from a process that has imported all of this and has no threads, unlike this one.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    multiprocessing.start_processes(_enter, settings, nprocs=size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def look(tp, folder):
    """Hidden states, logits, statistics and cache of a ragged window over a checkpoint's model."""
    model = pydllm.load(folder, dtype=torch.float64, device="cpu", tp=tp)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 61, (2, 9), generator=generator)
    cache = model.new_cache(2, 16)
    at = torch.tensor([9, 7], dtype=torch.int32)
    zero = torch.zeros_like(at)
    kind = "causal" if model.spec.attention == "block_causal" else None
    numbers = {"length": at, "kv_len": at, "commit": at}
    hidden = model.forward(ids, zero, cache, attention=kind, **numbers)
    rows = hidden.reshape(-1, hidden.shape[-1])
    named = torch.tensor([3, 0, 12, -1])
    counter = torch.stack((named, named, named), 1).int()
    suppress_ids = torch.tensor([7, 60], dtype=torch.int32)
    drawn = {"temperature": 0.7, "counter": counter, "seed": 5, "suppress_ids": suppress_ids}
    results = {
        "hidden": hidden[0],
        "logits": model.head(rows),
        "greedy": tuple(model.head_stats(rows)),
        "drawn": tuple(model.head_stats(rows, named, **drawn)),
        "bytes": sum(t.nbytes for t in _tensors(model)),
    }
    if tp > 1:
        results["sent"] = dict(model.bytes), dict(model.calls)
    return results


def _tensors(model):
    layers = [tensor for layer in model._layers for tensor in vars(layer).values()]
    ends = (model._embedding, model._head, model._norm, model._head_bias)
    unique = {t.data_ptr(): t for t in (*ends, *layers) if t is not None}
    return unique.values()


def many(tp, folders):
    return [look(tp, folder) for folder in folders]


@pytest.mark.parametrize("size", SHAPES)
def test_every_family_computes_the_same(tmp_path, size):
    folders = []
    for name in SHAPES[size]:
        plain = random_plain(EVERY.get(name, TWO_HEADS), 0, torch.float64)
        folders.append(write_checkpoint(tmp_path / name, plain))
    alone = many(1, folders)
    for results in spread(tmp_path / "run", size, many, folders):
        for name, got, whole in zip(SHAPES[size], results, alone, strict=True):
            for key in ("hidden", "logits"):
                torch.testing.assert_close(got[key], whole[key], rtol=0, atol=1e-10, msg=name)
            for key in ("greedy", "drawn"):
                assert torch.equal(got[key][0], whole[key][0]), name
                torch.testing.assert_close(got[key], whole[key], rtol=1e-10, atol=1e-10)
            sent, calls = got["sent"]
            assert calls == {"embedding": 1, "layers": 6, "logits": 1, "statistics": 2}
            assert sent["embedding"] == 2 * 9 * 48 * 8 and sent["layers"] == 6 * sent["embedding"]
            assert sent["statistics"] == 18 * (4 * 8 + 4) + 4 * (6 * 8 + 2 * 4)  # fp64


def test_the_parts_make_up_the_whole(tmp_path):
    """All processes together hold each weight once, but for norms and repeated heads."""
    folder = write_checkpoint(tmp_path / "x", random_plain(CONFIGS["llada-bias"], 0))
    config = read_config(folder)
    family = find_family(config)
    sizes, shards = family.sizes(config, family), Shards(folder)
    wanted = list(slots(family.names, sizes))
    whole = shards.load(wanted, torch.device("cpu"), torch.float32)
    parts = [
        shards.load(wanted, torch.device("cpu"), torch.float32, Partition(rank, 4, sizes, 61))
        for rank in range(4)
    ]
    for name, tensor in whole.items():
        held = [part[name] for part in parts if name in part]
        if "norm" in name:
            assert all(torch.equal(part, tensor) for part in held)
            continue
        assert sum(part.numel() for part in held) == tensor.numel(), name
        total = sum(part.double().sum().item() for part in held)
        assert math.isclose(total, tensor.double().sum().item(), abs_tol=1e-6), name


ALGORITHMS = {
    "llada-tiny": [
        pydllm.Static(block_length=8, tokens_per_step=2, cache="prefix"),
        pydllm.Threshold(threshold=0.9, block_length=12, cache="dual"),
        pydllm.FreeDave(draft_steps=4, block_length=12, cache="dual"),
        pydllm.MultiBlock(threshold=0.5, block_length=8),
        pydllm.LeftToRight(tokens_per_step=4),
    ],
    "sdar-tiny": [
        pydllm.Static(block_length=8, tokens_per_step=2),
        pydllm.FreeDave(draft_steps=4, block_length=8, mode="pipelined"),
    ],
}


def decode(tp, verifier_tp):
    """Tokens and forwards of every algorithm on the bundled models, a ragged batch."""
    prompts = [problem.prompt for problem in held_out_problems(3)]
    results = {}
    for name, algorithms in ALGORITHMS.items():
        model = pydllm.load(MODELS[name], dtype=torch.float64, device="cpu", tp=tp)
        algorithms = [(algorithm, 0.0) for algorithm in algorithms]
        if name == "llada-tiny":
            verifier = pydllm.load(VERIFIER, dtype=torch.float64, device="cpu", tp=verifier_tp)
            algorithms.append((pydllm.APD(verifier), 0.0))
            algorithms.append((pydllm.Threshold(threshold=0.9, block_length=12), 0.8))
        for algorithm, temperature in algorithms:
            made = pydllm.generate(
                model, prompts, algorithm, max_new_tokens=16, temperature=temperature, seed=3
            )
            key = f"{name} {type(algorithm).__name__} {temperature}"
            results[key] = [ids.tolist() for ids in made.sequences], made.nfe.tolist()
    return results


@pytest.mark.parametrize("size, verifier", [(2, 2), (4, 1)])
def test_every_algorithm_decodes_the_same(tmp_path, size, verifier):
    alone = decode(1, 1)
    assert len(alone) == 9
    for results in spread(tmp_path / "run", size, decode, verifier):
        assert results == alone


REFUSED = {
    "heads": (3, {}, "divides the 4 heads or splits each of them (12 values) evenly, got 3"),
    "kv heads": (4, {"heads": 12, "kv_heads": 6}, "multiple of the 6 key-value heads, got 4"),
    "mlp": (4, {"intermediate": 42}, "divisor of the MLP's 42 columns, got 4"),
    "vocabulary": (4, {"embeddings": 12, "vocab": 12}, "some of the 12 ids, 4 at a time"),
}


@pytest.mark.parametrize("size, changes, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_shared_is_refused(tmp_path, size, changes, message):
    from dataclasses import replace

    folder = write_checkpoint(tmp_path / "x", random_plain(LLADA, 0))
    config = read_config(folder)
    family = find_family(config)
    vocab = changes.pop("vocab", 61) if "vocab" in changes else 61
    sizes = replace(family.sizes(config, family), **changes)
    with pytest.raises(ValueError) as error:
        Partition(0, size, sizes, vocab)
    assert message in str(error.value)


def test_a_missing_launcher_is_named():
    with pytest.raises(pydllm.PydllmError, match="expected 2 processes, got 1: .*torchrun"):
        pydllm.load(MODELS["llada-tiny"], device="cpu", tp=2)
    with pytest.raises(ValueError, match="tp: expected an int of at least 1, got 0"):
        pydllm.load(MODELS["llada-tiny"], device="cpu", tp=0)
    with pytest.raises(ValueError, match="tp: expected 1 for a loaded module"):
        pydllm.load(torch.nn.Linear(1, 1), tp=2)


def test_torchrun_generates_once(tmp_path):
    """Two processes, one answer, that of one process."""
    prompt = held_out_problems(1)[0].prompt
    generate = ["pydllm", "generate", "--prompt", prompt, "--device", "cpu", "--dtype", "float64"]
    generate += ["--model", "llada2-tiny", "--expert-parallel"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    outputs = []
    for command in (generate, [*launcher, *generate]):
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] and len(outputs[0].splitlines()) == 1


def test_torchrun_runs_a_job(tmp_path):
    """All processes answer, one writes and reports; a finished job is only reported."""
    data = tmp_path / "x.jsonl"
    lines = [json.dumps({"prompt": problem.prompt}) + "\n" for problem in held_out_problems(5)]
    data.write_text("".join(lines))
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    sums = []
    for out, start in (("one", []), ("two", launcher), ("two", launcher)):
        job = ["pydllm", "generate", "--data", str(data), "--out", str(tmp_path / out), "--json"]
        job += ["--batch-size", "1", "--max-new-tokens", "16", "--device", "cpu"]
        job += ["--model", "llada2-tiny", "--expert-parallel"]
        done = subprocess.run(
            [sys.executable, "-m", *start, *job, "--dtype", "float64"],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        sums.append(json.loads(line)["sha256"])
    assert len(set(sums)) == 1
    assert len(list((tmp_path / "two" / "parts").iterdir())) == 2  # calls of four batches


def look_at_a_draft(tp, folder):
    """Hidden states of a bidirectional window past the original length, with the draft adapter."""
    model = pydllm.load(folder, dtype=torch.float64, device="cpu", tp=tp)
    ids = torch.arange(15)[None]
    cache, at = model.new_cache(1, 15), torch.tensor([15], dtype=torch.int32)
    options = {"length": at, "kv_len": at, "commit": at, "attention": "full"}
    zero = torch.zeros_like(at)
    return [model.forward(ids, zero, cache, adapter=adapter, **options) for adapter in (0, 1)]


def test_query_scale_and_draft_adapter(tmp_path):
    from tests.models.test_adapter import factors, write_adapter

    plain = random_plain(RECENT["nemotron"])
    folder = write_checkpoint(tmp_path / "checkpoint", plain)
    write_adapter(folder / "linear_spec_lora", factors(plain, ["o_proj"]))
    alone = look_at_a_draft(1, folder)
    assert (alone[0] - alone[1]).abs().max() > 0.1
    for own in spread(tmp_path / "spread", 2, look_at_a_draft, folder):
        for got, expected in zip(own, alone, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
