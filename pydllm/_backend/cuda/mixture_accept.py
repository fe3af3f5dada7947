"""Launches csrc/mixture_accept.cu and csrc/_mixture_accept_sparse.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm._backend.cuda import DTYPES, call

# Bytes of a row that a block looks at, and candidates of a list: kTileBytes and kCandidateTile in
# csrc/mixture_accept.h.
TILE_BYTES = 16384
CANDIDATE_TILE = 32


def supports(
    logits: Tensor,
    verifier: Tensor,
    token: Tensor,
    length: Tensor,
    mixture: float,
    mixtures: Tensor | None,
    threshold: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    seed: int,
    counter: Tensor | None,
    suppress_ids: Tensor | None,
    shared: int,
    first_free: bool,
    critical: bool,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    lists = (token, length, mixtures, threshold, temperatures, suppress_ids)
    return _why_not(logits, verifier, lists)


def sparse_supports(
    ids: Tensor,
    logits: Tensor,
    noise: Tensor,
    size: Tensor,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    token: Tensor,
    length: Tensor,
    mixture: float,
    mixtures: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    first_free: bool,
    critical: bool,
) -> str | None:
    """None if the kernel can run this call, otherwise why not."""
    lists = (ids, logits, noise, size, bias, token, length, mixtures, temperatures)
    return _why_not(hidden, head, lists)


def _why_not(logits: Tensor, verifier: Tensor, lists: tuple[Tensor | None, ...]) -> str | None:
    if logits.dtype not in DTYPES:
        return f"the kernel takes fp32, fp16 and bf16, got {logits.dtype}"
    for matrix in (logits, verifier):
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            return f"matrices must be rows of contiguous elements, got strides {matrix.stride()}"
    for tensor in lists:
        if tensor is not None and not tensor.is_contiguous():
            return f"what is one entry per row must be contiguous, got strides {tensor.stride()}"
    return None


class _Pieces:
    """What both forms allocate and pass: room for what is found of pieces of rows, and results."""

    def __init__(
        self,
        token: Tensor,
        length: Tensor,
        tiles: int,
        mixture: float,
        mixtures: Tensor | None,
        temperature: float,
        temperatures: Tensor | None,
        first_free: bool,
        critical: bool,
    ) -> None:
        rows, device = token.shape[0], token.device
        self.accepted, self.target = torch.empty_like(length), torch.empty_like(token)
        self.correction = torch.empty(length.shape, dtype=torch.int64, device=device)
        self.least = torch.empty(rows if critical else 0, dtype=torch.float32, device=device)
        of_tiles = (rows, tiles) if critical else (0,)
        self.arguments = {
            "accepted": self.accepted,
            "correction": self.correction,
            "target": self.target,
            "least": self.least if critical else None,
            "best": torch.empty(rows, tiles, dtype=torch.int64, device=device),
            "least_of_tiles": torch.empty(of_tiles, dtype=torch.float32, device=device),
            "token": token,
            "length": length,
            "mixtures": mixtures,
            "temperatures": temperatures,
            "batch": length.shape[0],
            "rows": rows // max(1, length.shape[0]),
            "tiles": tiles,
            "mixture": mixture,
            "inverse": 1 / temperature if temperature else 1.0,
            "first_free": first_free,
        }

    def results(self) -> tuple[Tensor, ...]:
        return self.accepted, self.correction, self.target, self.least


def mixture_accept(
    logits: Tensor,
    verifier: Tensor,
    token: Tensor,
    length: Tensor,
    mixture: float,
    mixtures: Tensor | None,
    threshold: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    seed: int,
    counter: Tensor | None,
    suppress_ids: Tensor | None,
    shared: int,
    first_free: bool,
    critical: bool,
) -> tuple[Tensor, ...]:
    """Launch the kernels; ``mixtures`` and ``temperatures`` are tensors that may stand for one."""
    sampled = counter is not None and (temperatures is not None or temperature > 0)
    tiles = -(-shared * logits.element_size() // TILE_BYTES)
    numbers = (mixture, mixtures, temperature if sampled else 0.0, temperatures)
    pieces = _Pieces(token, length, tiles, *numbers, first_free, critical)
    call(
        "mixture_accept",
        logits.device,
        **pieces.arguments,
        logits=logits,
        verifier=verifier,
        threshold=threshold,
        counter=counter if sampled else None,
        suppress_ids=suppress_ids,
        dtype=logits.dtype,
        vocab=logits.shape[1],
        verifier_vocab=verifier.shape[1],
        shared=shared,
        suppress_count=0 if suppress_ids is None else suppress_ids.shape[0],
        seed=seed,
        stride_logits_row=logits.stride(0),
        stride_verifier_row=verifier.stride(0),
        stride_counter_row=counter.stride(0) if counter is not None else 0,
        stride_counter_word=counter.stride(1) if counter is not None else 0,
    )
    return pieces.results()


def mixture_accept_sparse(
    ids: Tensor,
    logits: Tensor,
    noise: Tensor,
    size: Tensor,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    token: Tensor,
    length: Tensor,
    mixture: float,
    mixtures: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    first_free: bool,
    critical: bool,
) -> tuple[Tensor, ...]:
    """Launch the kernels on lists of candidates."""
    tiles = -(-ids.shape[1] // CANDIDATE_TILE)
    numbers = (mixture, mixtures, temperature, temperatures)
    pieces = _Pieces(token, length, tiles, *numbers, first_free, critical)
    call(
        "mixture_accept_sparse",
        hidden.device,
        **pieces.arguments,
        ids=ids,
        values=logits,
        noise=noise,
        size=size,
        hidden=hidden,
        head=head,
        bias=bias,
        dtype=hidden.dtype,
        capacity=ids.shape[1],
        width=hidden.shape[1],
        verifier_vocab=head.shape[0],
        softcap=0.0 if softcap is None else softcap,
        stride_hidden_row=hidden.stride(0),
        stride_head_row=head.stride(0),
    )
    return pieces.results()
