"""A call of every op and form, whose tensors a test lays out as it likes.

``lay(name, tensor)`` returns what the call passes in the tensor's place. Sizes are 3 and more where
an op has no reason for another.
"""

import torch

from pydllm import ops

B, L, T, V, H = 3, 8, 4, 11, 16
INT32 = torch.int32


def numbers(*values):
    return torch.tensor(values, dtype=INT32)


def state(lay):
    """Ids with masks (0) among them, their step map and forwards."""
    x = torch.arange(1, B * L + 1).view(B, L)
    x[:, 2:6] = 0
    x[:, 4] = 5
    return (
        lay("x", x),
        lay("step_map", torch.full((B, L), -1, dtype=INT32)),
        lay("nfe", numbers(3, 1, 2)),
    )


def window(lay):
    return {
        "start": lay("start", numbers(2, 1, 3)),
        "length": lay("length", numbers(4, 3, 2)),
    }


def predicted(lay):
    token = torch.arange(20, 20 + B * T).view(B, T)
    return lay("token", token), lay("score", torch.rand(B, T))


def unmask(lay, backend):
    ending = ops.Ending(
        lay("done", torch.tensor([False, False, True])),
        lay("end", numbers(8, 7, 6)),
        torch.tensor([21, 26]),
        lay("ends_from", numbers(1, 1, 1)),
    )
    quota = lay("quota", numbers(9, 9, 2))
    options = {"mask_id": 0, "rule": "quota", "quota": quota, "ending": ending}
    return ops.unmask(*state(lay), *predicted(lay), **window(lay), **options, backend=backend)


def unmask_random(lay, backend):
    options = {"mask_id": 0, "rule": "random", "quota": lay("quota", numbers(1, 1, 2)), "seed": 3}
    request = lay("request", numbers(5, 6, 7))
    everything = window(lay) | options | {"request": request, "backend": backend}
    return ops.unmask(*state(lay), *predicted(lay), **everything)


def draft(lay, backend):
    x, _, _ = state(lay)
    options = {"mask_id": 0, "branches": 3, "block_size": 2, "backend": backend}
    return ops.draft(x, *predicted(lay), **window(lay), **options)


def verify(lay, backend):
    x, step_map, nfe = state(lay)
    candidates = x[:, None].repeat(1, 3, 1)
    candidates[:, 1:, 2] = 20
    return ops.verify(
        x,
        step_map,
        nfe,
        lay("candidates", candidates),
        lay("token", torch.arange(20, 20 + B * 3 * T).view(B, 3, T)),
        lay("score", torch.rand(B, 3, T)),
        mask_id=0,
        drafts=3,
        **window(lay),
        backend=backend,
    )


def edit_tokens(lay, backend):
    return ops.edit_tokens(
        *state(lay),
        lay("post_steps", numbers(0, 1, 2)),
        lay("complete", torch.tensor([False, False, True])),
        *predicted(lay),
        **window(lay),
        editable_from=lay("editable_from", numbers(2, 1, 3)),
        mask_id=0,
        threshold=0.6,
        edit_threshold=0.3,
        max_post_steps=2,
        backend=backend,
    )


def edit_block(lay, backend):
    made = ops.BlockEdits.make(B, T, 1)
    made.updates[:] = 2
    made.seen[:, 1] = torch.tensor([0, 0, 5, 0])
    made.original[:] = True
    edits = ops.BlockEdits(**{name: lay(name, each) for name, each in made._asdict().items()})
    return ops.edit_block(
        *state(lay),
        edits,
        lay("logits", torch.randn(B, T, V)),
        mask_id=0,
        delete_id=3,
        split_id=2,
        start=lay("start", numbers(2, 2, 3)),
        length=lay("length", numbers(4, 4, 2)),
        editable_from=lay("editable_from", numbers(2, 1, 3)),
        threshold=0.1,
        edit_threshold=0.0,
        max_post_steps=1,
        backend=backend,
    )


def renoise(lay, backend):
    token, entropy = predicted(lay)
    x = lay("x", torch.arange(B * T).view(B, T))
    request, step = lay("request", numbers(4, 5, 6)), lay("step", numbers(1, 2, 3))
    options = {"bound": 0.4, "vocab_size": 99, "seed": 1, "request": request, "step": step}
    return ops.renoise(x, token, entropy, **options, backend=backend)


def multiblock_step(lay, backend):
    x = torch.zeros(B, L, dtype=torch.int64)
    x[:, :2] = 7
    made = ops.MultiBlockState.make(x, 6, 2)
    made.eligible[:, 2:5] = True
    made.numbers[9] = 2
    return ops.multiblock_step(
        lay("x", x),
        lay("step_map", torch.full((B, L), -1, dtype=INT32)),
        ops.MultiBlockState(**{name: lay(name, each) for name, each in made._asdict().items()}),
        lay("token", torch.arange(20, 20 + 3 * B).view(B, 3)),
        lay("entropy", torch.rand(B, 3)),
        mask_id=0,
        prompt_length=lay("prompt_length", numbers(2, 1, 2)),
        max_new_tokens=6,
        block_length=2,
        threshold=0.5,
        cached=True,
        eos_ids=lay("eos_ids", torch.tensor([21, 24, 27])),
        backend=backend,
    )


def sampling(lay, count):
    counter = torch.arange(3 * count, dtype=INT32).view(count, 3)
    return {
        "temperature": lay("temperature", torch.linspace(0.5, 1.5, count)),
        "counter": lay("counter", counter),
        "seed": 3,
        "suppress_ids": lay("suppress_ids", numbers(1, 4, 9)),
    }


def vocab_stats(lay, backend):
    logits, rows = lay("logits", torch.randn(4, V)), lay("rows", numbers(2, 0, 3))
    return ops.vocab_stats(logits, rows=rows, **sampling(lay, 3), backend=backend)


def vocab_stats_filtered(lay, backend):
    limits = {"top_k": lay("top_k", numbers(4, 5, 6)), "top_p": lay("top_p", torch.full((3,), 0.8))}
    logits = lay("logits", torch.randn(3, V).half())  # fewer bits to search than fp32
    return ops.vocab_stats(logits, **sampling(lay, 3), **limits, backend=backend)


def head_stats(lay, backend):
    hidden, weight = lay("hidden", torch.randn(4, H)), lay("weight", torch.randn(V, H))
    rows, bias = lay("rows", torch.tensor([3, 1, 0])), lay("bias", torch.randn(V))
    options = {"rows": rows, "bias": bias, "backend": backend}
    return ops.head_stats(hidden, weight, **sampling(lay, 3), **options)


def merge_stats(lay, backend):
    ids = torch.arange(9, dtype=INT32).view(1, 3, 3)
    pieces = ops.StatsPartial(torch.rand(4, 3, 3), ids)
    named = {name: lay(name, tensor) for name, tensor in pieces._asdict().items()}
    return ops.merge_stats(ops.StatsPartial(**named), backend=backend)


def mixture_draft(lay, backend):
    logits, rows = lay("logits", torch.randn(4, V)), lay("rows", numbers(2, 0, 3))
    top_p = lay("top_p", torch.full((3,), 0.8))
    options = {"rows": rows, "top_p": top_p, "capacity": 4, "backend": backend}
    token, logsumexp, threshold, found = ops.mixture_draft(logits, **sampling(lay, 3), **options)
    return token, logsumexp, threshold, *found


def mixture(lay):
    return {
        "length": lay("length", numbers(2, 1, 2)),
        "mixture": lay("mixture", torch.tensor([0.5, 0.7, 0.2])),
        "critical": True,
    }


def mixture_accept(lay, backend):
    logits, token = torch.randn(6, V), torch.arange(6) % V
    verifier = lay("verifier", logits + torch.randn(6, V))
    threshold = lay("threshold", torch.full((6,), -1.0))
    given = lay("logits", logits), verifier, lay("token", token)
    options = {"threshold": threshold, "backend": backend}
    return ops.mixture_accept(*given, **mixture(lay), **sampling(lay, 6), **options)


def mixture_accept_sparse(lay, backend):
    counter = torch.arange(18, dtype=INT32).view(6, 3)
    nucleus = {"temperature": 1.0, "counter": counter, "top_p": 0.9, "capacity": 6}
    drafted = ops.mixture_draft(torch.randn(6, V), **nucleus, backend="torch")
    lists = {name: lay(name, each) for name, each in drafted.candidates._asdict().items()}
    return ops.mixture_accept_sparse(
        ops.Candidates(**lists),
        lay("hidden", torch.randn(6, H)),
        lay("weight", torch.randn(V, H)),
        lay("token", drafted.token),
        bias=lay("bias", torch.randn(V)),
        temperature=lay("temperature", torch.ones(6)),
        **mixture(lay),
        backend=backend,
    )


def heads(lay, *shapes, dtype):
    names = ("q", "k", "v", "k_cache", "v_cache")[-len(shapes) :]
    return [
        lay(name, torch.randn(shape).to(dtype)) for name, shape in zip(names, shapes, strict=True)
    ]


def attention(lay, backend, *, rows=4, kv_heads=1, paged=False, normed=False, **options):
    dtype = torch.float16
    cache = (5, 4, kv_heads, 64) if paged else (B, L, kv_heads, 64)
    fresh = B, rows, kv_heads, 64
    tensors = heads(lay, (B, rows, 2 * kv_heads, 64), fresh, fresh, cache, cache, dtype=dtype)
    angle = torch.rand(L + 4, 32)
    tables = {"cos": lay("cos", angle.cos()), "sin": lay("sin", angle.sin())}
    if paged:
        tables["block_table"] = lay("block_table", numbers(0, 1, 2, 3, 4, 1).view(B, 2))
    if normed:
        weights = torch.rand(2, 64).to(dtype)
        tables |= {"q_norm": lay("q_norm", weights[0]), "k_norm": lay("k_norm", weights[1])}
    return ops.window_attention(
        *tensors,
        start=lay("start", numbers(2, 1, 4)),
        length=lay("length", numbers(2, 1, 2)),
        kv_len=lay("kv_len", numbers(8, 6, 7)),
        commit=lay("commit", numbers(2, 1, 1)),
        pad=lay("pad", numbers(0, 1, 0)),
        **tables,
        **options,
        backend=backend,
    )


def window_attention(lay, backend):
    return attention(lay, backend, kv_heads=3)


def window_attention_blocks(lay, backend):
    offset = lay("block_offset", numbers(0, 1, 3))
    return attention(lay, backend, normed=True, block_size=4, block_offset=offset)


def window_attention_branches(lay, backend):
    return attention(lay, backend, paged=True, branches=2, window=5, softcap=3.0)


def window_attention_leaves(lay, backend):
    return attention(lay, backend, rows=8, causal=True, leaves=3, leaf_rows=2)


def commit_branch(lay, backend):
    fresh, cache = (B, 4, 3, 64), (5, 4, 3, 64)
    angle = torch.rand(L, 32)
    return ops.commit_branch(
        *heads(lay, fresh, fresh, cache, cache, dtype=torch.float32),
        branch=lay("branch", numbers(1, 0, 1)),
        start=lay("start", numbers(2, 1, 4)),
        commit=lay("commit", numbers(2, 1, 2)),
        pad=lay("pad", numbers(0, 1, 0)),
        cos=lay("cos", angle.cos()),
        sin=lay("sin", angle.sin()),
        k_norm=lay("k_norm", torch.rand(64)),
        block_table=lay("block_table", numbers(0, 1, 2, 3, 4, 1).view(B, 2)),
        branches=2,
        backend=backend,
    )


def route(lay, backend):
    hidden, router = lay("hidden", torch.randn(B, T, H)), lay("router", torch.randn(8, H))
    bias, start = lay("bias", torch.randn(8)), lay("start", numbers(1, 0, -1))
    options = {"top_k": 2, "score": "sigmoid", "capacity": 3, "block_size": 2, "backend": backend}
    return ops.route(
        hidden, router, bias, start=start, length=lay("length", numbers(3, 4, 2)), **options
    )


def experts(lay, backend):
    dtype = torch.float16
    weights = {"gate_up": (4, 32, 16), "down": (4, 16, 16)}
    shared = {"shared_gate_up": (32, 16), "shared_down": (16, 16)}
    halves = {
        name: lay(name, torch.randn(shape).to(dtype)) for name, shape in (weights | shared).items()
    }
    gate_up, down = halves.pop("gate_up"), halves.pop("down")
    return ops.experts(
        lay("hidden", torch.randn(3, 16).to(dtype)),
        gate_up,
        down,
        lay("ids", numbers(0, 1, 2, 3, 1, 2, 0, 4, 3).view(3, 3)),
        lay("weights", torch.rand(3, 3)),
        **halves,
        backend=backend,
    )


def linear(lay, backend):
    x, weight = torch.randn(3, 64).half(), torch.randn(48, 64).half()
    bias = lay("bias", torch.randn(48).half())
    return ops.linear(lay("x", x), lay("weight", weight), bias, backend=backend)


def linear_swiglu(lay, backend):
    made = ops.quantize(torch.randn(96, 64), "int8")
    weight = ops.QuantizedWeight(lay("weight", made.values), lay("scale", made.scale))
    return ops.linear_swiglu(lay("x", torch.randn(3, 64).half()), weight, backend=backend)


def linear_rms_norm(lay, backend):
    x, weight = lay("x", torch.randn(3, 1024).half()), lay("weight", torch.randn(40, 1024).half())
    norm = lay("norm", torch.randn(40).half())
    residual = lay("residual", torch.randn(3, 40).half())
    return ops.linear_rms_norm(x, weight, norm, 1e-5, residual, backend=backend)


def rms_norm(lay, backend):
    x, residual = lay("x", torch.randn(3, H)), lay("residual", torch.randn(3, H))
    weight = lay("weight", torch.randn(H))
    return ops.rms_norm(x, weight, 1e-5, residual=residual, backend=backend)


def swiglu(lay, backend):
    return ops.swiglu(lay("gate_up", torch.randn(3, 2 * H)), backend=backend)


def certainty_loss(lay, backend):
    logits = lay("logits", torch.randn(3, V)).requires_grad_()
    target = lay("target", logits.argmax(1))
    cross_entropy, entropy, correct = ops.certainty_loss(logits, target, backend=backend)
    # Not backward(): autograd's threads do not survive a fork, and some tests run this in one.
    grads = torch.full_like(cross_entropy, 1 / 3), torch.ones_like(entropy), None
    return cross_entropy, entropy, correct, cross_entropy.grad_fn.apply(*grads)[0]


CASES = (
    unmask,
    unmask_random,
    draft,
    verify,
    edit_tokens,
    edit_block,
    renoise,
    multiblock_step,
    vocab_stats,
    vocab_stats_filtered,
    head_stats,
    merge_stats,
    mixture_draft,
    mixture_accept,
    mixture_accept_sparse,
    window_attention,
    window_attention_blocks,
    window_attention_branches,
    window_attention_leaves,
    commit_branch,
    route,
    experts,
    linear,
    linear_swiglu,
    linear_rms_norm,
    rms_norm,
    swiglu,
    certainty_loss,
)
NOT_IN_CUDA = (edit_block, renoise, head_stats, certainty_loss)
RUNS = [
    (call, backend)
    for call in CASES
    for backend in ("triton", "cuda")
    if backend == "triton" or call not in NOT_IN_CUDA
]
