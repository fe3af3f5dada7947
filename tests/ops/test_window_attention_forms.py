"""The forms of ``window_attention`` together, against the definition in fp64."""

import pytest
import torch

from pydllm import ops
from pydllm.testing import error_budget, max_error, random_normal
from tests.ops.test_window_attention import KERNELS_DTYPES, copy
from tests.ops.test_window_attention_masks import MASKS, branched

# start, length, kv_len, commit, pad of: prefix, dual cache, refresh, left padding, no row at all.
SEQUENCES = [
    (50, 6, 56, 6, 0),
    (40, 5, 96, 0, 0),
    (0, 6, 6, 6, 0),
    (9, 6, 70, 3, 11),
    (8, 0, 9, 0, 0),
]
SLOTS, PAGE = 96, 16
# Triton's bf16 is its fp16 with other conversions; in CUDA it is other instructions.
RUNS = [run for run in KERNELS_DTYPES if run != ("triton", torch.bfloat16)]


def paged(inputs):
    """The caches cut into pages, in disorder, and the table that finds them."""
    batch, pages = len(inputs["start"]), SLOTS // PAGE
    order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(3))
    table = order.view(batch, pages).int()
    changed = {"block_table": table}
    for name in ("k_cache", "v_cache"):
        pieces = inputs[name].unflatten(1, (pages, PAGE)).flatten(0, 1)
        changed[name] = torch.empty_like(pieces)
        changed[name][order] = pieces
    return inputs | changed


def run(inputs, backend, **options):
    """Output, keys and values after the call."""
    used = copy(inputs)
    out = ops.window_attention(**used, **options, backend=backend)
    return out, used["k_cache"], used["v_cache"]


@pytest.mark.parametrize("is_paged", [False, True], ids=["whole", "paged"])
@pytest.mark.parametrize("has_norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize(("backend", "dtype"), RUNS, ids=str)
def test_masks_with_every_other_form(backend, dtype, branches, has_norms, is_paged):
    """Every mask with every pair of values of the three forms."""
    head_dim = 64 if backend == "cuda" else 16
    inputs = branched(SEQUENCES, branches, dtype, rows=6, head_dim=head_dim, slots=SLOTS)
    if has_norms:
        for seed, name in enumerate(("q_norm", "k_norm")):
            inputs[name] = random_normal(head_dim, seed=seed, dtype=dtype)
    if is_paged:
        inputs = paged(inputs)
    wide = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    # Half of the masks each: the forms of equal parity have every pair of values among them.
    parity = (branches > 1) ^ has_norms ^ is_paged
    for mask in [{}, *MASKS.values()][parity::2]:
        options = mask | ({"branches": branches} if branches > 1 else {})
        exact, plain = run(wide, "torch", **options), run(inputs, "torch", **options)
        got = run(inputs, backend, **options)
        for one, want, same in zip(got, exact, plain, strict=True):
            assert max_error(one, want) <= error_budget(want, same), mask
