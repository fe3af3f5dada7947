"""``multiblock_step`` against a plain loop over positions and blocks, and Triton against it."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from pydllm import ops
from pydllm.ops.multiblock_step import MODES, MultiBlockState, decoded_at_least

MASK, ENDS = 0, (9, 8)
KERNELS = ["triton", "cuda"]
BACKENDS = ["torch", *KERNELS]


def start(prompts, new, size):
    """Ragged sequences of masks, behind prompts of the given lengths."""
    x = torch.full((len(prompts), max(prompts) + new), 5)
    for row, length in enumerate(prompts):
        x[row, length : length + new] = MASK
    steps = torch.full_like(x, -1, dtype=torch.int32)
    lengths = torch.tensor(prompts, dtype=torch.int32)
    return x, steps, MultiBlockState.make(x, new, size), lengths


def clone(x, steps, state):
    return x.clone(), steps.clone(), MultiBlockState(*(t.clone() for t in state))


def statistics(x, state, seed, *, ties=True, nan=0.1):
    """Tokens and entropies of the eligible span: few distinct values, and some NaN."""
    generator = torch.Generator().manual_seed(seed)
    width = int(state.rows.max())
    token = torch.randint(1, 12, (len(x), width), generator=generator)
    entropy = torch.rand(len(x), width, generator=generator)
    if ties:
        entropy = (entropy * 4).round() / 4
    entropy[torch.rand(len(x), width, generator=generator) < nan] = torch.nan
    return token, entropy


class Plain:
    """The fixed profile for one sequence, position by position and block by block."""

    def __init__(self, prompt, new, size, options):
        self.x, self.new, self.size, self.options = [MASK] * new, new, size, options
        self.prompt, self.created, self.full = prompt, 1, set()
        self.since, self.kept, self.prefix = {}, set(), 0
        self.nfe, self.finished = 0, False
        self.plan(set())

    def block(self, k):
        return range(k * self.size, min((k + 1) * self.size, self.new))

    def masks(self, k):
        return sum(self.x[p] == MASK for p in self.block(k))

    def accept(self, token, entropy, first):
        at = {p: p + self.prompt - first for p in self.eligible}
        cost = {p: math.inf if math.isnan(entropy[c]) else entropy[c] for p, c in at.items()}
        limit, shifted = self.options["threshold"], self.options["shifted"]
        taken = {p for p, h in cost.items() if (h < limit if shifted else h <= limit)}
        taken = {p for p in taken if cost[p] < math.inf}
        if not shifted:
            taken.add(min(cost, key=lambda p: (cost[p], p)))
        aggressive = [k for k in range(self.created) if k in self.full and self.masks(k)]
        inside = [p for p in cost if p in self.block(aggressive[0])]
        if not taken & set(inside):
            taken.add(min(inside, key=lambda p: (cost[p], p)))
        for p in taken:
            self.x[p] = token[at[p]]
        self.plan(taken)

    def plan(self, taken):
        options, left = self.options, MASK in self.x
        ends = [p for p, t in enumerate(self.x) if t in options["eos"]]
        if ends and (options["early_stop"] or not left):
            self.x[ends[0] + 1 :] = [options["eos"][0]] * (self.new - ends[0] - 1)
        elif ends:
            ends = []
        if MASK not in self.x:
            self.finished = True
            return
        self.nfe += 1
        size, blocks = self.size, -(-self.new // self.size)
        part = 1 - self.masks(self.created - 1) / size
        open_next = part >= options["add_at"] or self.masks(self.created - 1) == 0
        if open_next and self.created < blocks and not ends:
            self.created += 1
        for k in range(self.created):
            if k == 0 or 1 - self.masks(k - 1) / size >= options["full_at"]:
                self.full.add(k)
        self.eligible = [p for k in range(self.created) for p in self.block(k) if self.x[p] == MASK]
        self.mode, self.start, self.commit = "full", 0, 0
        if options["cached"]:
            self.plan_window()

    def plan_window(self):
        options, before = self.options, self.prefix
        if self.prompt > before and self.nfe >= options["delay"]:
            self.prefix = self.prompt
        for k in range(self.created):
            if self.masks(k):
                break
            self.since.setdefault(k, self.nfe)
            if self.nfe - self.since[k] >= options["delay"]:
                self.kept.add(k)
                self.prefix = max(self.prefix, self.prompt + self.block(k).stop)
        waits = any(k in self.since and k not in self.kept for k in range(self.created))
        due = waits or (options["refresh"] and self.nfe % options["refresh"] == 0)
        lead = int(options["shifted"] and before > 0)
        if before and due:
            self.mode, self.commit = "refresh", self.prefix
        elif self.prefix > before:
            self.mode, self.start = "commit", before - lead
            self.commit = self.prefix - self.start
        elif before:
            self.mode, self.start = "cached", before - lead

    def compare(self, row, x, state, total):
        assert x[row, self.prompt : total].tolist() == self.x
        assert state.nfe[row] == self.nfe
        assert (MODES[state.mode[row]] == "finished") == self.finished
        if self.finished:
            assert state.length[row] == state.commit[row] == state.rows[row] == 0
            return
        got = [int(n[row]) for n in (state.created, state.prefix, state.start, state.commit)]
        assert got == [self.created, self.prefix, self.start, self.commit]
        assert MODES[state.mode[row]] == self.mode
        assert state.length[row] == total - self.start and state.kv_len[row] == total
        places = (state.eligible[row].nonzero().flatten() - self.prompt).tolist()
        assert places == self.eligible
        assert state.first[row] == self.prompt + places[0]
        assert state.rows[row] == places[-1] - places[0] + 1


def settings(seed):
    draw = random.Random(seed)
    new, size = draw.choice([(1, 4), (7, 3), (16, 4), (20, 10), (30, 8), (5, 8)])
    return {
        "max_new_tokens": new,
        "block_length": size,
        "threshold": draw.choice([-1.0, 0.0, 0.25, 0.5, 2.0]),
        "add_at": draw.choice([0.0, 0.1, 0.5, 1.0]),
        "full_at": draw.choice([0.0, 0.5, 0.95, 1.0]),
        "early_stop": draw.random() < 0.6,
        "cached": draw.random() < 0.7,
        "delay": draw.choice([0, 1, 2, 3]),
        "refresh": draw.choice([None, 1, 3]),
        "shifted": draw.random() < 0.5,
    }


@pytest.mark.parametrize("seed", range(100))
def test_the_definition_equals_a_plain_loop(seed):
    options = settings(seed)
    prompts = [1 + seed % 3, 2, 6]
    x, steps, state, lengths = start(prompts, options["max_new_tokens"], options["block_length"])
    given = {"mask_id": MASK, "prompt_length": lengths, "eos_ids": torch.tensor(ENDS)}
    plain_options = {key: options[key] for key in set(options) - {"max_new_tokens", "block_length"}}
    new, size = options["max_new_tokens"], options["block_length"]
    plain = [Plain(n, new, size, plain_options | {"eos": ENDS}) for n in prompts]
    ops.multiblock_step(x, steps, state, x[:, :0], torch.empty(3, 0), **given, **options)
    for step in itertools.count():
        for row, one in enumerate(plain):
            one.compare(row, x, state, prompts[row] + new)
        if not (state.mode > 0).any():
            break
        before, firsts = x.clone(), state.first.tolist()
        token, entropy = statistics(x, state, 1000 * seed + step)
        ops.multiblock_step(x, steps, state, token, entropy, **given, **options)
        for row, one in enumerate(plain):
            if one.finished:
                assert torch.equal(before[row], x[row])
            else:
                one.accept(token[row].tolist(), entropy[row].tolist(), firsts[row])
        assert step < new
    assert int(state.decoded.max()) <= new
    assert torch.equal(steps >= 0, (steps >= 0) & (x != MASK))


@pytest.mark.parametrize("shifted", [False, True], ids=["llada", "dream"])
@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("backend", KERNELS)
def test_a_kernel_equals_the_definition(backend, cached, shifted):
    """Step by step on one trajectory of three sequences, everything that is written."""
    for early_stop, new, dtype in ((True, 20, torch.float32), (False, 12, torch.float16)):
        x, steps, state, lengths = start([2, 1, 5], new, 5)
        options = {
            **{"mask_id": MASK, "prompt_length": lengths, "eos_ids": torch.tensor(ENDS)},
            **{"max_new_tokens": new, "block_length": 5, "threshold": 0.25, "add_at": 0.3},
            **{"full_at": 0.5, "early_stop": early_stop, "cached": cached, "shifted": shifted},
            **{"delay": 1, "refresh": 3, "tail": 2},
        }
        token, entropy = x[:, :0], torch.empty(3, 0)
        for step in range(6):
            other = clone(x, steps, state)
            ops.multiblock_step(x, steps, state, token, entropy.to(dtype), **options)
            given = (token, entropy.to(dtype))
            ops.multiblock_step(*other, *given, backend=backend, **options)
            for name, want, got in zip(
                "xsnbe", (x, steps, *state), (*other[:2], *other[2]), strict=True
            ):
                assert torch.equal(want, got), (name, step)
            token, entropy = statistics(x, state, step)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_open_and_are_promoted_at_the_exact_counts(backend):
    """Block lengths 32, 16 and 10: at 10 % (4, 2, and 2: doubles) and 95 % (31, 16, 10)."""
    for size, opens, promotes in ((32, 4, 31), (16, 2, 16), (10, 2, 10)):
        assert decoded_at_least(0.1, size) == opens
        assert decoded_at_least(0.95, size) == promotes
        counts = [opens - 1, opens, promotes - 1, promotes]
        x, steps, state, lengths = start([1] * 4, 2 * size, size)
        options = {"mask_id": MASK, "prompt_length": lengths, "max_new_tokens": 2 * size}
        options |= {"block_length": size, "threshold": 0.5, "backend": backend}
        ops.multiblock_step(x, steps, state, x[:, :0], torch.empty(4, 0), **options)
        entropy = torch.ones(4, size)
        for row, count in enumerate(counts):
            entropy[row, :count] = 0
        ops.multiblock_step(x, steps, state, torch.full((4, size), 5), entropy, **options)
        assert state.decoded.tolist() == counts
        assert state.created.tolist() == [1, 2, 2, 2]
        assert state.blocks[1, :, 1].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_nan(backend):
    """The lowest position wins; NaN is never under a threshold, and is taken where all are."""
    nan = torch.nan
    rows = [[1.0, 0.5, 0.5, 0.5], [nan, nan, nan, nan], [nan, 3.0, nan, 3.0], [0.5, 0.2, nan, 0.2]]
    wanted = {False: [[1, 2, 3], [0], [1], [0, 1, 3]], True: [[1], [0], [1], [1, 3]]}
    for shifted, places in wanted.items():
        x, steps, state, lengths = start([1] * 4, 4, 4)
        options = {"mask_id": MASK, "prompt_length": lengths, "max_new_tokens": 4}
        options |= {"block_length": 4, "threshold": 0.5, "shifted": shifted, "backend": backend}
        ops.multiblock_step(x, steps, state, x[:, :0], torch.empty(4, 0), **options)
        ops.multiblock_step(x, steps, state, torch.full((4, 4), 5), torch.tensor(rows), **options)
        got = [(x[row, 1:] != MASK).nonzero().flatten().tolist() for row in range(4)]
        assert got == places
        assert [n.tolist() for n in steps] == [
            [-1] + [0 if p in taken else -1 for p in range(4)] for taken in places
        ]


def example(new=6, size=3):
    x, steps, state, lengths = start([2, 1], new, size)
    options = {"mask_id": MASK, "prompt_length": lengths, "max_new_tokens": new}
    options |= {"block_length": size, "threshold": 0.5, "eos_ids": torch.tensor(ENDS)}
    ops.multiblock_step(x, steps, state, x[:, :0], torch.empty(2, 0), **options)
    token, entropy = statistics(x, state, 0)
    return (x, steps, state, token, entropy), options


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_fullgraph(backend):
    (x, steps, state, token, entropy), options = example()
    rule = (6, 3, 0.5, 1, 3, 2, 0, True, True, 6, False, backend)
    inputs = (token, entropy, MASK, options["prompt_length"], options["eos_ids"])
    arguments = (x.clone(), steps.clone(), *(t.clone() for t in state), *inputs, *rule)
    torch.library.opcheck(torch.ops.pydllm.multiblock_step.default, arguments)
    other = clone(x, steps, state)

    def call(x, steps, numbers, blocks, eligible):
        state = MultiBlockState(numbers, blocks, eligible)
        ops.multiblock_step(x, steps, state, token, entropy, backend=backend, **options)

    call(x, steps, *state)
    torch.compile(call, fullgraph=True, backend="aot_eager")(*other[:2], *other[2])
    for want, got in zip((x, steps, *state), (*other[:2], *other[2]), strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sequence(backend):
    (x, steps, state, token, entropy), options = example()
    state = MultiBlockState(state.numbers[:, :0], state.blocks[:, :0], state.eligible[:0])
    options["prompt_length"] = options["prompt_length"][:0]
    inputs = (x[:0], steps[:0], state, token[:0], entropy[:0])
    ops.multiblock_step(*inputs, **options, backend=backend)


BAD = [
    ({"block_length": 0}, ValueError, "block_length: expected an int of at least"),
    ({"block_length": 2}, ValueError, r"state.blocks: expected shape \(4, 2, 3\), got \(4, 2, 2\)"),
    ({"delay": -1}, ValueError, "delay: expected an int of at least"),
    ({"refresh": 0}, ValueError, "refresh: expected an int of at least"),
    ({"tail": -1}, ValueError, "tail: expected an int of at least"),
    ({"add_at": 1.5}, ValueError, r"add_at: expected a number in \[0, 1\], got 1.5"),
    ({"full_at": "x"}, TypeError, r"full_at: expected a number in \[0, 1\], got 'x'"),
    ({"threshold": math.nan}, ValueError, "threshold: expected a number in .*, got nan"),
    ({"mask_id": 1.0}, TypeError, "mask_id: expected an int in .*, got 1.0"),
    ({"early_stop": "False"}, TypeError, "early_stop: expected True or False, got 'False'"),
    ({"prompt_length": torch.ones(2)}, TypeError, "prompt_length: expected dtype torch.int32"),
    ({"prompt_length": torch.ones(3).int()}, ValueError, r"prompt_length: expected shape \(2\)"),
    ({"eos_ids": torch.ones(0).long()}, ValueError, "eos_ids: expected None or at least one id"),
    ({"backend": "cuda"}, RuntimeError, "CUDA kernels need a CUDA tensor"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_options(change, error, message):
    inputs, options = example()
    with pytest.raises(error, match=message):
        ops.multiblock_step(*inputs, **(options | change))


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda x: x.int(), TypeError, "x: expected dtype torch.int64"),
        (1, lambda s: s[:1], ValueError, "step_map: expected shape"),
        (2, lambda s: s._replace(numbers=s.numbers[:3]), ValueError, r"numbers: expected shape"),
        (2, lambda s: s._replace(eligible=s.eligible.int()), TypeError, "eligible: expected dtype"),
        (3, lambda t: t[0], ValueError, r"token: expected shape \(2, S\)"),
        (4, lambda e: e[:, 1:], ValueError, "entropy: expected shape"),
        (4, lambda e: e.requires_grad_(), ValueError, "without gradient, got entropy"),
        (4, lambda e: e.long(), TypeError, "entropy: expected dtype torch.float32"),
    ],
)
def test_bad_tensors(place, change, error, message):
    inputs, options = example()
    inputs = [change(t) if n == place else t for n, t in enumerate(inputs)]
    with pytest.raises(error, match=message):
        ops.multiblock_step(*inputs, **options)


@pytest.mark.parametrize("backend", KERNELS)
def test_what_a_kernel_does_not_take(backend):
    inputs, options = example()
    inputs = list(inputs)
    wide = inputs[:4] + [inputs[4].double()]
    with pytest.raises(RuntimeError, match="takes fp32, fp16 and bf16 entropies"):
        ops.multiblock_step(*wide, **options, backend=backend)
    inputs[0] = inputs[0].mT.contiguous().mT
    with pytest.raises(RuntimeError, match="x must have contiguous rows, got strides"):
        ops.multiblock_step(*inputs, **options, backend=backend)
    x, steps, state, _ = start([1, 1], 5000, 1)
    empty = (x[:, :0], torch.empty(2, 0))
    long = options | {"max_new_tokens": 5000, "block_length": 1}
    message = "up to 4096 positions .* got 8192"
    if backend == "cuda":
        message = "8192 positions in up to 1024 blocks, got 5000 in 5000"
    with pytest.raises(RuntimeError, match=message):
        ops.multiblock_step(x, steps, state, *empty, **long, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("cached", [False, True])
def test_on_a_gpu(cached, backend):
    x, steps, state, lengths = start([3, 40, 7], 320, 32)
    options = {"mask_id": MASK, "max_new_tokens": 320, "block_length": 32, "threshold": 0.25}
    options["cached"] = cached
    there = [t.cuda() for t in (x, steps, *state)]
    token, entropy = x[:, :0], torch.empty(3, 0)
    for step in range(12):
        ends = torch.tensor(ENDS)
        given = {"prompt_length": lengths, "eos_ids": ends, "backend": "torch"}
        ops.multiblock_step(x, steps, state, token, entropy, **options, **given)
        given = {"prompt_length": lengths.cuda(), "eos_ids": ends.cuda(), "backend": backend}
        carried = MultiBlockState(*there[2:])
        ops.multiblock_step(*there[:2], carried, token.cuda(), entropy.cuda(), **options, **given)
        for want, got in zip((x, steps, *state), there, strict=True):
            assert torch.equal(want, got.cpu())
        token, entropy = statistics(x, state, step)
        token[(token == 9) | (token == 8)] = 7  # no end of sequence: more steps
