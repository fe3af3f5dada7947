"""``route`` against a router written with Python lists, one row at a time."""

import itertools
import math

import pytest
import torch

from pydllm import ops
from pydllm.testing import random_normal

KERNELS = ["triton", "cuda"]
BACKENDS = ["torch", *KERNELS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LLADA2 = {"score": "sigmoid", "groups": 8, "topk_groups": 4, "scale": 2.5}
QWEN = {"score": "softmax"}
# NumPy, in the interpreter, and where a NaN is wanted.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{name}:RuntimeWarning")
    for name in ("overflow encountered in exp", "invalid value")
]
LLADA_MOE = {"score": "softmax", "renormalize": False}


def best(values, count):
    """Indices of the highest values, ties to the lower index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def plain_choice(scores, bias, groups, topk_groups, mutant=None):
    """What one row's experts are compared by, without pools."""
    choice = scores if mutant == "no bias" else [s + b for s, b in zip(scores, bias, strict=True)]
    if groups == 1 or mutant == "no groups":
        return choice
    size = len(choice) // groups
    member = [e // size for e in range(len(choice))]
    if mutant == "groups interleaved":
        member = [e % groups for e in range(len(choice))]
    judged = scores if mutant == "group score without bias" else choice
    sums = []
    for group in range(groups):
        own = sorted((c for c, m in zip(judged, member, strict=True) if m == group), reverse=True)
        count = {"group score is the maximum": 1, "group score is the sum": size}.get(mutant, 2)
        sums.append(sum(own[:count]))
    kept = best(sums, topk_groups)
    if mutant == "one group too few":
        kept = kept[:-1]
    return [c if m in kept else -math.inf for c, m in zip(choice, member, strict=True)]


def plain(hidden, router, bias=None, *, top_k, score, length=None, start=None, mutant=None, **o):
    """``(ids, weights)`` as lists ``[B][T]``, in fp64."""
    groups, renormalize = (o.get("groups", 1), o.get("topk_groups", 1)), o.get("renormalize", True)
    scale, capacity, size = o.get("scale", 1.0), o.get("capacity"), o.get("block_size")
    branches = o.get("branches", 1)
    batch, height, experts = hidden.shape[0], hidden.shape[1] // branches, router.shape[0]
    logits = (hidden.double() @ router.double().T).tolist()
    if score == "softmax":
        logits = (hidden.double() @ router.double().T).to(hidden.dtype).tolist()
    bias = [0.0] * experts if bias is None else bias.tolist()
    ids = [[[experts] * top_k] * hidden.shape[1] for _ in range(batch)]
    weights = [[[0.0] * top_k] * hidden.shape[1] for _ in range(batch)]
    for b in range(batch):
        first, live = 0 if start is None else int(start[b]), height
        live = live if length is None else int(length[b])
        for branch in range(branches):
            rows = [j for j in range(min(live, height)) if first + j >= 0]
            scores, choices = {}, {}
            for j in rows:
                row = logits[b][branch * height + j]
                if score == "sigmoid":
                    scores[j] = [1 / (1 + math.exp(-v)) for v in row]
                else:
                    total = sum(math.exp(v - max(row)) for v in row)
                    scores[j] = [math.exp(v - max(row)) / total for v in row]
                choices[j] = plain_choice(scores[j], bias, *groups, mutant)
            if capacity:
                for _, block in itertools.groupby(rows, lambda j, first=first: (first + j) // size):
                    block = list(block)
                    top = [max(choices[j][e] for j in block) for e in range(experts)]
                    pool = best(top, capacity)
                    for j in block:
                        choices[j] = [
                            c if e in pool else -math.inf for e, c in enumerate(choices[j])
                        ]
            for j in rows:
                chosen = best(choices[j], top_k)
                own = [scores[j][e] for e in chosen]
                if mutant == "weights from biased scores":
                    own = [choices[j][e] for e in chosen]
                if renormalize and mutant != "not renormalised":
                    own = [w / (sum(own) + (1e-20 if score == "sigmoid" else 0)) for w in own]
                if mutant != "no scale":
                    own = [w * scale for w in own]
                ids[b][branch * height + j] = chosen
                weights[b][branch * height + j] = own
    return ids, weights


def tied(batch, rows, experts, seed, dtype=torch.float32, score="sigmoid", width=40):
    """One-hot rows and weights of few values: most experts tie, and every number is exact.

    Sigmoids are 0, 0.5 and 1, and biases are multiples of 1/16.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(limit, *shape):
        return torch.randint(0, limit, shape, generator=generator)

    hidden = torch.nn.functional.one_hot(draw(width, batch, rows), width).to(dtype)
    if score == "softmax":
        return {"hidden": hidden, "router": draw(5, experts, width).to(dtype), "bias": None}
    router, bias = 128.0 * (draw(3, experts, width) - 1), draw(3, experts) / 16
    return {"hidden": hidden, "router": router, "bias": bias}


def assert_equals_plain(routes, expected, score="sigmoid"):
    assert routes.ids.tolist() == expected[0]
    assert routes.ids.dtype == torch.int32 and routes.weights.dtype == torch.float32
    # A score is a few roundings from exact, a weight a few more.
    torch.testing.assert_close(
        routes.weights, torch.tensor(expected[1], dtype=torch.float32), rtol=2e-6, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "experts, top_k, options",
    [
        (16, 4, LLADA2),
        (256, 8, LLADA2),
        (64, 6, {"score": "sigmoid", "groups": 2, "topk_groups": 1, "scale": 2.5}),
        (12, 3, {"score": "sigmoid"}),
        (64, 1, {"score": "sigmoid", "renormalize": False, "scale": 2.5}),
        (128, 8, QWEN),
        (64, 8, LLADA_MOE),
        (7, 7, QWEN),
        (1, 1, QWEN),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_expert(backend, experts, top_k, options, dtype):
    case = tied(2, 17, experts, experts, dtype, options["score"])
    options = options | {"top_k": top_k}
    assert_equals_plain(ops.route(**case, **options, backend=backend), plain(**case, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [LLADA2, QWEN], ids=["sigmoid", "softmax"])
def test_equal_scores_choose_the_first_experts(backend, options):
    router = torch.zeros(16, 8)
    ids, weights = ops.route(torch.ones(1, 3, 8), router, top_k=4, **options, backend=backend)
    assert ids.tolist() == [[[0, 1, 2, 3]] * 3]
    assert weights.unique().tolist() == [0.25 * options.get("scale", 1)]


def choice_margin(hidden, router, bias, groups, topk_groups, top_k):
    """How far each row is from another set of experts, or order among them, in fp64."""
    choice = (hidden.double() @ router.double().T).sigmoid() + bias
    grouped = choice.unflatten(-1, (groups, -1))
    sums = grouped.topk(2).values.sum(-1)
    ordered = sums.sort(-1, descending=True).values
    gap = ordered[..., topk_groups - 1] - ordered[..., topk_groups]
    open_ = sums >= ordered[..., topk_groups - 1, None]
    left = grouped.masked_fill(~open_[..., None], -9).flatten(-2).sort(-1, descending=True).values
    return torch.minimum(gap, (left[..., :top_k] - left[..., 1 : top_k + 1]).amin(-1))


def random_case(rows, experts, width, seed=0):
    return {
        "hidden": random_normal(1, rows, width, seed=seed),
        "router": random_normal(experts, width, seed=seed + 1) * 1.5 / width**0.5,
        "bias": 0.1 * random_normal(experts, seed=seed + 2),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_rows_choose_as_in_fp64(backend, rows=257):
    case = random_case(rows, 256, 300)
    options = LLADA2 | {"top_k": 8}
    ids, weights = ops.route(**case, **options, backend=backend)
    clear = choice_margin(**case, groups=8, topk_groups=4, top_k=8) > 1e-5
    exact = plain(**case, **options)
    assert clear.float().mean() > 0.9
    assert torch.equal(ids[clear], torch.tensor(exact[0], dtype=torch.int32)[clear])
    expected = torch.tensor(exact[1])[clear]
    assert (weights[clear] - expected).abs().max() < 2e-6


MUTANTS = {  # name: share of the rows that it changes at least
    "no bias": 0.9,
    "groups interleaved": 0.9,
    "group score is the sum": 0.8,
    "no groups": 0.7,
    "group score without bias": 0.6,
    "group score is the maximum": 0.4,
    "one group too few": 0.5,
    "weights from biased scores": 0.9,
    "not renormalised": 0.9,
    "no scale": 0.9,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_random_rows_tell_a_wrong_router(mutant):
    """An implementation with this mistake fails the comparisons above on these rows."""
    case, options = random_case(200, 256, 64), LLADA2 | {"top_k": 8}
    ids, weights = ops.route(**case, **options, backend="torch")
    wrong = plain(**case, **options, mutant=mutant)
    other = (ids != torch.tensor(wrong[0])).any(-1)
    other = other | ((weights - torch.tensor(wrong[1])).abs() > 1e-3).any(-1)
    assert other.float().mean() >= MUTANTS[mutant]


def test_a_rounded_router_chooses_otherwise():
    case, options = random_case(4096, 256, 256), LLADA2 | {"top_k": 8, "backend": "torch"}
    ids = ops.route(**case, **options).ids
    case["router"] = case["router"].bfloat16().float()
    other = ops.route(**case, **options).ids
    assert (ids.sort().values != other.sort().values).any(-1).float().mean() > 0.01


def test_softmax_chooses_on_rounded_logits():
    # 8.03 and 8.0 are both 8.0 in bf16: the tie goes to the lower expert.
    hidden = torch.tensor([[[1.0, 2**-5]]], dtype=torch.bfloat16)
    router = torch.tensor([[8.0, 0.0], [8.0, 0.5], [4.0, 0.0]], dtype=torch.bfloat16)
    for backend in ("torch", "triton"):
        ids, weights = ops.route(hidden, router, top_k=2, **QWEN, backend=backend)
        assert ids.tolist() == [[[0, 1]]] and weights.tolist() == [[[0.5, 0.5]]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("branches", [1, 3])
def test_block_pools(backend, branches):
    """Windows that begin inside a block, dead rows, and negative positions."""
    rows, block_size = 19, 8
    case = tied(5, rows * branches, 32, 4)
    case["start"] = torch.tensor([0, 5, 8, 27, -3], dtype=torch.int32)
    case["length"] = torch.tensor([19, 19, 11, 0, 14], dtype=torch.int32)
    options = {"top_k": 4, "score": "sigmoid", "scale": 2.5, "capacity": 6}
    options |= {"block_size": block_size, "branches": branches}
    routes = ops.route(**case, **options, backend=backend)
    assert_equals_plain(routes, plain(**case, **options))
    ids = routes.ids.unflatten(1, (branches, rows))
    for branch in range(branches):  # rows 3 to 10 of sequence 1 are a block
        assert ids[1, branch, 3:11].unique().numel() <= 6
    assert (ids[3] == 32).all() and (ids[4, :, :3] == 32).all() and (ids[2, :, 11:] == 32).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pool_is_of_its_sequence_and_branch_alone(backend):
    case = tied(3, 32, 32, 5)
    case["start"] = torch.tensor([0, 3, 6], dtype=torch.int32)
    case["length"] = torch.tensor([16, 9, 16], dtype=torch.int32)
    options = {"top_k": 4, "score": "sigmoid", "capacity": 6, "block_size": 8, "branches": 2}
    together = ops.route(**case, **options, backend=backend)
    alone = case | {name: case[name][1:2] for name in ("start", "length")}
    alone["hidden"] = case["hidden"][1:2, 16:]
    routes = ops.route(**alone, **options | {"branches": 1}, backend=backend)
    assert torch.equal(routes.ids[0], together.ids[1, 16:])
    assert torch.equal(routes.weights[0], together.weights[1, 16:])


def test_without_a_pool_the_blocks_choose_otherwise():
    case = tied(1, 16, 32, 6) | {"start": torch.zeros(1, dtype=torch.int32)}
    free = ops.route(**case, top_k=4, score="sigmoid", backend="torch")
    pooled = ops.route(**case, top_k=4, score="sigmoid", capacity=5, block_size=8, backend="torch")
    assert (free.ids != pooled.ids).any(-1).float().mean() > 0.5
    assert max(block.unique().numel() for block in pooled.ids[0].split(8)) == 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [LLADA2, QWEN], ids=["sigmoid", "softmax"])
def test_dead_rows_are_routed_nowhere(backend, options):
    case = tied(3, 10, 16, 7, score=options["score"])
    case["length"] = torch.tensor([5, 0, 3], dtype=torch.int32)
    routes = ops.route(**case, top_k=4, **options, branches=2, backend=backend)
    dead = (torch.arange(5) >= case["length"][:, None]).repeat(1, 2)
    assert (routes.ids[dead] == 16).all() and (routes.weights[dead] == 0).all()
    assert (routes.ids[~dead] < 16).all() and (routes.weights[~dead].sum(-1) > 0).all()
    case.pop("length")
    whole = ops.route(**case, top_k=4, **options, backend=backend)
    assert torch.equal(whole.ids[~dead], routes.ids[~dead])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [LLADA2, QWEN], ids=["sigmoid", "softmax"])
def test_a_nan_stays_in_its_row(backend, options):
    case = tied(1, 9, 16, 8, score=options["score"])
    expected = ops.route(**case, top_k=4, **options, backend=backend)
    case["hidden"][0, 4] = float("nan")
    routes = ops.route(**case, top_k=4, **options, backend=backend)
    assert routes.ids[0, 4].tolist() == [0, 1, 2, 3] and routes.weights[0, 4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(routes.ids[0, others], expected.ids[0, others])
    assert torch.equal(routes.weights[0, others], expected.weights[0, others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_router_row_of_nan_is_never_chosen_by_its_sigmoid(backend):
    case = tied(1, 6, 16, 9)
    case["router"][3] = float("nan")
    routes = ops.route(**case, top_k=4, **LLADA2, backend=backend)
    assert (routes.ids != 3).all() and not routes.weights.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_logits(backend):
    hidden, router = torch.ones(1, 1, 1), torch.tensor([[1.0], [-torch.inf], [3.0], [-torch.inf]])
    ids, weights = ops.route(hidden, router, top_k=3, **QWEN, backend=backend)
    assert ids.tolist() == [[[2, 0, 1]]]
    assert weights[0, 0, 2] == 0 and weights[0, 0, :2].sum() == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [LLADA2, QWEN], ids=["sigmoid", "softmax"])
def test_a_row_depends_on_itself_alone(backend, options):
    case = random_case(257, 64, 300)
    if options is QWEN:
        case["bias"] = None
    options = options | {"top_k": 8, "backend": backend}
    if backend == "torch":  # a matrix product of one row may have other bits on a CPU
        case = {name: t if t is None else t.double() for name, t in case.items()}
    whole = ops.route(**case, **options)
    order = torch.randperm(257, generator=torch.Generator().manual_seed(0))
    for rows in ([40], range(0, 16), range(100, 117), order.tolist()):
        part = ops.route(**case | {"hidden": case["hidden"][:, list(rows)]}, **options)
        assert torch.equal(part.ids, whole.ids[:, list(rows)])
        if backend != "torch":
            assert torch.equal(part.weights, whole.weights[:, list(rows)])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("width", [40, 43])
def test_bits_do_not_depend_on_alignment(backend, score, dtype, width):
    """Rows are loaded a vector at a time where all begin at one, element by element elsewhere."""
    hidden = random_normal(2, 9, width, seed=0, dtype=dtype)
    router = random_normal(8, width, seed=1)
    router = router if score == "sigmoid" else router.to(dtype)

    def moved(tensor):
        memory = tensor.new_zeros(tensor.numel() + 1)
        return memory[1:].view(tensor.shape).copy_(tensor)

    options = {"top_k": 8, "score": score, "backend": backend}
    expected = ops.route(hidden, router, **options)
    for given in ((moved(hidden), router), (hidden, moved(router))):
        assert all(map(torch.equal, ops.route(*given, **options), expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=str)
def test_no_rows(backend, shape):
    routes = ops.route(torch.zeros(*shape, 8), torch.zeros(4, 8), top_k=2, **QWEN, backend=backend)
    assert routes.ids.shape == routes.weights.shape == (*shape, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    case = tied(2, 4, 16, 10) | {"start": torch.tensor([0, 3], dtype=torch.int32)}
    case["length"] = torch.tensor([4, 2], dtype=torch.int32)
    arguments = tuple(case[name] for name in ("hidden", "router", "bias", "length", "start"))
    for numbers in (
        (4, "sigmoid", True, 2.5, 8, 4, None, None, 1),
        (4, "sigmoid", True, 2.5, 1, 1, 6, 4, 2),
    ):
        torch.library.opcheck(torch.ops.pydllm.route.default, (*arguments, *numbers, backend))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_without_a_graph_break(backend):
    case = tied(2, 4, 16, 11)

    def call(hidden):
        return ops.route(hidden, case["router"], top_k=4, score="sigmoid", backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(case["hidden"]), call(case["hidden"]), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden": torch.ones(4, 8)}, ValueError, r"hidden: expected shape \(B, T, H\), got"),
        ({"router": torch.ones(16, 7)}, ValueError, r"router: expected shape \(E, 8\)"),
        ({"router": torch.ones(16, 8).half()}, TypeError, "router: expected dtype torch.float32"),
        ({"bias": torch.ones(15)}, ValueError, r"bias: expected shape \(16\)"),
        ({"bias": torch.ones(16).half()}, TypeError, "bias: expected dtype torch.float32"),
        ({"score": "softmax"}, ValueError, "bias: expected None with score 'softmax'"),
        ({"score": "relu"}, ValueError, "score: expected one of sigmoid, softmax, got 'relu'"),
        ({"top_k": 0}, ValueError, r"top_k: expected an int in \[1, 16\], got 0"),
        ({"top_k": 17}, ValueError, r"top_k: expected an int in \[1, 16\], got 17"),
        ({"groups": 3}, ValueError, "groups: expected a divisor of the 16 experts that leaves at"),
        ({"groups": 16}, ValueError, "leaves at least 2 for each group, got 16"),
        ({"groups": 8, "topk_groups": 9}, ValueError, r"topk_groups: expected an int in \[1, 8\]"),
        ({"groups": 8, "topk_groups": 1}, ValueError, "groups of 2 that hold 4 experts"),
        ({"capacity": 3, "block_size": 4}, ValueError, r"capacity: expected an int in \[4, 16\]"),
        ({"capacity": 8}, ValueError, "a start and a block_size with it"),
        ({"block_size": 8}, ValueError, "expected None without a capacity, got 8"),
        (
            {"capacity": 8, "block_size": 4, "start": None},
            ValueError,
            "a start and a block_size with it",
        ),
        ({"branches": 3}, ValueError, "branches: expected a divisor of the 4 rows, got 3"),
        ({"length": torch.ones(3)}, ValueError, r"length: expected shape \(2\)"),
        ({"length": torch.ones(2)}, TypeError, "length: expected dtype torch.int32"),
        ({"hidden": torch.ones(2, 4, 8, requires_grad=True)}, ValueError, "requires_grad=True"),
        ({"backend": "cuda"}, RuntimeError, "CUDA kernels need a CUDA tensor, got one on cpu"),
    ],
)
def test_bad_input(change, error, message):
    case = {"hidden": torch.ones(2, 4, 8), "router": torch.ones(16, 8), "bias": torch.ones(16)}
    case |= {"start": torch.zeros(2, dtype=torch.int32), "top_k": 4, "score": "sigmoid"}
    with pytest.raises(error, match=message):
        ops.route(**case | change)


@pytest.mark.parametrize(
    "backend, change, message",
    [
        (backend, change, message)
        for backend in KERNELS
        for change, message in (
            ({"hidden": torch.ones(2, 4, 8).double()}, "takes fp32, fp16 and bf16, got"),
            ({"hidden": torch.ones(4, 2, 8).transpose(0, 1)}, "hidden must be contiguous, got"),
            ({"router": torch.ones(1030, 8)}, "takes up to 1024 experts, got 1030"),
            ({"groups": 3, "topk_groups": 2}, "experts and groups are powers of two, got 24"),
        )
        if backend == "triton" or "groups" not in change
    ],
)
def test_what_the_kernels_do_not_take(backend, change, message):
    case = {"hidden": torch.ones(2, 4, 8), "router": torch.ones(24, 8)} | change
    case["router"] = case["router"].to(case["hidden"].dtype)
    with pytest.raises(RuntimeError, match=message):
        ops.route(**case, top_k=4, score="sigmoid", backend=backend)


def test_groups_of_any_number_in_cuda(cuda_on_cpu):
    case = tied(1, 9, 24, 12)
    options = {"top_k": 4, "score": "sigmoid", "groups": 3, "topk_groups": 2}
    assert_equals_plain(ops.route(**case, **options, backend="cuda"), plain(**case, **options))
