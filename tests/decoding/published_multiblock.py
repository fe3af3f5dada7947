"""d3LLM's published decoders, both families, restated plainly for one sequence.

``forward(ids, start, cache)`` gives the logits of a window and the keys and values of the cache
and the window, the window's last; the cache may hold more keys than ``start`` positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LIMIT = 10_000


@dataclass
class Unit:
    start: int
    end: int
    count: int
    full: bool
    done: int | None = None
    cached: bool = False

    @property
    def progress(self):
        total = self.end - self.start
        return 1 - self.count / total if total else 1.0


def lowest(values):
    """The first place of the least value; ``argmin`` may take another."""
    return (values == values.min()).nonzero()[0].item()


def plain_forward(model):
    """A forward of ``PlainLLaDA`` over a cache of any number of keys."""

    def forward(ids, start, cache):
        wide = None
        if cache is not None:
            # That code puts the window at its slots: the keys behind them are the rest.
            gap = [t.new_zeros(t.shape[0], len(ids), t.shape[2]) for t, _ in cache]
            wide = [
                tuple(torch.cat((t[:, :start], hole, t[:, start:]), 1) for t in pair)
                for pair, hole in zip(cache, gap, strict=True)
            ]
        logits, kept = model.forward(ids, start, wide)
        stop = start + len(ids)
        ordered = [
            tuple(torch.cat((t[:, :start], t[:, stop:], t[:, start:stop]), 1) for t in pair)
            for pair in kept
        ]
        return logits, ordered

    return forward


def multiblock(
    forward,
    prompt,
    *,
    mask_id,
    eos,
    shifted,
    new,
    size,
    threshold,
    add_at,
    full_at,
    early_stop,
    cache=None,
):
    """Tokens, counted forwards, least |entropy - threshold|, the modes, and whether keys were ever
    held twice. ``cache`` is (delay, refresh interval) or None for the decoder without one."""
    first = len(prompt)
    x = torch.tensor(list(prompt) + [mask_id] * new)
    blocks = -(-new // size) if shifted and cache is not None else new // size
    units = [Unit(0, first, 0, True, done=0)]
    nfe, has_eos, keys, prefix, margin, modes, twice = 0, False, None, 0, float("inf"), [], False

    def create(**known):
        start = units[-1].end
        end = min(start + size, len(x))
        full = units[-1].progress >= full_at
        units.append(
            Unit(start, end, end - start, full) if not known else Unit(start, end, **known)
        )

    create()
    while True:
        snapshot = x == mask_id
        made = len(units) - 1
        if not snapshot[first:].any() and made >= blocks:
            break
        nfe += 1
        if early_stop and (x[first:] == eos).any():
            has_eos = True
            q = first + (x[first:] == eos).nonzero()[0].item()
            x[q + 1 :] = eos
            for unit in units[1:]:
                if shifted or unit.end > q:
                    unit.count = int((x[unit.start : unit.end] == mask_id).sum())
                    unit.full |= unit.count == 0
                if shifted and unit.start > q:
                    unit.cached = True
            while len(units) - 1 < blocks:
                create(count=0, full=True, done=nfe, cached=True)
            if not (x == mask_id).any():
                break
        for before, unit in zip(units, units[1:], strict=False):
            unit.full |= before.progress >= full_at
        ready = units[-1].progress >= add_at or units[-1].count == 0
        if ready and not has_eos and len(units) - 1 < blocks:
            create()

        start = 0
        if cache is None:
            logits, _ = forward(x, 0, None)
        else:
            delay, interval = cache
            commit = None
            for unit in units:
                if unit.end <= prefix:
                    continue
                if unit.count > 0:
                    break
                if unit.done is None:
                    unit.done = nfe
                if nfe - unit.done >= delay and not unit.cached:
                    commit, unit.cached = unit, True
                elif nfe - unit.done < delay and not shifted:
                    break
            stable = [u for u in units if u.count == 0 and u.done is not None and not u.cached]
            due = stable or (interval is not None and nfe % interval == 0)
            reach = max(unit.end for unit in units if unit.full or unit.count > 0)
            active = [unit.start for unit in units if unit.count > 0]
            if min([prefix, *active, *(unit.start for unit in stable)]) >= reach:
                break
            physical = keys[0][0].shape[1] if keys else 0
            if commit is not None:
                modes.append("commit")
                start, grown = prefix, commit.end - prefix
                logits, every = forward(x[start:], start, keys)
                end = physical + grown
                keys = [tuple(t[:, :end] for t in pair) for pair in every]
                prefix += grown
            elif keys and not due:
                modes.append("cached")
                start = prefix
                logits, _ = forward(x[start:], start, keys)
            else:
                modes.append("refresh" if keys else "full")
                logits, every = forward(x, 0, None)
                if keys:
                    keep = stable[-1].start if stable and shifted else prefix
                    keys = [tuple(t[:, :keep] for t in pair) for pair in every]
            twice |= bool(keys) and keys[0][0].shape[1] != prefix
        if shifted:
            logits = torch.cat((logits[:1], logits[:-1]))
        probability = logits.double().softmax(-1)
        entropy = torch.full((len(x),), torch.inf, dtype=torch.float64)
        entropy[start:] = -(probability * (probability + 1e-12).log()).sum(-1)
        token = torch.zeros_like(x)
        token[start:] = logits.argmax(-1)

        end = max(unit.end for unit in units if unit.full or unit.count > 0)
        eligible = snapshot & (torch.arange(len(x)) < end)
        if eligible.any():
            margin = min(margin, (entropy[eligible] - threshold).abs().min().item())
        accept = eligible & (entropy < threshold if shifted else entropy <= threshold)
        if not shifted and eligible.any():
            accept[lowest(torch.where(eligible, entropy, torch.inf))] = True
        focus = next((unit for unit in units[1:] if unit.full and unit.count > 0), None)
        if focus is not None and not accept[focus.start : focus.end].any():
            inside = torch.where(eligible, entropy, torch.inf)[focus.start : focus.end]
            if inside.isfinite().any():
                accept[focus.start + lowest(inside)] = True
        x[accept] = token[accept]
        for unit in units[1:]:
            unit.count -= int(accept[unit.start : unit.end].sum())
            if cache is not None:
                unit.count = max(unit.count, 0)
        if nfe > LIMIT:
            break
    return x, nfe, margin, modes, twice
