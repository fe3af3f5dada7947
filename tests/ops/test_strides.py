"""Every tensor of every op at another stride, with its last element past 2^31 elements.

Each tensor is laid out once along each of its dimensions so that two steps along it are more than
2^31 elements, one is less: an offset that is computed in 32 bits is wrong there. The bits of the
results are those of the packed tensors, or the kernel refuses the strides. The memory is reserved,
not used: pages that are not touched cost nothing.
"""

import mmap

import pytest
import torch

from pydllm._backend.errors import BackendError
from pydllm._backend.library import Op
from tests.isolation import outcome
from tests.ops.calls import RUNS
from tests.packages import ROOT

STEP = 2**30 + 64  # elements; a multiple of 16 bytes for every dtype
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on


def spread(tensor, dim):
    """A copy of a tensor whose steps along ``dim`` are ``STEP`` elements."""
    strides = list(torch.empty_like(tensor, memory_format=torch.contiguous_format).stride())
    strides[dim] = STEP
    size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = mmap.mmap(-1, size * tensor.itemsize, flags=flags)
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype)
    return flat.as_strided(tensor.shape, strides).copy_(tensor)


class Layout:
    """Hands out a call's tensors: packed, but for those of ``apart`` (name -> dimension)."""

    def __init__(self, **apart):
        self.tensors = {}
        self._apart = apart

    def __call__(self, name, tensor):
        if name in self._apart:
            tensor = spread(tensor, self._apart[name])
        self.tensors[name] = tensor
        return tensor

    def choices(self):
        """The dimensions of every tensor along which two steps are possible."""
        return [
            (name, dim)
            for name, tensor in self.tensors.items()
            for dim, size in enumerate(tensor.shape)
            if size > 2
        ]


class Accepted(Exception):
    """Instead of a launch."""


def accepts(call, backend, name, dim):
    """Whether the kernel takes a layout; nothing is launched."""
    try:
        call(Layout(**{name: dim}), backend)
    except Accepted:
        return True
    except BackendError as error:
        assert "strides" in str(error), error
    return False


def run(call, backend, layout):
    """Packed copies of what a call returns, and of its tensors after it."""
    torch.manual_seed(0)
    results = call(layout, backend)
    results = [results] if isinstance(results, torch.Tensor) else list(results or ())
    results += layout.tensors.values()
    return [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in results]


def equal(one, other):
    if one.is_floating_point():
        return torch.equal(one.isnan(), other.isnan()) and equal(
            one.nan_to_num().view(torch.uint8), other.nan_to_num().view(torch.uint8)
        )
    return torch.equal(one, other)


@pytest.mark.parametrize("call, backend", RUNS, ids=lambda value: getattr(value, "__name__", value))
def test_any_stride_and_offset(call, backend, monkeypatch):
    packed = Layout()
    expected = run(call, backend, packed)
    with monkeypatch.context() as patch:
        patch.setattr(Op, "run", raise_accepted)
        accepted = [choice for choice in packed.choices() if accepts(call, backend, *choice)]

    def differs(apart):
        got = run(call, backend, Layout(**apart))
        return 0 if all(map(equal, got, expected)) else 2

    for dim in {dim for _, dim in accepted}:
        apart = {name: at for name, at in accepted if at == dim}
        if outcome(lambda apart=apart: differs(apart)) != 0:
            alone = [{name: dim} for name in apart]
            wrong = [one for one in alone if outcome(lambda one=one: differs(one)) != 0]
            pytest.fail(f"wrong (tensor: dimension): {wrong or apart}")


def raise_accepted(*_):
    raise Accepted


def test_every_op_is_called():
    """One file of kernels per op; a call begins with the name of its op."""
    calls = [call.__name__ for call, _ in RUNS]
    files = [path.stem for path in (ROOT / "kernels").glob("[!_]*.py")]
    assert len(files) > 15
    assert not [op for op in files if not any(name.startswith(op) for name in calls)]


def test_an_offset_of_32_bits_is_found():
    """What a kernel would compute in 32 bits leads elsewhere."""
    far = spread(torch.arange(3), 0)
    assert far.tolist() == [0, 1, 2]
    offset = torch.arange(3, dtype=torch.int32) * STEP
    assert offset.tolist() != [i * STEP for i in range(3)]
