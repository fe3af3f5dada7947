"""``edit_block`` against a restatement on lists, block by block and step by step."""

import math
from pathlib import Path

import pytest
import torch

from pydllm import ops, reference
from pydllm._backend.errors import BackendError
from pydllm.ops import BlockEdits
from tests.ops.levenshtein import Block
from tests.ops.test_unmask import integers, numbers

BACKENDS = ["torch", "triton"]
MASK, DELETE, SPLIT = 3, 9, 5
IDS = {"mask_id": MASK, "delete_id": DELETE, "split_id": SPLIT}
VOCAB, ROWS, SLOTS, LEAD = 12, 8, 13, 2
OPTIONS = [
    {"threshold": 0.4, "edit_threshold": 0.0, "max_post_steps": 3},
    {"threshold": 0.3, "edit_threshold": 0.3, "max_post_steps": 0},
    {"threshold": 0.5, "edit_threshold": 0.25, "max_post_steps": 1},
    {"threshold": 0.9, "edit_threshold": None, "max_post_steps": 2},
    {"threshold": 0.45, "edit_threshold": 0.2, "max_post_steps": 16},
]


def table(seed, *, cyclic, exact, vocab=VOCAB):
    """Logits of a block, by the block itself, so that blocks can recur, or by the step as well.

    ``exact``: probabilities are 1 / n in every precision, and full of ties.
    """

    def logits(step, block):
        key = (seed, *block) if cyclic else (seed, step, *block)
        generator = torch.Generator().manual_seed(hash(key) % 2**62)
        if exact:
            return -1000.0 * torch.randint(0, 5, (len(block), vocab), generator=generator).double()
        return 3 * torch.randn(len(block), vocab, generator=generator, dtype=torch.float64)

    return logits


def begin(blocks, seed, budget):
    """Ragged blocks at ragged places of a batch: the restated ones, and the op's arguments."""
    x = integers(blocks, SLOTS, low=0, high=VOCAB, seed=seed)
    length = integers(blocks, low=ROWS // 2, high=ROWS + 1, seed=seed + 1)
    start = integers(blocks, low=0, high=SLOTS - ROWS + 1, seed=seed + 2)
    prompt = torch.minimum(integers(blocks, low=0, high=ROWS, seed=seed + 3), length)
    for b in range(blocks):
        own = slice(start[b] + prompt[b], start[b] + length[b])
        x[b, own] = MASK
        if b % 4 == 3:  # also a block that begins with tokens
            x[b, own][::2] = integers(len(x[b, own][::2]), low=6, high=9, seed=b)
    case = {
        "x": x,
        "step_map": torch.full((blocks, SLOTS), -1, dtype=torch.int32),
        "nfe": numbers(torch.zeros(blocks)),
        "edits": BlockEdits.make(blocks, ROWS, budget),
        "start": numbers(start),
        "length": numbers(length),
        "editable_from": numbers(start + prompt),
    }
    # Nothing but the counters is read when a block begins.
    case["edits"].original.fill_(True)
    case["edits"].seen.fill_(-7)
    case["edits"].written.fill_(2**30)
    return case


def restated(case, option):
    blocks = []
    for b in range(len(case["x"])):
        first, size = int(case["start"][b]), int(case["length"][b])
        tokens = case["x"][b, first : first + size].tolist()
        prompt = int(case["editable_from"][b]) - first
        blocks.append(Block(tokens, prompt, ids=IDS.values(), **option))
    return blocks


def decode(case, models, option, *, dtype, backend=None, op=ops.edit_block, expect=None):
    """Steps until every block is complete, each compared with the restated blocks."""
    outside = case["x"].clone()
    limit = case["length"].max().item() + option["max_post_steps"] + 1
    for step in range(limit):
        rows = []
        for b, model in enumerate(models):
            block = case["x"][b, case["start"][b] :][: case["length"][b]].tolist()
            own = model(step, block)
            poison = own.new_full((ROWS - len(block), own.shape[1]), math.nan)
            rows.append(torch.cat((own, poison)))
        logits = torch.stack(rows)
        for block, row in zip(expect or (), logits.tolist(), strict=expect is not None):
            if not block.complete:
                block.step(row)
        got = op(**case, logits=logits.to(dtype), **IDS, **option, backend=backend)
        if expect is None:
            if case["edits"].complete.all():
                return step + 1
            continue
        for b, block in enumerate(expect):
            first, size = int(case["start"][b]), block.size
            assert case["x"][b, first : first + size].tolist() == block.x
            assert case["step_map"][b, first : first + size].tolist() == block.steps
            edits = [int(field[b]) for field in (case["edits"].post_steps, case["nfe"])]
            assert edits == [block.post, block.updates]
            assert case["edits"].updates[b] == block.updates
            assert bool(case["edits"].complete[b]) == block.complete
            if block.updates == step + 1:
                assert int(got.changed[b]) == block.changed
                left = sum(t == MASK for t in block.x[block.prompt :])
                assert int(got.remaining[b]) == left
                if not block.complete:
                    assert case["edits"].original[b, :size].tolist() == block.original
        position = torch.arange(SLOTS) - case["start"][:, None]
        inside = (position >= 0) & (position < case["length"][:, None])
        assert torch.equal(case["x"].masked_fill(inside, 0), outside.masked_fill(inside, 0))
        if case["edits"].complete.all():
            return step + 1
    raise AssertionError("a block did not end")


@pytest.mark.parametrize(
    ("backend", "dtype", "blocks"),
    [
        ("torch", torch.float64, 40),
        ("torch", torch.float16, 40),
        ("triton", torch.float32, 16),
        ("triton", torch.float16, 16),
    ],
    ids=str,
)
def test_blocks_equal_the_restatement(backend, dtype, blocks):
    repeats = rebuilds = by_budget = 0
    half = dtype == torch.float16
    for case, option in enumerate(OPTIONS):
        exact = dtype != torch.float64 or case % 2 == 0
        # The interpreter takes its time: half of the pairs in each dtype.
        for cyclic in (False, True) if backend == "torch" else ((case % 2 == 0) ^ half,):
            seed = 100 * case + 50 * cyclic
            models = [table(1000 * seed + b, cyclic=cyclic, exact=exact) for b in range(blocks)]
            batch = begin(blocks, seed, option["max_post_steps"])
            expected = restated(batch, option)
            decode(batch, models, option, dtype=dtype, backend=backend, expect=expected)
            repeats += sum(block.repeats > 0 for block in expected)
            rebuilds += sum(block.rebuilds > 0 for block in expected)
            by_budget += sum(block.post >= option["max_post_steps"] for block in expected)
    assert rebuilds > blocks and by_budget > blocks and repeats > blocks / 8


def written(old, choice, prompt=0):
    """One update of a block with choices of probability almost 1."""
    case = {
        "x": torch.tensor([old]),
        "step_map": torch.full((1, len(old)), -1, dtype=torch.int32),
        "nfe": numbers(torch.zeros(1)),
        "edits": BlockEdits.make(1, len(old), 16),
        "start": numbers(torch.zeros(1)),
        "length": numbers(torch.full((1,), len(old))),
        "editable_from": numbers(torch.full((1,), prompt)),
    }
    logits = 50.0 * torch.nn.functional.one_hot(torch.tensor([choice]), VOCAB).double()
    option = {"threshold": 0.5, "edit_threshold": 0.0, "max_post_steps": 16}
    ops.edit_block(**case, logits=logits, **IDS, **option)
    return case["x"][0].tolist(), case["edits"].original[0].tolist()


def test_hand_cases():
    m, d, s = MASK, DELETE, SPLIT
    assert written([8, 4, 2, m], [8, d, s, 6])[0] == [8, m, 2, 6]
    assert written([1, 4, 2, m], [d, d, s, 6], prompt=1)[0] == [1, m, 2, 6]
    # A split at a mask gives two masks, of which one is new; what is pushed out is lost.
    assert written([1, m, 2, 4], [1, s, 2, 4]) == ([1, m, m, 2], [False, False, True, False])
    # A deletion moves the flags, and what fills the end is new.
    assert written([m, m, 2, m], [d, 7, 2, 6]) == ([7, 2, 6, m], [True, False, True, False])
    # An id that stands in the prompt is not an operation.
    assert written([d, s, m, m], [1, 1, 7, 8], prompt=2)[0] == [d, s, 7, 8]
    # The spec's block, from its first forward to its last.
    option = {"threshold": 0.5, "edit_threshold": 0.0, "max_post_steps": 16}
    block = Block([1, m, m, m], 1, ids=IDS.values(), **option)
    steps = [
        ([(1, 0.9), (2, 0.9), (8, 0.3), (4, 0.8)], [1, 2, m, 4]),
        ([(1, 0.9), (s, 0.9), (8, 0.3), (4, 0.9)], [1, m, 2, 8]),
        ([(1, 0.9), (d, 0.9), (2, 0.9), (8, 0.9)], [1, 2, 8, m]),
        ([(1, 0.9), (2, 0.9), (8, 0.9), (6, 0.2)], [1, 2, 8, 6]),
        ([(1, 0.9), (2, 0.9), (8, 0.9), (6, 0.2)], [1, 2, 8, 6]),
    ]
    models, wanted = [], []
    for choices, after in steps:
        rows = torch.full((4, VOCAB), -math.inf, dtype=torch.float64)
        for j, (token, p) in enumerate(choices):
            rows[j] = math.log((1 - p) / (VOCAB - 1))
            rows[j, token] = math.log(p)
        models.append(rows)
        wanted.append(after)
    case = {
        "x": torch.tensor([[1, m, m, m]]),
        "step_map": torch.full((1, 4), -1, dtype=torch.int32),
        "nfe": numbers(torch.zeros(1)),
        "edits": BlockEdits.make(1, 4, 16),
        "start": numbers(torch.zeros(1)),
        "length": numbers(torch.full((1,), 4)),
        "editable_from": numbers(torch.ones(1)),
    }
    for rows, after in zip(models, wanted, strict=True):
        got = ops.edit_block(**case, logits=rows[None], **IDS, **option)
        block.step(rows.tolist())
        assert case["x"][0].tolist() == after == block.x
    assert case["edits"].complete and got.changed == 0 and block.complete


def test_what_a_complete_block_promises():
    """3,000 blocks, of any logits: they end in time, and hold no mask, deletion or split."""
    blocks, never = 300, 0
    for case in range(10):
        option = OPTIONS[case % len(OPTIONS)]
        batch = begin(blocks, case, option["max_post_steps"])
        before = batch["x"].clone()
        models = [table(7000 * case + b, cyclic=case % 2 == 0, exact=False) for b in range(blocks)]
        hostile = [MASK, DELETE, SPLIT]

        def contrary(model, step, block, case=case, hostile=hostile):
            rows = model(step, block)
            if case >= 5:  # what wants to be edited, or nothing to choose from
                rows[:, hostile[(step + len(block)) % 3]] = 30.0
                rows[step % len(block)] = -math.inf if case % 2 else math.nan
            return rows

        held = [lambda s, b, m=m, f=contrary: f(m, s, b) for m in models]
        decode(batch, held, option, dtype=torch.float64)
        edits, limit = batch["edits"], batch["length"] + option["max_post_steps"] + 1
        assert edits.complete.all() and (edits.updates <= limit).all()
        if option["max_post_steps"] == 0:
            assert (edits.post_steps <= 1).all()
        position = torch.arange(SLOTS)
        own = position >= batch["editable_from"][:, None]
        own &= position < (batch["start"] + batch["length"])[:, None]
        special = torch.isin(batch["x"], torch.tensor(hostile))
        # Only an id that stood in a block that nothing was written to can have stayed.
        assert not (own & special & (batch["x"] != before)).any()
        assert not (own & special & (before == MASK)).any()
        assert torch.equal(batch["x"].masked_fill(own, 0), before.masked_fill(own, 0))
        never += int((edits.updates == limit).sum())
    assert never > 10  # the limit was needed


def test_a_sequence_does_not_depend_on_the_others():
    option, blocks = OPTIONS[0], 12
    models = [table(b, cyclic=b % 2 == 0, exact=False) for b in range(blocks)]
    together = begin(blocks, 5, option["max_post_steps"])
    alone = begin(blocks, 5, option["max_post_steps"])
    models[3] = lambda step, block: torch.full((len(block), VOCAB), math.nan, dtype=torch.float64)
    decode(together, models, option, dtype=torch.float64)
    for b in range(blocks):
        fields = {n: v[b : b + 1] for n, v in alone.items() if n != "edits"}
        case = fields | {"edits": BlockEdits(*(field[b : b + 1] for field in alone["edits"]))}
        decode(case, models[b : b + 1], option, dtype=torch.float64)
        for name in ("x", "step_map", "nfe"):
            assert torch.equal(case[name][0], together[name][b])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vocabulary_of_many_tiles(backend):
    """Ties far apart, the choice in the last tile, -inf for most of it."""
    vocab, option = 5003, OPTIONS[0]
    outcomes = []
    for reading in ("torch", backend):
        case = begin(4, 9, option["max_post_steps"])
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            logits = torch.full((4, ROWS, vocab), -math.inf)
            for b in range(4):
                for j in range(ROWS):
                    ids = torch.randint(0, vocab, (1 + j % 4,), generator=generator)
                    logits[b, j, ids] = 7.0
            logits[..., -1] = -93.0
            logits[0, ::2, DELETE] = logits[1, ::3, SPLIT] = logits[2, ::2, MASK] = 7.0
            ops.edit_block(**case, logits=logits, **IDS, **option, backend=reading)
        outcomes.append([*(case[name] for name in ("x", "step_map", "nfe")), *case["edits"]])
    assert all(map(torch.equal, *outcomes))


def arguments(case, logits, option, backend="torch"):
    edit = math.inf if option["edit_threshold"] is None else option["edit_threshold"]
    first = (case["x"], case["step_map"], case["nfe"], *case["edits"], logits, *IDS.values())
    places = (case["start"], case["length"], case["editable_from"])
    return (*first, *places, option["threshold"], edit, option["max_post_steps"], backend)


def test_opcheck_and_compile():
    option = OPTIONS[0]
    logits = torch.randn(3, ROWS, VOCAB, generator=torch.Generator().manual_seed(1))
    case = begin(3, 1, option["max_post_steps"])
    torch.library.opcheck(torch.ops.pydllm.edit_block.default, arguments(case, logits, option))
    eager, compiled = (begin(3, 1, option["max_post_steps"]) for _ in range(2))
    expected = ops.edit_block(**eager, logits=logits, **IDS, **option)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(case, logits):
        return ops.edit_block(**case, logits=logits, **IDS, **option)

    assert all(map(torch.equal, run(compiled, logits), expected))
    assert torch.equal(compiled["x"], eager["x"])
    assert all(map(torch.equal, compiled["edits"], eager["edits"]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    for batch, rows in ((0, ROWS), (2, 0)):
        zero = numbers(torch.zeros(batch))
        got = ops.edit_block(
            torch.zeros(batch, 9, dtype=torch.int64),
            torch.zeros(batch, 9, dtype=torch.int32),
            zero,
            BlockEdits.make(batch, rows, 3),
            torch.zeros(batch, rows, VOCAB),
            start=zero.clone(),
            length=zero.clone(),
            editable_from=zero.clone(),
            backend=backend,
            **IDS,
            **OPTIONS[0],
        )
        assert [field.tolist() for field in got] == [[0] * batch] * 2


# The text that is replaced in reference/edit_block.py, and what by.
MUTANTS = {
    "a mask at the threshold is filled": ("(score > limit)", "(score >= limit)"),
    "a token at the threshold is replaced": ("(score > edit_limit)", "(score >= edit_limit)"),
    "tokens of the prompt are replaced": ("edit = own & ~masked", "edit = inside & ~masked"),
    "masks are edited": ("edit = own & ~masked", "edit = own"),
    "new masks are not counted": ("need = 1 + masked.sum(1) - n_old", "need = 1 + 0 * n_old"),
    "a split keeps the new token": (
        "torch.where(write & ~split, token",
        "torch.where(write, token",
    ),
    "a split opens its gap after the token": (
        "pairs = torch.stack((torch.full_like(x_old, mask_id), kept_token), 2)",
        "pairs = torch.stack((torch.where(split, kept_token, mask_id), "
        "torch.where(split, mask_id, kept_token)), 2)",
    ),
    "what was written moves with a deletion": (
        "    changed = inside",
        "    gone = delete.any(1)[:, None, None]\n"
        "    written.copy_(torch.where(gone, written.roll(-1, 2), written))\n    changed = inside",
    ),
    "the flags do not move": ("flags = there & flags.gather(1, order)", "flags = first"),
    "post steps start again": (
        "new_post = post_steps + (n_old == 0)",
        "new_post = (post_steps + 1) * (n_old == 0)",
    ),
    "the last step writes a mask": ("write & last[:, None] & ~ordinary", "False & ~ordinary"),
    "the last step avoids repeats": ("repeats.any(1) & ~last", "repeats.any(1)"),
    "the surest token is changed": ("score.masked_fill(~ch", "(-score).masked_fill(~ch"),
    "what fills the end is an old mask": (
        "there & flags.gather(1, order)",
        "~there | flags.gather(1, order)",
    ),
    "repeats are not noticed": ("& earlier.squeeze(2)", "& False"),
    "an old mask is answered by the mask": ("evades = old & (", "evades = False & ("),
    "its score is not the other's": ("(probability(other), score)", "(score, score)"),
    "ties from the right": ("0 - score, torch.nan", "0 - score - row * 1e-9, torch.nan"),
    "the budget is one more": ("new_post >= max_post_steps", "new_post > max_post_steps"),
    "the limit is one less": ("new_updates > length +", "new_updates >= length +"),
    "without a budget it goes on": ("last = last | ~(old & ~fill).any(1)", "pass"),
    "complete blocks go on": ("takes_part = ~complete & ", "takes_part = "),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    """The comparison above fails for each planted bug."""
    old, new = MUTANTS[name]
    source = Path(reference.__file__).with_name("edit_block.py").read_text()
    assert source.count(old) == 1
    room = {}
    exec(source.replace(old, new), room)

    def mutant(logits, edits, mask_id, delete_id, split_id, backend, **case):
        edit = case.pop("edit_threshold")
        edit = math.inf if edit is None else edit
        counts = room["edit_block"](
            *(case.pop(name) for name in ("x", "step_map", "nfe")),
            *edits,
            logits,
            mask_id,
            delete_id,
            split_id,
            edit_threshold=edit,
            **case,
        )
        return ops.EditedBlock(*counts)

    with pytest.raises((AssertionError, IndexError)):
        for case, option in enumerate(OPTIONS):
            for cyclic in (True, False):
                exact = case % 2 == 0
                models = [table(1000 * case + b, cyclic=cyclic, exact=exact) for b in range(30)]
                batch = begin(30, 100 * case, option["max_post_steps"])
                expected = restated(batch, option)
                decode(batch, models, option, dtype=torch.float64, op=mutant, expect=expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"threshold": 1.5}, ValueError, r"threshold: expected a number in \[0, 1\], got 1.5"),
        ({"edit_threshold": -0.5}, ValueError, "edit_threshold: expected a number in"),
        ({"max_post_steps": 4}, ValueError, r"edits.seen: expected shape \(3, 12, 8\), got \(3, 1"),
        ({"mask_id": VOCAB}, ValueError, r"mask_id: expected an int in \[0, 11\], got 12"),
        ({"split_id": MASK}, ValueError, "split_id: expected another id than mask_id, got 3"),
        ({"edits": None}, TypeError, "edits: expected what BlockEdits.make returns, got NoneType"),
        ({"logits": torch.ones(3, 20, VOCAB)}, ValueError, "logits: expected blocks of at most 13"),
        (
            {"logits": torch.ones(3, ROWS, VOCAB).double(), "backend": "triton"},
            BackendError,
            "fp32",
        ),
        (
            {"logits": torch.ones(3, ROWS, VOCAB, requires_grad=True)},
            ValueError,
            "requires_grad",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(change, error, message):
    case = begin(3, 1, OPTIONS[0]["max_post_steps"])
    before = [value.clone() for value in (case["x"], case["step_map"], case["nfe"])]
    given = case | {"logits": torch.ones(3, ROWS, VOCAB)} | IDS | OPTIONS[0] | change
    with pytest.raises(error, match=message):
        ops.edit_block(**given)
    assert all(map(torch.equal, (case["x"], case["step_map"], case["nfe"]), before))
