"""``multiblock_step`` in the middle of a sequence: two blocks open, half of the masks certain.

A name says the sequences, the length of the generation region and what is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch

from pydllm import ops, reference
from pydllm.ops.multiblock_step import MultiBlockState

MASK, EOS, PROMPT, BLOCK = 126336, 126081, 100, 32
SHAPES = {
    f"{batch}x{new}{'-cached' * cached}": {"batch": batch, "new": new, "cached": cached}
    for batch, new, cached in ((1, 256, False), (1, 256, True), (32, 256, True), (32, 4096, True))
}


def make(dtype: torch.dtype, device: str, *, batch: int, new: int, cached: bool) -> dict:
    """fp32 (fp64) entropies whatever the dtype of the logits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.full((batch, PROMPT + new), MASK)
    x[:, :PROMPT] = 7
    rows = min(2 * BLOCK, new)
    state = MultiBlockState.make(x, new, BLOCK)
    state.nfe[:] = 9
    state.created[:] = min(2, state.blocks.shape[2])
    state.first[:] = PROMPT
    state.rows[:] = rows
    state.blocks[1, :, 0] = 1
    state.eligible[:, PROMPT : PROMPT + rows] = True
    tensors = {
        "x": x,
        "step_map": torch.full_like(x, -1, dtype=torch.int32),
        "numbers": state.numbers,
        "blocks": state.blocks,
        "eligible": state.eligible,
        "token": torch.randint(0, EOS, (batch, rows), generator=generator),
        "entropy": torch.rand(batch, rows, generator=generator).to(
            torch.promote_types(dtype, torch.float32)
        ),
        "prompt": torch.full((batch,), PROMPT, dtype=torch.int32),
        "eos": torch.tensor([EOS]),
    }
    return {name: t.to(device) for name, t in tensors.items()} | {"new": new, "cached": cached}


def call(inputs: dict, backend: str) -> tuple[torch.Tensor, ...]:
    state = MultiBlockState(inputs["numbers"], inputs["blocks"], inputs["eligible"])
    ops.multiblock_step(
        inputs["x"],
        inputs["step_map"],
        state,
        inputs["token"],
        inputs["entropy"],
        mask_id=MASK,
        prompt_length=inputs["prompt"],
        max_new_tokens=inputs["new"],
        block_length=BLOCK,
        threshold=0.5,
        eos_ids=inputs["eos"],
        cached=inputs["cached"],
        backend=backend,
    )
    return inputs["x"], inputs["step_map"], *state


def _positional(inputs: dict, *, shifted: bool = False, size: int = BLOCK):
    """The arguments as the reference and the launcher take them."""
    *tensors, new, cached = inputs.values()
    *tensors, prompt, eos = tensors
    rule = (new, size, 0.5, 4, 31, 2, 3)
    return (*tensors, MASK, prompt, eos, *rule, True, cached, new, shifted)


def _compiled() -> Callable[[dict], tuple[torch.Tensor, ...]]:
    compiled = torch.compile(reference.multiblock_step)

    def run(inputs: dict) -> tuple[torch.Tensor, ...]:
        compiled(*_positional(inputs))
        return tuple(inputs[n] for n in ("x", "step_map", "numbers", "blocks", "eligible"))

    return run


BASELINES = {"torch.compile": _compiled}


def bytes_moved(inputs: dict) -> int:
    """Ids, the eligible and the statistics once; what is written is small."""
    batch, new = inputs["x"].shape[0], inputs["new"]
    return batch * new * 9 + inputs["token"].numel() * (8 + inputs["entropy"].element_size())


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kind of decoder, at every tile that it has."""
    from pydllm.kernels import multiblock_step as kernel

    for new, cached, shifted in product((256, 2048, 4096), *[(False, True)] * 2):
        inputs = make(torch.float32, "meta", batch=4, new=new, cached=cached)
        arguments = _positional(inputs, shifted=shifted)
        kind = f"{'dream' if shifted else 'llada'}{' cached' * cached}"
        yield f"{kind} {new}", lambda arguments=arguments: kernel.multiblock_step(*arguments)
