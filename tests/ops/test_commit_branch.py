import pytest
import torch

from pydllm import ops
from pydllm.testing import error_budget, max_error, random_normal
from tests.ops.test_window_attention import copy, rotate
from tests.ops.test_window_attention_masks import NAN, branched, normed, of_branch

BACKENDS = ["torch", "triton", "cuda"]
ATTENDING = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEQUENCES = [(62, 12, 150, 0, 0), (70, 9, 79, 0, 75), (145, 5, 150, 0, 0), (3, 4, 9, 0, 1)]


def make_commit(dtype=torch.float32, branches=3, commit=(12, 9, 12, 0), branch=(2, 1, 0, 1)):
    """Of the third sequence more is asked than fits; nothing of the last."""
    inputs = branched(SEQUENCES, branches, dtype)
    inputs = {n: inputs[n] for n in ("k", "v", "k_cache", "v_cache", "start", "cos", "sin", "pad")}
    for name in ("k", "v"):
        inputs[name] = inputs[name].nan_to_num(0.5)
    numbers = {"branch": branch, "commit": commit}
    return inputs | {n: torch.tensor(t, dtype=torch.int32) for n, t in numbers.items()}


def written(inputs, dtype, branches, k_norm=None, eps=1e-6):
    """Keys and values by the definition, a row at a time; and the mask of what is written."""
    k, v, keys, values = (inputs[n].to(dtype, copy=True) for n in ("k", "v", "k_cache", "v_cache"))
    k = k if k_norm is None else normed(k, k_norm.to(dtype), eps)
    wide, size = torch.promote_types(dtype, torch.float32), k.shape[1] // branches
    touched = torch.zeros(keys.shape[:2], dtype=torch.bool)
    names = ("branch", "start", "commit", "pad")
    for b, (branch, start, commit, pad) in enumerate(
        zip(*(inputs[n].tolist() for n in names), strict=True)
    ):
        for row in range(commit if 0 <= branch < branches else 0):
            slot = start + row
            if pad <= slot < keys.shape[1]:
                one = k[b, branch * size + row].to(wide)[None]
                turned = rotate(one, torch.tensor([slot - pad]), inputs["cos"], inputs["sin"])
                keys[b, slot], values[b, slot] = turned[0].to(dtype), v[b, branch * size + row]
                touched[b, slot] = True
    return keys, values, touched


@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_definition(backend, dtype, has_norm):
    inputs = make_commit(dtype)
    norm = {"k_norm": 1 + random_normal(64, seed=3, dtype=dtype) / 4} if has_norm else {}
    used = copy(inputs)
    assert ops.commit_branch(**used, **norm, branches=3, backend=backend) is None
    exact, plain = (written(inputs, kind, 3, **norm) for kind in (torch.float64, dtype))
    for name, want, same in zip(("k_cache", "v_cache"), exact, plain, strict=False):
        assert max_error(used[name], want) <= error_budget(want, same)
        rest = ~exact[2]
        assert torch.equal(used[name][rest].nan_to_num(7), inputs[name][rest].nan_to_num(7))
    assert torch.equal(used["v_cache"].nan_to_num(7), plain[1].nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ATTENDING)
def test_the_bits_that_the_branch_alone_would_commit(backend, dtype):
    inputs = branched([(62, 4, 150, 0, 0), (70, 3, 74, 0, 6)], 8, dtype, rows=4)
    for branch in (0, 5):
        alone, used = of_branch(inputs, branch, 8), copy(inputs)
        alone["commit"] = alone["length"].clone()
        ops.window_attention(**alone, backend=backend)
        ops.commit_branch(
            **{n: used[n] for n in ("k", "v", "k_cache", "v_cache", "start", "cos", "sin", "pad")},
            branch=torch.full((2,), branch, dtype=torch.int32),
            commit=used["length"],
            branches=8,
            backend=backend,
        )
        for name in ("k_cache", "v_cache"):
            assert torch.equal(used[name].nan_to_num(7), alone[name].nan_to_num(7))


@pytest.mark.parametrize("branch", [-1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_branch_that_is_none_writes_nothing(backend, branch):
    inputs = make_commit(branch=(branch,) * 4)
    used = copy(inputs)
    ops.commit_branch(**used, branches=3, backend=backend)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(used[name].nan_to_num(7), inputs[name].nan_to_num(7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages(backend):
    inputs = make_commit()
    plain = copy(inputs)
    ops.commit_branch(**plain, branches=3, backend=backend)
    table = torch.randperm(60, generator=torch.Generator().manual_seed(1)).int().view(4, 15)
    paged = dict(inputs)
    for name in ("k_cache", "v_cache"):
        pool = torch.full((60, 10, 2, 64), NAN)
        pool[table.long()] = inputs[name].unflatten(1, (15, 10))
        paged[name] = pool
    ops.commit_branch(**paged, branches=3, block_table=table, backend=backend)
    for name in ("k_cache", "v_cache"):
        got = paged[name][table.long()].flatten(1, 2)
        assert torch.equal(got.nan_to_num(7), plain[name].nan_to_num(7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_fullgraph(backend):
    inputs = make_commit()
    for name in ("k_cache", "v_cache"):
        inputs[name] = inputs[name].nan_to_num(0.5)
    names = ("k", "v", "k_cache", "v_cache", "branch", "start", "commit", "cos", "sin", "pad")
    arguments = (*(inputs[n] for n in names), None, None, 3, 1e-6, backend)
    torch.library.opcheck(torch.ops.pydllm.commit_branch.default, arguments)
    eager, compiled = copy(inputs), copy(inputs)

    def call(tensors):
        ops.commit_branch(**tensors, branches=3, backend=backend)

    call(eager)
    torch.compile(call, fullgraph=True, backend="aot_eager")(compiled)
    assert torch.equal(eager["v_cache"], compiled["v_cache"])
    torch.testing.assert_close(eager["k_cache"], compiled["k_cache"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend):
    inputs = {n: t if n in ("cos", "sin") else t[:0] for n, t in make_commit().items()}
    ops.commit_branch(**inputs, branches=3, backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"branches": 5}, ValueError, "branches: expected a divisor of the 36 rows, got 5"),
        ({"branch": torch.ones(4)}, TypeError, "branch: expected dtype torch.int32"),
        ({"start": torch.ones(3).int()}, ValueError, r"start: expected shape \(4\), got \(3,\)"),
        ({"k_norm": torch.ones(3)}, ValueError, r"k_norm: expected shape \(64\), got \(3,\)"),
        ({"backend": "cuda"}, RuntimeError, "CUDA kernels need a CUDA tensor, got one on cpu"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.commit_branch(**({"branches": 3} | make_commit() | change))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_what_the_kernel_does_not_take(backend):
    inputs = make_commit()
    inputs["branch"] = inputs["branch"][:1].expand(4)
    with pytest.raises(RuntimeError, match="branch must be contiguous, got strides"):
        ops.commit_branch(**inputs, branches=3, backend=backend)


def test_a_part_of_the_head_is_turned_and_memory_may_begin_anywhere(cuda_on_cpu):
    """Partial rotary, heads of an odd number of vectors, and rows off 16-byte boundaries."""
    generator = torch.Generator().manual_seed(0)
    for head_dim, half, offset in ((80, 16, 0), (12, 3, 0), (64, 32, 1)):
        shapes = {"k": (2, 6, 2), "v": (2, 6, 2), "k_cache": (2, 9, 2), "v_cache": (2, 9, 2)}
        heads = {
            name: torch.randn(*shape, head_dim + offset, generator=generator)[..., offset:]
            for name, shape in shapes.items()
        }
        angle = torch.rand(9, half, generator=generator)
        numbers = {"branch": (1, 0), "start": (2, 5), "commit": (3, 2), "pad": (1, 0)}
        rest = {n: torch.tensor(t, dtype=torch.int32) for n, t in numbers.items()}
        rest |= {"cos": angle.cos(), "sin": angle.sin(), "branches": 2}
        rest["k_norm"] = torch.rand(head_dim, generator=generator)
        other = {name: tensor.clone() for name, tensor in heads.items()}
        ops.commit_branch(**heads, **rest, backend="cuda")
        ops.commit_branch(**other, **rest, backend="torch")
        assert torch.equal(heads["v_cache"], other["v_cache"])
        torch.testing.assert_close(heads["k_cache"], other["k_cache"], rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype, backend):
    inputs = make_commit(dtype)
    on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
    ops.commit_branch(**on_gpu, branches=3, backend=backend)
    exact, plain = (written(inputs, kind, 3) for kind in (torch.float64, dtype))
    for name, want, same in zip(("k_cache", "v_cache"), exact, plain, strict=False):
        assert max_error(on_gpu[name].cpu(), want) <= error_budget(want, same)
