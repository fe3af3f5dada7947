"""Tile sizes and launch parameters, one literal table per op, reviewed like code.

Rows are keyed by what decides them (architecture, head size, rows, ...). There is no autotuner in
the library: ``bench/ops/tune.py`` proposes rows, people paste them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

INTERPRETER = 0  # the "architecture" of a CPU tensor: few programs and big blocks are fast there


def arch(device: torch.device) -> int:
    """Compute capability as ``10 * major + minor``; ``INTERPRETER`` for CPU tensors."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return INTERPRETER


def pdl(device: torch.device, wanted: bool) -> dict[str, bool]:
    """Options of a launch that may begin before the previous kernel ends; none where it may not."""
    return {"PDL": True, "launch_pdl": True} if wanted and arch(device) >= 90 else {}


# For launchers: triton.cdiv and triton.next_power_of_2 take 2 us on the host, to unwrap constexprs.
def cdiv(size: int, block: int) -> int:
    """Blocks that hold ``size``."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """Least power of two that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()


GRID = 65535  # most programs along the second and the third dimension of a grid


def exceeds_grid(what: str, size: int, block: int = 1) -> str | None:
    """Why ``size`` in blocks of ``block`` does not fit such a dimension; None if it does."""
    most = GRID * block
    return None if size <= most else f"the kernel takes up to {most} {what}, got {size}"


MAX_VOCAB = 2**30  # ids, and those past the last that a tile or a loop's step reaches, are int32


def exceeds_vocab(size: int, most: int = MAX_VOCAB) -> str | None:
    """Why a kernel does not take a vocabulary of ``size`` ids; None if it does."""
    return None if size <= most else f"the kernel takes up to {most} ids, got {size}"


# rms_norm: largest row (elements) -> num_warps; a row is one block.
RMS_NORM = ((1024, 2), (4096, 4), (8192, 8), (32768, 16))

# swiglu: elements of a block, num_warps; a row is cut into blocks.
SWIGLU = (1024, 4)


class UnmaskTile(NamedTuple):
    """One program of ``unmask``: sequences, and how it is compiled; a window is one block."""

    block_b: int
    num_warps: int


# unmask: largest window (positions) -> tile. With 4096 some rules spill on some chips. The
# interpreter pays by the operation, not its size.
UNMASK = ((128, UnmaskTile(1, 1)), (2048, UnmaskTile(1, 8)))
UNMASK_INTERPRETER = ((128, UnmaskTile(256, 4)), (2048, UnmaskTile(32, 4)))


# edit_tokens: most positions of a window. With 4096 it spills under Triton 3.7; blocks have 32.
EDIT_TOKENS_ROWS = 1024


# edit_block: most positions of a block; the prefix sum of its moves is one tile.
EDIT_BLOCK_ROWS = 256


class EditBlockTile(NamedTuple):
    """One program of ``edit_block``: sequences, and steps of the past that are compared at a time;
    where the logits are read rows, ids at a time, and programs that share a row.
    """

    block_b: int
    block_u: int
    block_r: int
    block_v: int
    splits: int
    num_warps: int


EDIT_BLOCK = (
    (64, EditBlockTile(1, 32, 1, 2048, 16, 4)),
    (256, EditBlockTile(1, 8, 1, 2048, 16, 4)),
)
EDIT_BLOCK_INTERPRETER = ((256, EditBlockTile(16, 32, 128, 128, 2, 4)),)


def edit_block_tile(device: torch.device, rows: int) -> EditBlockTile:
    """The tile of ``EDIT_BLOCK`` for a block."""
    table = EDIT_BLOCK_INTERPRETER if arch(device) == INTERPRETER else EDIT_BLOCK
    return next(tile for limit, tile in table if rows <= limit)


def unmask_tile(device: torch.device, rows: int) -> UnmaskTile:
    """The tile of ``UNMASK`` for a window."""
    table = UNMASK_INTERPRETER if arch(device) == INTERPRETER else UNMASK
    return next(tile for limit, tile in table if rows <= limit)


class StatsTile(NamedTuple):
    """One program of ``vocab_stats``: rows, vocabulary ids, and warps."""

    block_r: int
    block_v: int
    num_warps: int


# vocab_stats: (vocabulary up to, tile). By the vocabulary alone: a row is split alike in any batch.
# 4096 ids are 31 programs per row of LLaDA's vocabulary, each with 64 bytes per thread in flight.
VOCAB_STATS = ((1024, StatsTile(4, 1024, 4)), (None, StatsTile(1, 4096, 4)))
VOCAB_STATS_INTERPRETER = ((4096, StatsTile(32, 1024, 4)), (None, StatsTile(32, 16384, 4)))


def vocab_stats_tile(device: torch.device, vocab: int) -> StatsTile:
    """The tile of ``VOCAB_STATS`` for a vocabulary."""
    table = VOCAB_STATS_INTERPRETER if arch(device) == INTERPRETER else VOCAB_STATS
    return next(tile for limit, tile in table if limit is None or vocab <= limit)


# vocab_stats with top-k or top-p: a program holds a piece of a row in registers.
VOCAB_STATS_CUT = ((1024, StatsTile(1, 1024, 4)), (None, StatsTile(1, 4096, 4)))
VOCAB_STATS_CUT_INTERPRETER = (
    (512, StatsTile(1, 256, 4)),
    (8192, StatsTile(1, 1024, 4)),
    (None, StatsTile(1, 16384, 4)),
)


def vocab_stats_cut_tile(device: torch.device, vocab: int) -> StatsTile:
    """The tile that finds the smallest logit kept."""
    interpreted = arch(device) == INTERPRETER
    table = VOCAB_STATS_CUT_INTERPRETER if interpreted else VOCAB_STATS_CUT
    return next(tile for limit, tile in table if limit is None or vocab <= limit)


class HeadTile(NamedTuple):
    """One program of ``head_stats``: rows, vocabulary ids, and the width of a step."""

    block_r: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int


# head_stats: bytes per element -> tile. fp32 is not for speed: it is exact, without tensor cores.
HEAD_STATS = {2: HeadTile(64, 128, 64, 8, 3), 4: HeadTile(32, 128, 16, 4, 2)}
# More rows on sm_90: half the reads of the weight, the limit from 4 windows of 32 rows on. Two
# warps share 16 rows as above, with the same instruction: the bits of a row are the same.
HEAD_STATS_MANY = HeadTile(128, 128, 64, 16, 3)
HEAD_STATS_INTERPRETER = HeadTile(64, 1024, 128, 4, 1)


def head_stats_tile(device: torch.device, element_size: int, rows: int = 1) -> HeadTile:
    """The tile of ``HEAD_STATS`` for a dtype; its vocabulary ids do not depend on the rows."""
    capability, tile = arch(device), HEAD_STATS[element_size]
    if capability == INTERPRETER:
        return HEAD_STATS_INTERPRETER
    if 90 <= capability < 100 and element_size == 2 and rows > tile.block_r:
        return HEAD_STATS_MANY
    return tile


def merge_rows(device: torch.device) -> int:
    """Rows per program that merges the partial results of ``head_stats``."""
    return 32 if arch(device) == INTERPRETER else 1


class AttentionTile(NamedTuple):
    """One program of ``window_attention``: query rows, keys per step, and how it is compiled.

    ``registers`` is a bound per thread. Left to itself, ptxas spills to bring 174 registers down to
    128, where two programs fit one multiprocessor; with a bound that one program fits it does not.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int | None = None
    resident: int = 1  # programs that a multiprocessor holds at a time


# window_attention: architecture, bytes per element, head size up to -> tile. One for any number of
# rows, or the bits of a row would depend on the window and its branches.
WINDOW_ATTENTION = {
    (INTERPRETER, 2, 512): AttentionTile(128, 64, 4, 1),
    (INTERPRETER, 4, 512): AttentionTile(128, 64, 4, 1),
    (80, 2, 64): AttentionTile(64, 32, 4, 3, 224),
    (80, 2, 128): AttentionTile(64, 32, 8, 3),
    (80, 2, 256): AttentionTile(32, 32, 8, 2, 255),
    (80, 2, 512): AttentionTile(16, 32, 8, 1),
    (80, 4, 64): AttentionTile(32, 32, 8, 2),
    (80, 4, 128): AttentionTile(32, 16, 8, 2),
    (80, 4, 256): AttentionTile(16, 16, 8, 2),
    (80, 4, 512): AttentionTile(16, 16, 8, 1, 255),
    (90, 2, 64): AttentionTile(64, 64, 4, 4, None, 2),
    (90, 2, 128): AttentionTile(64, 32, 4, 5, None, 2),
    (90, 2, 256): AttentionTile(32, 32, 8, 2),
    (90, 2, 512): AttentionTile(32, 16, 8, 1),
    (90, 4, 64): AttentionTile(32, 32, 8, 2),
    (90, 4, 128): AttentionTile(32, 32, 8, 2),
    (90, 4, 256): AttentionTile(32, 16, 8, 1),
    (90, 4, 512): AttentionTile(16, 16, 8, 1, 255),
    (100, 2, 64): AttentionTile(64, 64, 8, 3, 255),
    (100, 2, 128): AttentionTile(64, 32, 8, 4, 255),
    (100, 2, 256): AttentionTile(32, 32, 8, 2),
    (100, 2, 512): AttentionTile(32, 16, 8, 1),
    (100, 4, 64): AttentionTile(32, 32, 8, 2),
    (100, 4, 128): AttentionTile(32, 32, 8, 2),
    (100, 4, 256): AttentionTile(32, 16, 8, 1),
    (100, 4, 512): AttentionTile(16, 16, 8, 1),
}

# For more rows than that tile has: as many keys a step and a warp for 16 rows, as there, so that a
# row's sums are grouped alike and its bits do not depend on which of the two it is.
WINDOW_ATTENTION_MANY = {
    (90, 2, 64): AttentionTile(128, 64, 8, 4),
    (90, 2, 128): AttentionTile(128, 32, 8, 4),
}

# With branches and a norm of each head. Norms take registers: without branches, a pass before the
# kernel normalises and rotates the keys; with them, other tiles and more stages spill.
WINDOW_ATTENTION_NORMED = {
    (90, 2, 128): AttentionTile(128, 32, 8, 2),
}

# For long windows, which are not split.
WINDOW_ATTENTION_LONG = {
    (90, 2, 64): AttentionTile(128, 64, 8, 4),
    (90, 2, 128): AttentionTile(128, 64, 8, 4),
}

# Windows of up to this many rows (of one branch) sum their keys in splits of this many positions,
# if a head has at most this many bytes: above, split kernels spill registers. Not by the number of
# programs, on which the bits of a sequence must not depend.
ATTENTION_SPLIT_ROWS = 128
ATTENTION_SPLIT = 256
ATTENTION_SPLIT_BYTES = 512

# Merge of the splits: rows of a program, num_warps. Rotation of a long window, and of what
# commit_branch writes: bytes of keys, num_warps.
ATTENTION_MERGE = (4, 4)
ATTENTION_ROTATE = (8192, 4)
COMMIT_BRANCH = (2048, 4)


class AttentionPlan(NamedTuple):
    """How a call of ``window_attention`` is cut into programs."""

    tile: AttentionTile
    splits: int  # of the keys
    split_tiles: int  # key tiles of one, 0: keys are not split
    groups: int  # programs that share the splits of a tile of rows
    walk: str  # "one" split per program, "each" of several is stored, "all" are merged in a program
    is_rotated: bool  # the keys of the window are rotated by a pass before


def multiprocessors(device: torch.device) -> int:
    """How many the device has; 0 where programs run one after the other: one has all splits."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 0 if arch(device) == INTERPRETER else 132


def attention_key(device: torch.device, element_size: int, head_dim: int) -> tuple[int, int, int]:
    """The key of the tables of ``window_attention`` for a head size."""
    capability = arch(device)
    if capability != INTERPRETER:
        # 86, 89 and 120 have the shared memory and the tensor-core instruction of the first class.
        capability = 100 if 100 <= capability < 120 else 90 if 90 <= capability < 100 else 80
    return next(
        key
        for key in WINDOW_ATTENTION
        if key[:2] == (capability, element_size) and head_dim <= key[2]
    )


def attention_tile(device: torch.device, element_size: int, head_dim: int) -> AttentionTile:
    """The tile of ``WINDOW_ATTENTION`` for a head size."""
    return WINDOW_ATTENTION[attention_key(device, element_size, head_dim)]


def attention_plan(
    device: torch.device,
    element_size: int,
    head_dim: int,
    kv_heads: int,  # of all sequences
    rows: int,  # of all branches
    group: int,  # query heads of a KV head
    branches: int,
    slots: int,
    width: int | None = None,  # rows of a branch, or of a trunk that leaves follow
    *,
    is_normed: bool = False,  # keys are normalised, too
) -> AttentionPlan:
    """Splits by the window and the cache alone; what shares them by what fills the device."""
    width = rows // branches if width is None else width
    key = attention_key(device, element_size, head_dim)
    few = attention_tile(device, element_size, head_dim)
    many = WINDOW_ATTENTION_MANY.get(key, few)
    if is_normed and branches > 1:
        few = many = WINDOW_ATTENTION_NORMED.get(key, many)
    is_split = width <= ATTENTION_SPLIT_ROWS and head_dim * element_size <= ATTENTION_SPLIT_BYTES
    if not is_split:
        is_long = width > ATTENTION_SPLIT_ROWS
        tile = WINDOW_ATTENTION_LONG.get(key, few) if is_long else few
        return AttentionPlan(tile, 1, 0, 1, "one", (is_long or is_normed) and branches == 1)
    splits = -(-slots // ATTENTION_SPLIT)
    processors = multiprocessors(device)
    programs = -(-rows * group // many.block_m) * kv_heads
    tile = many
    if rows * group <= few.block_m or programs * splits < processors:
        tile = few
        programs = -(-rows * group // tile.block_m) * kv_heads
    is_rotated = is_normed and branches == 1
    if splits == 1:
        return AttentionPlan(tile, 1, 0, 1, "one", is_rotated)
    groups = min(max(processors * tile.resident // max(programs, 1), 1), splits)
    if branches > 1:
        groups = splits  # with branches there are no registers left for more than a split
    each = -(-splits // groups)
    walk = "all" if groups == 1 else "one" if each == 1 else "each"
    split_tiles = ATTENTION_SPLIT // tile.block_n
    return AttentionPlan(tile, splits, split_tiles, -(-splits // each), walk, is_rotated)


class DraftTile(NamedTuple):
    """One program of ``draft`` and ``verify``: the block that holds a window, and warps."""

    block_t: int
    num_warps: int


# draft, verify: largest window (positions) -> tile. Pairs of positions are compared.
DRAFT = ((32, DraftTile(32, 4)), (64, DraftTile(64, 8)), (128, DraftTile(128, 16)))

# draft, verify: positions that are copied at a time.
DRAFT_COPY = 256


def draft_tile(rows: int) -> DraftTile:
    """The tile of ``DRAFT`` for a window."""
    return next(tile for limit, tile in DRAFT if rows <= limit)


class MixtureDraftTile(NamedTuple):
    """One program of ``mixture_draft``, a row: ids read at a time, drawn for at a time, noted."""

    block_v: int
    block_n: int
    scratch: int
    num_warps: int


# mixture_draft: the scratch holds what may be in a nucleus, beyond it the row is read again.
MIXTURE_DRAFT = MixtureDraftTile(4096, 1024, 8192, 16)
MIXTURE_DRAFT_INTERPRETER = MixtureDraftTile(1024, 1024, 64, 4)


def mixture_draft_tile(device: torch.device) -> MixtureDraftTile:
    """The tile of ``mixture_draft``."""
    return MIXTURE_DRAFT_INTERPRETER if arch(device) == INTERPRETER else MIXTURE_DRAFT


class MixtureAcceptTile(NamedTuple):
    """One program of ``mixture_accept``: ids, or candidates of a list and columns of the head."""

    block_v: int
    block_c: int
    block_h: int
    num_warps: int


# mixture_accept: like vocab_stats; rows and columns of the head that are read at a time.
MIXTURE_ACCEPT = MixtureAcceptTile(4096, 8, 128, 4)
MIXTURE_ACCEPT_INTERPRETER = MixtureAcceptTile(1024, 32, 128, 4)

# Rows that are merged at a time, num_warps.
MIXTURE_ACCEPT_SCAN = (16, 8)


def mixture_accept_tile(device: torch.device) -> MixtureAcceptTile:
    """The tile of ``mixture_accept``."""
    return MIXTURE_ACCEPT_INTERPRETER if arch(device) == INTERPRETER else MIXTURE_ACCEPT


# certainty_loss: ids of a tile and num_warps. Forward a program is a row, read tile by tile.
CERTAINTY_LOSS = {"forward": (4096, 8), "backward": (2048, 8)}
CERTAINTY_LOSS_INTERPRETER = (16384, 4)


def certainty_loss_tile(device: torch.device, direction: str) -> tuple[int, int]:
    """The tile of ``CERTAINTY_LOSS`` for ``"forward"`` or ``"backward"``."""
    return CERTAINTY_LOSS_INTERPRETER if arch(device) == INTERPRETER else CERTAINTY_LOSS[direction]


# multiblock_step: positions of the tile up to -> num_warps; a sequence is one program.
MULTIBLOCK_STEP = ((512, 2), (2048, 8), (4096, 16))


def multiblock_step_warps(positions: int) -> int:
    """Warps of ``MULTIBLOCK_STEP`` for a tile."""
    return next(warps for limit, warps in MULTIBLOCK_STEP if positions <= limit)


class LinearTile(NamedTuple):
    """One program of ``linear``: columns, depth of a step, splits; then what bits do not depend on.

    ``num_warps`` is that of 64 rows.
    """

    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


# linear: bytes per weight, width, depth -> columns, splits, stages. Eight-bit weights leave room
# for two programs per multiprocessor, so that one converts while the other multiplies.
LINEAR = {
    # LLaDA-8B: qkv, out, gate_up, down.
    (2, 12288, 4096): (128, 1, 6),
    (2, 4096, 4096): (128, 4, 6),
    (2, 24576, 4096): (128, 1, 4),
    (2, 4096, 12288): (128, 4, 6),
    (1, 12288, 4096): (64, 1, 4),
    (1, 4096, 4096): (128, 8, 3),
    (1, 24576, 4096): (128, 1, 3),
    (1, 4096, 12288): (128, 8, 3),
    # Dream-7B.
    (2, 4608, 3584): (128, 4, 4),
    (2, 3584, 3584): (128, 4, 6),
    (2, 37888, 3584): (128, 1, 3),
    (2, 3584, 18944): (128, 4, 6),
    (1, 4608, 3584): (128, 4, 3),
    (1, 3584, 3584): (128, 7, 3),
    (1, 37888, 3584): (128, 1, 3),
    (1, 3584, 18944): (128, 8, 3),
}
# Other shapes: splits double up to this number of programs and keep this number of steps each.
LINEAR_PROGRAMS, LINEAR_STEPS = 112, 8
LINEAR_FP32 = LinearTile(64, 32, 1, 8, 3)  # exact, without tensor cores; not for speed
LINEAR_INTERPRETER = LinearTile(128, 128, 2, 4, 1)
LINEAR_MERGE = (1024, 4)  # columns of a program that merges the splits of a row, num_warps


def linear_tile(
    device: torch.device, width: int, depth: int, weight_size: int, x_size: int
) -> LinearTile:
    """The tile for a weight ``(width, depth)``; never by the number of rows."""
    capability = arch(device)
    if capability == INTERPRETER:
        return LINEAR_INTERPRETER
    if x_size == 4:
        return LINEAR_FP32
    # mma.sync, and on some of them 99 KB of shared memory.
    small = capability < 90 or capability >= 120
    block_k = 128 if weight_size == 1 and not small else 64
    if (weight_size, width, depth) in LINEAR:
        block_n, splits, stages = LINEAR[weight_size, width, depth]
    else:
        block_n, splits, stages = 128, 1, 3
        tiles, steps = -(-width // block_n), -(-depth // block_k)
        while tiles * splits < LINEAR_PROGRAMS and steps >= 2 * splits * LINEAR_STEPS:
            splits *= 2
    if small:
        stages = 5 if weight_size == 1 else 4  # with 4, int8 spills on sm_86
    return LinearTile(block_n, block_k, splits, 4, stages)


def linear_height(device: torch.device, rows: int, weight_size: int, x_size: int) -> int:
    """Rows of a program; of the heights for which instruction and order of steps are the same.

    wgmma is m64n128k16 and mma.sync m16n8k16 whatever the height; tcgen05.mma has 64 or 128 rows.
    A taller tile reads, and converts, a weight fewer times.
    """
    capability = arch(device)
    if 100 <= capability < 120:
        return 128 if x_size == 2 else 64
    if rows <= 64 or x_size == 4:
        return 64
    # With 8-bit weights, 256 rows at three stages do not fit shared memory.
    tall = 90 <= capability < 100 and weight_size == 2
    return 256 if rows > 128 and tall else 128


class RouteTile(NamedTuple):
    """``route``: rows and experts of a program, a step, the split of a sum; rows of the others."""

    block_r: int
    block_e: int
    block_h: int
    split: int
    num_warps: int
    pool_rows: int
    pool_warps: int
    select_rows: int
    select_warps: int


# route: one tile for any number of rows. 16 x 16 logits over 256 of a row's values: 256 programs
# for 32 rows of 256 experts at width 2048. On tensor cores four warps need 32 experts: with 16, two
# and more of them compute the same rows.
ROUTE = RouteTile(16, 16, 64, 256, 4, 8, 4, 1, 1)
ROUTE_TENSOR_CORES = ROUTE._replace(block_e=32)
ROUTE_INTERPRETER = RouteTile(64, 256, 256, 256, 4, 64, 4, 64, 1)


def route_tile(device: torch.device, *, tensor_cores: bool = False) -> RouteTile:
    """The tile of ``route``; all have as many rows."""
    if arch(device) == INTERPRETER:
        return ROUTE_INTERPRETER
    return ROUTE_TENSOR_CORES if tensor_cores else ROUTE


class ExpertsTile(NamedTuple):
    """One program of ``experts``: pairs, columns, a step of the sum, and how it is compiled.

    Rows that begin anywhere are loaded by element, which takes more registers: ``unaligned_warps``.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    unaligned_warps: int
    num_stages: int


# experts: bytes per element -> tile, the same for any number of rows: at 64 rows Hopper would have
# another matrix instruction than at 16, and with it other bits. A window of 256 rows has 8 rows for
# each of 256 experts: 16 rows fill no more of a tile than they need. fp32 has no tensor cores: with
# 64 columns it spills under Triton 3.7 on sm_80 and sm_90.
EXPERTS = {2: ExpertsTile(16, 64, 64, 4, 8, 4), 4: ExpertsTile(16, 32, 32, 4, 4, 3)}
# Decoding 8-bit weights takes registers, too.
EXPERTS_QUANTISED = EXPERTS | {4: ExpertsTile(16, 32, 16, 4, 4, 3)}
EXPERTS_INTERPRETER = ExpertsTile(16, 64, 64, 4, 4, 1)

# experts: pairs that are counted at a time.
EXPERTS_ORDER = 256

# experts: rows and elements of a program that adds up the slots, num_warps.
EXPERTS_COMBINE = (1, 1024, 4)
EXPERTS_COMBINE_INTERPRETER = (64, 256, 4)


def experts_tile(device: torch.device, element_size: int, *, quantised: bool) -> ExpertsTile:
    """The tile of ``EXPERTS`` for the dtype of the rows and of the weights."""
    if arch(device) == INTERPRETER:
        return EXPERTS_INTERPRETER
    return (EXPERTS_QUANTISED if quantised else EXPERTS)[element_size]


def experts_combine_tile(device: torch.device) -> tuple[int, int, int]:
    """The tile of ``EXPERTS_COMBINE``."""
    return EXPERTS_COMBINE_INTERPRETER if arch(device) == INTERPRETER else EXPERTS_COMBINE
