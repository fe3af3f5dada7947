"""Static decoding stated plainly, one sequence at a time, and what FreeDave must make of it.

Nothing is shared with the package but the numbers of the weights. ``static`` records what every
state of the trajectory predicts; from that alone ``replay`` says how many forwards FreeDave takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from pydllm import ops
from pydllm.models import ModelSpec
from pydllm.models.families import Sizes
from pydllm.models.native import NativeModel
from pydllm.models.rope import Rope

VOCAB, MASK, EOS, HEADS, SIZE = 14, 1, (5, 9), 2, 8
HIDDEN = HEADS * SIZE


class Rounded(NativeModel):
    """Logits rounded to halves and confidences to quarters: ties of tokens and of positions."""

    def head_stats(self, hidden, rows=None, **options):
        logits = self.head(hidden if rows is None else hidden[rows.long()])
        stats = ops.vocab_stats((logits * 2).round() / 2, **options)
        fields = stats._asdict()
        for name in ("prob", "entropy", "margin"):
            fields[name] = (fields[name] * 4).round() / 4
        return ops.VocabStats(**fields)


@dataclass
class Plain:
    """One layer, RMS norms without weights, rotary attention, SwiGLU; recomputes everything."""

    weights: dict
    shift: bool
    block: int | None
    rounded: bool

    def logits(self, ids, first=0, frozen=None, blocks=None):
        """Logits of ``ids (T,)`` at ``first``, and the keys and values; ``frozen``: keys, values
        and positions of what is seen besides; ``blocks (T,)``: the block of each, which sees none
        after it, instead of those of the model."""
        w, n = self.weights, len(ids)
        x = w["embedding"][ids]
        at = torch.arange(first, first + n)
        qkv = _norm(x) @ w["layers.0.qkv"].T
        q, k, v = qkv.view(n, 3, HEADS, SIZE).permute(1, 2, 0, 3)
        q, k = _turn(q, at), _turn(k, at)
        keys, values = k, v
        bias = torch.zeros(n, n, dtype=x.dtype)
        if self.block is not None:
            number = at // self.block if blocks is None else blocks
            bias[number[None] > number[:, None]] = -torch.inf
        if frozen is not None:
            k, v = torch.cat((k, frozen[0]), 1), torch.cat((v, frozen[1]), 1)
            bias = F.pad(bias, (0, k.shape[1] - n))
        a = (q @ k.mT / SIZE**0.5 + bias).softmax(-1) @ v
        x = x + a.transpose(0, 1).reshape(n, HIDDEN) @ w["layers.0.out"].T
        gate, up = (_norm(x) @ w["layers.0.gate_up"].T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ w["layers.0.down"].T
        logits = _norm(x) @ w["head"].T
        logits[:, MASK] = -torch.inf
        return logits, keys, values

    def predictions(self, logits, score):
        """(token, score) of each row, as two lists; a higher score is better."""
        if self.rounded:
            logits = (logits * 2).round() / 2
        best, p = logits.max(-1), logits.softmax(-1)
        token = (logits == best.values[:, None]).int().argmax(-1)
        if score == "confidence":
            value = p.max(-1).values
        elif score == "margin":
            two = p.topk(2).values
            value = two[:, 0] - two[:, 1]
        elif score == "entropy":
            value = torch.special.entr(p).sum(-1)
        else:
            value = torch.zeros_like(p[:, 0])
        if self.rounded:
            value = (value * 4).round() / 4
        return token.tolist(), (-value if score == "entropy" else value).tolist()


def _norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _turn(x, at):
    half = SIZE // 2
    angle = at.to(x.dtype)[:, None] * 100.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def random_pair(seed, *, block=None, shift=False, rounded=False, eos=EOS):
    """(model, plain model) with random fp64 weights; ``block``: block-causal of that size."""
    generator = torch.Generator().manual_seed(seed)
    scale = (0.3, 0.5, 0.8)[seed % 3]  # from predictions that agree to ones that do not
    shapes = {
        "embedding": (VOCAB, HIDDEN),
        "head": (VOCAB, HIDDEN),
        "layers.0.qkv": (3 * HIDDEN, HIDDEN),
        "layers.0.out": (HIDDEN, HIDDEN),
        "layers.0.gate_up": (2 * HIDDEN, HIDDEN),
        "layers.0.down": (HIDDEN, HIDDEN),
    }
    weights = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        for name, shape in shapes.items()
    }
    ones = dict.fromkeys(
        ("norm", "layers.0.attn_norm", "layers.0.mlp_norm"), torch.ones(HIDDEN).double()
    )
    spec = ModelSpec(
        vocab_size=VOCAB,
        mask_id=MASK,
        eos_ids=eos,
        shift_logits=shift,
        attention="full" if block is None else "block_causal",
        block_size=block,
        max_positions=256,
        delete_id=None if block is None else 3,
        split_id=None if block is None else 4,
    )
    flags = ("qkv_bias", "out_bias", "mlp_bias", "head_bias", "qk_norm", "tied")
    sizes = Sizes(
        HIDDEN,
        1,
        HEADS,
        HEADS,
        SIZE,
        HIDDEN,
        VOCAB,
        1e-6,
        Rope(100.0, SIZE),
        **dict.fromkeys(flags, False),
    )
    native = (Rounded if rounded else NativeModel)(spec, sizes, weights | ones)
    return native, Plain(weights, shift, block, rounded)


def random_prompt(seed, length):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, VOCAB, (length,), generator=generator).tolist()


@dataclass
class State:
    """A state of the static trajectory: what it predicts, and what static decoding makes of it."""

    block: int  # index of the block being filled
    tokens: dict  # position -> predicted token, of all masks that the forward saw
    ranked: list  # those positions, in the order in which they would be filled
    pick: tuple = ()  # (position, token) that is written


@dataclass
class Trajectory:
    x: list
    states: list = field(default_factory=list)
    ends: list = field(default_factory=list)  # of each block


def static(plain, prompt, new, *, block, score="confidence", cache="none", eos=EOS):
    """Static decoding with one token a step; a state is a forward."""
    x = torch.tensor(prompt + [MASK] * new)
    total, start = len(x), len(prompt)
    if plain.block is not None:
        x = F.pad(x, (0, -total % plain.block), value=MASK)
        start = start // plain.block * plain.block
    path = Trajectory([])
    for index, low in enumerate(range(start, len(x), block)):
        high = min(low + block, len(x))
        path.ends.append(high)
        frozen = keys = values = None
        while (masks := (x[low:high] == MASK).nonzero().flatten() + low).numel():
            if cache == "none" or keys is None:
                first = 0
                logits, keys, values = plain.logits(x)
            else:
                first = low - plain.shift
                stop = high if cache == "dual" else len(x)
                seen = [*range(first), *range(stop, len(x))]
                frozen = keys[:, seen], values[:, seen]
                logits, _, _ = plain.logits(x[first:stop], first, frozen)
            token, value = plain.predictions(logits, score)
            later = (x == MASK).nonzero().flatten().tolist()
            row = {p: p - first - plain.shift for p in later}
            later = [p for p in later if 0 <= row[p] < len(token)]
            later.sort(key=lambda p: ((p - start) // block, -value[row[p]], p))
            state = State(index, {p: token[row[p]] for p in later}, later)
            state.pick = (later[0], state.tokens[later[0]])
            assert later[0] in masks
            path.states.append(state)
            x[later[0]] = state.pick[1]
        ended = [p for p in range(max(low, len(prompt)), min(high, total)) if int(x[p]) in eos]
        if ended:
            x[ended[0] + 1 :] = eos[0]
            break
    path.x = x[:total].tolist()
    return path


def replay(path, drafts, *, block=None):
    """Forwards that FreeDave takes, from the trajectory alone.

    A forward confirms the state it starts from, and each next one while the guess that leads to it
    is what static decoding does; guesses are what the last confirmed state predicted. In strict
    mode they stay in their block, whose first forward has none. With ``block``, its size, they
    run on (pipelined) into as many blocks as they can fill behind the first incomplete one.
    """
    states, forwards, last, done, seen = path.states, 0, 0, 0, 0
    while done < len(states):
        opens = done == 0 or (block is None and states[done].block != states[last].block)
        guesses = [] if opens else states[last].ranked[1:drafts]
        limit = seen + -(-drafts // block) if block else states[last].block
        right = [
            _block(path, position) <= limit
            and done + j + 1 < len(states)
            and (block is not None or states[done + j + 1].block == states[last].block)
            and states[done + j].pick == (position, states[last].tokens[position])
            for j, position in enumerate(guesses)
        ]
        seen = states[last].block  # the first block that the next forward predicts
        last = done + (right.index(False) if False in right else len(right))
        done, forwards = last + 1, forwards + 1
    return forwards


def _block(path, position):
    return next((i for i, end in enumerate(path.ends) if position < end), len(path.ends))
