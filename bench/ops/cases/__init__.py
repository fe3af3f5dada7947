"""What is measured and compiled for each op, one file per op.

Each case module has

* ``SHAPES``: named sizes, as keyword arguments of ``make``;
* ``make(dtype, device, **sizes)``: inputs, never zeros;
* ``call(inputs, backend)``: the op on them;
* ``BASELINES``: what else somebody could run on the same inputs, by name;
* ``bytes_moved(inputs)``: the bytes that any implementation has to move;
* ``operations(inputs)``, where the op does more than compare: floating-point operations, two for
  each multiply-add of a product, elsewhere about as many as the formula has;
* ``launches()``: (label, function) pairs that launch on meta tensors, for ahead-of-time
  compilation.
"""

from bench.ops.cases import (
    certainty_loss,
    commit_branch,
    draft,
    edit_block,
    edit_tokens,
    experts,
    head_stats,
    linear,
    mixture_accept,
    mixture_draft,
    multiblock_step,
    renoise,
    rms_norm,
    route,
    swiglu,
    unmask,
    verify,
    vocab_stats,
    window_attention,
)

_MODULES = (
    certainty_loss,
    commit_branch,
    draft,
    edit_block,
    edit_tokens,
    experts,
    head_stats,
    linear,
    mixture_accept,
    mixture_draft,
    multiblock_step,
    renoise,
    rms_norm,
    route,
    swiglu,
    unmask,
    verify,
    vocab_stats,
    window_attention,
)
CASES = {module.__name__.rpartition(".")[2]: module for module in _MODULES}
