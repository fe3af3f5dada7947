"""The definition of ``linear``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pydllm.reference.rms_norm import rms_norm
from pydllm.reference.swiglu import swiglu

SCALE_BLOCK = 128  # rows and columns of a weight that share one scale
# A matrix library chooses its kernel, and with it the order of a sum, from the number of rows. It
# always gets this many: 32 costs what F.linear costs from 32 rows on, and 4 to 8 times at one row.
_HEIGHT = 32
_PIECE = 2**20  # weights that are dequantised at a time: a few MB


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x @ (scale * weight).T + bias``, in tiles of 32 rows; missing rows are zeros.

    With a scale, the product is that of fp32 operands (fp64 for fp64) and is rounded once.
    """
    rows = x.reshape(-1, x.shape[-1])
    count, wide = rows.shape[0], torch.promote_types(x.dtype, torch.float32)
    tiles = F.pad(rows, (0, 0, 0, -count % _HEIGHT)).split(_HEIGHT)
    if scale is None:
        y = torch.cat([F.linear(tile, weight, bias) for tile in tiles])
    else:
        wide_tiles = [tile.to(wide) for tile in tiles]
        pieces = []
        for part, piece in _dequantized_pieces(weight, scale, wide):
            added = None if bias is None else bias[part].to(wide)
            pieces.append(torch.cat([F.linear(tile, piece, added) for tile in wide_tiles]))
        y = torch.cat(pieces, 1).to(x.dtype)
    return y[:count].view(*x.shape[:-1], weight.shape[0])


def linear_swiglu(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """``swiglu`` of the product's rows ``[gate | up]``."""
    return swiglu(linear(x, weight, scale, bias))


def linear_rms_norm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    norm: Tensor,
    eps: float,
    residual: Tensor,
) -> Tensor:
    """``rms_norm`` of the product plus ``residual``, which becomes that sum."""
    return rms_norm(linear(x, weight, scale, bias), norm, eps, residual)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale * weight``: one scale per row of the weight, or per block of 128 x 128.

    Of matrices ``(..., N, K)``, of which each has scales of its own.
    """
    values = weight.to(dtype)
    if scale.ndim < weight.ndim:
        return values * scale.to(dtype)[..., None]
    blocks = scale.to(dtype).repeat_interleave(SCALE_BLOCK, -1)[..., : weight.shape[-1]]
    return values * blocks.repeat_interleave(SCALE_BLOCK, -2)[..., : weight.shape[-2], :]


def _dequantized_pieces(
    weight: Tensor, scale: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive rows of the dequantised weight, whole blocks at a time."""
    height = max(_PIECE // weight.shape[1] // SCALE_BLOCK, 1) * SCALE_BLOCK
    for start in range(0, weight.shape[0], height):
        part = slice(start, min(start + height, weight.shape[0]))
        blocks = slice(start // SCALE_BLOCK, -(-part.stop // SCALE_BLOCK))
        yield part, dequantize(weight[part], scale[part if scale.ndim == 1 else blocks], dtype)
