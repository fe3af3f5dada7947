"""Experts held whole by several processes: the parts, what is read, and what is decoded."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import pydllm
from pydllm.models.checkpoint import Shards, read_config
from pydllm.models.experts import Experts
from pydllm.models.families import FAMILIES
from pydllm.models.partition import Partition
from pydllm.models.quantized import load_quantized
from pydllm.models.weights import slots
from tests.models.moe_plain import CONFIGS, fused, random_weights, write_moe
from tests.models.test_native import at, close, random_ids
from tests.models.test_parallel import spread

EVEN = {"num_attention_heads": 4, "num_key_value_heads": 2}
LAYOUTS = {"llada2": "dfactory", "llada2.2": None, "sdar-moe-mixed": "dinfer"}
LAYOUTS |= {"rnd1": "transformers", "llada-moe-mixed": "mlx"}
EXPERTS = {"router", "router_bias", "gate_up", "down", "shared_gate_up", "shared_down"}
CPU = torch.device("cpu")


def make(folder, name, layout=None):
    """A checkpoint of a small mixture, its family and sizes."""
    config = CONFIGS[name] | EVEN
    if name.startswith("llada-moe"):
        config["num_key_value_heads"] = 4
    weights = random_weights(config, 0, torch.float64)
    write_moe(folder, config, weights if layout is None else fused(weights, config, layout))
    return folder


class Recorded(Shards):
    """A checkpoint that writes down which bytes of it are read."""

    def __init__(self, folder):
        super().__init__(folder)
        self.bytes, self.experts = 0, set()

    def _read(self, file, name, index):
        part = super()._read(file, name, index)
        if ".mlp.experts." in name:
            self.experts.add(int(name.partition(".mlp.experts.")[2].partition(".")[0]))
            self.bytes += part.nbytes
        return part


def checkpoint(folder):
    model = pydllm.load(folder, device="cpu", dtype=torch.float64)
    names = FAMILIES[read_config(folder).get("architectures")[0]].names
    shards = Recorded(folder)
    shards.read_layout(names, model.sizes, "")
    wanted = [slot for slot in slots(names, model.sizes) if slot.name.startswith("layers.1.")]
    return model, shards, [slot for slot in wanted if slot.name.split(".")[2] in EXPERTS]


def parts(folder, size, kind=None, partition=Partition):
    """The whole layer, and that of each process; with ``kind`` its weights are quantised."""
    model, shards, wanted = checkpoint(folder)

    def build(partition):
        own = wanted if partition is None else [partition.own(slot) for slot in wanted]
        moe = model.sizes.moe if partition is None else partition.local.moe
        small = load_quantized(shards, own, {}, kind, CPU, partition, None, moe.stored)
        left = [slot for slot in own if slot.name not in small]
        read = shards.load(left, CPU, torch.float64, partition) | small
        shards.taken = shards.bytes, shards.experts
        shards.bytes, shards.experts = 0, set()
        return Experts.of({key.removeprefix("layers.1."): t for key, t in read.items()}, moe)

    whole = build(None)
    every = shards.taken
    for rank in range(size):
        layer = build(partition(rank, size, model.sizes, 61, True))
        yield SimpleNamespace(whole=whole, layer=layer, rank=rank, read=shards.taken, every=every)


WINDOW = {"start": at(0), "pad": None, "branches": 1, "backend": None}
HIDDEN = random_ids(7, 48).double().sin()[None]


def added(layers, **window):
    """The sum of the processes' layers, of which the last two rows are not in use."""
    window = WINDOW | {"length": at(5)} | window
    return sum(layer(HIDDEN.to(layer.router.dtype), window, None) for layer in layers)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_parts_add_up_and_are_all_that_is_read(tmp_path, name, size):
    found = list(parts(make(tmp_path, name, LAYOUTS[name]), size))
    whole, count = found[0].whole, 16 // len(found)
    for part in found:
        held = range(part.rank * count, (part.rank + 1) * count)
        assert torch.equal(part.layer.gate_up, whole.gate_up[held])
        assert torch.equal(part.layer.down, whole.down[held])
        assert torch.equal(part.layer.router, whole.router)
        assert part.read == (part.every[0] // len(found), set(held))
    layers = [part.layer for part in found]
    got = added(layers)
    close(got, added([whole]))
    assert (got[0, :5] != 0).any(1).all() and (got[0, 5:] == 0).all()
    # A row of which a process has no expert: the shared expert's part is there all the same.
    routed = []
    layers[0](HIDDEN, WINDOW | {"length": at(7)}, routed)
    absent = (routed[0] >= count).all(-1)
    assert absent.any() or len(found) == 2


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_quantised_experts_are_those_of_one_process(tmp_path, kind):
    found = list(parts(make(tmp_path, "llada2"), 4, kind))
    whole = found[0].whole
    for part in found:
        held = slice(part.rank * 4, (part.rank + 1) * 4)
        for name in ("gate_up", "down"):
            own, all_of_them = getattr(part.layer, name), getattr(whole, name)
            assert torch.equal(own.scale, all_of_them.scale[held])
            assert torch.equal(own.dequantize(), all_of_them.dequantize()[held])
    close(added(part.layer for part in found), added([whole]))


def test_the_parts_add_up_in_the_kernels(tmp_path):
    layers = []
    for part in parts(make(tmp_path, "llada2"), 4):
        fields = {
            field.name: getattr(part.layer, field.name) for field in dataclasses.fields(Experts)
        }
        small = {k: t.float() if isinstance(t, torch.Tensor) else t for k, t in fields.items()}
        layers.append(Experts(**small))
    got = added(layers, backend="triton")
    torch.testing.assert_close(got.double(), added([part.whole]), rtol=0, atol=2e-5)


class OneOff(Partition):
    @property
    def held(self):
        held = super().held
        return range(held.start + 1, held.stop + 1)


class OthersNumbers(Partition):
    """The right weights, by the numbers of the next process."""

    @property
    def local(self):
        local = super().local
        held = local.moe.held
        shifted = range(held.start + len(held), held.stop + len(held))
        return dataclasses.replace(local, moe=dataclasses.replace(local.moe, held=shifted))


class WholeShared(Partition):
    """Every process computes all of the shared expert."""

    def index(self, slot):
        return slot.index if "shared" in slot.name else super().index(slot)


@pytest.mark.parametrize("mutant", [OneOff, OthersNumbers, WholeShared])
def test_mutants_are_caught(tmp_path, mutant):
    folder = make(tmp_path, "llada2")
    right = added(part.layer for part in parts(folder, 2))
    found = list(parts(folder, 2, partition=mutant))
    close(right, added([found[0].whole]))
    layers = [part.layer for part in found if len(part.layer.gate_up) == 8]
    assert (added(layers) - right).abs().max() > 1e-3


ALGORITHMS = (pydllm.Threshold, pydllm.FreeDave)


def decode(tp, folders):
    """Logits, tokens and forwards of every model; ragged prompts, half of the experts elsewhere."""
    results = []
    for folder in folders:
        model = pydllm.load(
            folder, device="cpu", dtype=torch.float64, tp=tp, expert_parallel=tp > 1
        )
        ids = random_ids(2, 9)
        length, zero = at(9, 7), at(0, 0)
        cache = model.new_cache(2, 16)
        hidden = model.forward(ids, zero, cache, length=length, kv_len=length, commit=length)
        blocks = model.spec.block_size
        made = [
            pydllm.generate(
                model,
                [[5, 3, 7], [9] * 8],
                pydllm.Threshold(threshold=0.05, block_length=blocks or 8)
                if kind is pydllm.Threshold
                else pydllm.FreeDave(draft_steps=4, block_length=blocks or 8),
                max_new_tokens=12,
            )
            for kind in ALGORITHMS
        ]
        logits = [model.head(rows[:n]) for rows, n in zip(hidden, length.tolist(), strict=True)]
        tokens = [[row.tolist() for row in each.sequences] for each in made]
        results.append((torch.cat(logits), tokens, [each.nfe.tolist() for each in made]))
        assert tp == 1 or model._layers[1].experts.gate_up.shape[0] == 16 // tp
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_processes_decode_as_one(tmp_path, size):
    folders = [make(tmp_path / name, name, layout) for name, layout in LAYOUTS.items()]
    alone = decode(1, folders)
    for results in spread(tmp_path / "run", size, decode, folders):
        for got, expected, name in zip(results, alone, LAYOUTS, strict=True):
            torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-10, msg=name)
            assert got[1:] == expected[1:], name


def test_what_is_refused(tmp_path):
    model = pydllm.load(make(tmp_path / "x", "llada2"), device="cpu")
    sizes = dataclasses.replace(model.sizes, heads=6, kv_heads=6)
    message = "expert_parallel: expected a divisor of the 16 experts, got 3 processes"
    with pytest.raises(ValueError, match=message):
        Partition(0, 3, sizes, 61, True)
    with pytest.raises(ValueError, match="expert_parallel: expected a mixture of experts, got a d"):
        pydllm.load("llada-tiny", device="cpu", expert_parallel=True)
    with pytest.raises(ValueError, match="expert_parallel: expected False for a loaded module"):
        pydllm.load(torch.nn.Linear(1, 1), expert_parallel=True)
    with pytest.raises(TypeError, match="expert_parallel: expected True or False, got 1"):
        pydllm.load("llada2-tiny", device="cpu", expert_parallel=1)
