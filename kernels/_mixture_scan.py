"""The second pass of ``mixture_accept``: merges the pieces of each row, then scans the rows.

One program per sequence takes the best of each row's pieces as its target, and looks for the first
row whose draft is another token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tiles

NO_ID = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _mixture_accept_scan_kernel(
    # pointers
    accepted_ptr,  # (B,) int32
    correction_ptr,  # (B,) int64
    target_ptr,  # (B * rows,) int64
    least_ptr,  # (B * rows,) fp32
    score_ptr,  # (B * rows, tiles)
    id_ptr,  # (B * rows, tiles)
    critical_ptr,  # (B * rows, tiles)
    token_ptr,  # (B * rows,)
    length_ptr,  # (B,)
    # sizes
    rows,
    tiles,
    # constexprs
    FIRST_FREE: tl.constexpr,
    CRITICAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(length_ptr + sequence), rows)
    first_row = sequence * rows
    offs_t = tl.arange(0, BLOCK_T)[None, :]
    run = tl.maximum(length, 0)
    correction = tl.full((), -1, tl.int64)
    for start in range(0, rows, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        used = offs_m < length
        row = first_row + offs_m
        # [BLOCK_M, BLOCK_T]
        mask = used[:, None] & (offs_t < tiles)
        pieces = row[:, None] * tiles + offs_t
        scores = tl.load(score_ptr + pieces, mask=mask, other=float("-inf"))
        ids = tl.load(id_ptr + pieces, mask=mask, other=NO_ID)
        best = tl.max(tl.where(scores == scores, scores, float("-inf")), 1)
        chosen = tl.min(tl.where(scores == best[:, None], ids, NO_ID), 1)
        none = (best == float("-inf")) | (tl.max((scores != scores).to(tl.int32), 1) > 0)
        target = tl.where(none, -1, chosen).to(tl.int64)
        tl.store(target_ptr + row, target, mask=offs_m < rows)
        same = (target == tl.load(token_ptr + row, mask=used, other=-1)) & (target >= 0)
        if FIRST_FREE:
            same = same | (offs_m == 0)
        first = tl.min(tl.where(used & (same == 0), offs_m, NO_ID), 0)
        if first < run:
            run = first
            correction = tl.sum(tl.where(offs_m == first, target, 0), 0)
        if CRITICAL:
            least = tl.max(tl.load(critical_ptr + pieces, mask=mask, other=0.0), 1)
            tl.store(least_ptr + row, least, mask=offs_m < rows)
    tl.store(accepted_ptr + sequence, run)
    tl.store(correction_ptr + sequence, correction)


class Pieces:
    """The partial results of all rows, and the launch that merges them."""

    def __init__(
        self, token: torch.Tensor, length: torch.Tensor, tiles: int, critical: bool
    ) -> None:
        self.token, self.length, self.tiles, self.critical = token, length, tiles, critical
        self.rows = token.shape[0] // max(1, length.shape[0])
        shape, device = (token.shape[0], tiles), token.device
        self.scores = torch.empty(shape, dtype=torch.float32, device=device)
        self.ids = torch.empty(shape, dtype=torch.int32, device=device)
        self.least = torch.empty(shape if critical else 0, dtype=torch.float32, device=device)

    def arguments(
        self,
        mixture: float,
        mixtures: torch.Tensor | None,
        temperature: float,
        temperatures: torch.Tensor | None,
        sampled: bool,
    ) -> dict[str, object]:
        """What both kernels of pieces take."""
        return {
            "score_ptr": self.scores,
            "id_ptr": self.ids,
            "critical_ptr": self.least if self.critical else self.scores,
            "token_ptr": self.token,
            "length_ptr": self.length,
            "mixture_ptr": self.scores if mixtures is None else mixtures,
            "temperature_ptr": self.scores if temperatures is None else temperatures,
            "rows": self.rows,
            "tiles": self.tiles,
            "mixture": mixture,
            "inverse_temperature": 1 / temperature if sampled and temperature else 1.0,
            "HAS_MIXTURES": mixtures is not None,
            "HAS_TEMPERATURES": temperatures is not None,
            "CRITICAL": self.critical,
        }

    def scan(self, first_free: bool) -> tuple[torch.Tensor, ...]:
        """Accepted rows, correction, target, and the critical weights if asked for."""
        accepted, target = torch.empty_like(self.length), torch.empty_like(self.token)
        correction = torch.empty(self.length.shape, dtype=torch.int64, device=self.length.device)
        least = self.scores.new_empty(target.shape if self.critical else 0)
        block_m, num_warps = _tiles.MIXTURE_ACCEPT_SCAN
        if self.length.shape[0]:
            _mixture_accept_scan_kernel[(self.length.shape[0],)](
                accepted_ptr=accepted,
                correction_ptr=correction,
                target_ptr=target,
                least_ptr=least if self.critical else self.scores,
                score_ptr=self.scores,
                id_ptr=self.ids,
                critical_ptr=self.least if self.critical else self.scores,
                token_ptr=self.token,
                length_ptr=self.length,
                rows=self.rows,
                tiles=self.tiles,
                FIRST_FREE=first_free,
                CRITICAL=self.critical,
                BLOCK_M=block_m,
                BLOCK_T=_tiles.next_power_of_2(self.tiles),
                num_warps=num_warps,
                enable_fp_fusion=True,
            )
        return accepted, correction, target, least
