"""FreeDave's loops as published, stated plainly: lists of tokens, one draft after the other."""

from types import SimpleNamespace

import torch

INF = float("inf")


def predict(rows, temperature, top_k, top_p):
    """Token and probability of rows ``(N, V)``."""
    if temperature == 0:
        p = rows.softmax(-1)
        token = p.argmax(-1)
        return token, p.gather(-1, token[:, None])[:, 0]
    rows = rows / temperature
    if top_k:
        rows = rows.masked_fill(rows < rows.topk(top_k).values[:, -1:], -INF)
    if top_p is not None and top_p < 1:
        kept = []
        for row in rows:
            p, mass = row.softmax(-1), 0.0
            for token in p.argsort(descending=True).tolist():
                if mass > top_p:
                    row = row.clone()
                    row[token] = -INF
                mass += p[token].item()
            kept.append(row)
        rows = torch.stack(kept)
    p = rows.softmax(-1)
    token = torch.multinomial(p, 1)
    return token[:, 0], p.gather(-1, token)[:, 0]


class Decoding:
    """What the loops share. A state is a list of tokens, a guess a dict of (score, token)."""

    def __init__(self, *, mask_token_id, eos_token_id, pad_token_id, block_length, **options):
        self.mask, self.eos, self.pad = mask_token_id, eos_token_id, pad_token_id
        self.size = block_length
        self.sampling = tuple(options.get(key) for key in ("temperature", "top_k", "top_p"))
        self.limit = options.get("confidence_threshold")
        self.in_order = options.get("alg_temp") == -1
        self.early_exit = options.get("early_exit", False)
        self.drafts = options.get("draft_steps")
        self.eager = options.get("eager_acceptance_mode", False)
        self.proposed = self.hit = self.forwards = self.step = 0

    def guess(self, states, logits):
        """The guesses of states, drawn together; ``logits``: a matrix for each."""
        places = [(n, i) for n, state in enumerate(states) for i in self.masks(state)]
        guesses = [{} for _ in states]
        if places:
            rows = torch.stack([logits[n][i] for n, i in places])
            token, score = predict(rows, *self.sampling)
            for (n, i), t, s in zip(places, token.tolist(), score.tolist(), strict=True):
                guesses[n][i] = (s, t)
        return guesses

    def masks(self, state):
        return [i for i, token in enumerate(state) if token == self.mask]

    def ranked(self, state, guess):
        """Masks, the next ones to be written first: by block where drafts reach over several."""
        masks = self.masks(state)
        if self.in_order:
            return masks
        block = self.size if self.eager else len(state)
        # Equal scores, the rule with top_k=1, as torch.topk has them.
        score = torch.full((len(state),), -INF, dtype=torch.float64)
        for i in masks:
            score[i] = guess[i][0] + (len(state) - 1 - i) // block
        return lambda count: score.topk(min(count, len(masks))).indices.tolist()

    def best(self, state, guess, count):
        ranked = self.ranked(state, guess)
        return ranked[:count] if isinstance(ranked, list) else ranked(count)

    def fill(self, state, guess, places):
        return [guess[i][1] if i in places else token for i, token in enumerate(state)]

    def next(self, state, guess):
        """One step of the static loop."""
        return self.fill(state, guess, self.sure(state, guess) or self.best(state, guess, 1))

    def sure(self, state, guess):
        """Masks that reach the threshold; of several blocks, those of the first with a mask."""
        if self.limit is None:
            return []
        masks = self.masks(state)
        if self.eager and masks:
            # Scores of later blocks lie lower by a whole number.
            lift = [(len(state) - 1 - i) // self.size for i in masks]
            sure = [
                i
                for i, k in zip(masks, lift, strict=True)
                if guess[i][0] + k >= self.limit + max(lift)
            ]
        else:
            sure = [i for i in masks if guess[i][0] >= self.limit]
        if self.in_order:
            run = 0
            while run < len(masks) and masks[run] in sure:
                run += 1
            return masks[:run]
        return sure

    def draft(self, state, guess, count, by_threshold=True):
        states = []
        if by_threshold and self.limit is not None:
            state = self.next(state, guess)
            states, count = [state], count - 1
        return states + [
            self.fill(state, guess, self.best(state, guess, k + 1)) for k in range(count)
        ]

    def agrees(self, target, draft, subset):
        if all(token == self.mask for token in draft):
            return True
        return all(
            d == t or (subset and d == self.mask) for d, t in zip(draft, target, strict=True)
        )

    def note(self, steps, first, before, after):
        """Write down which masks became tokens."""
        new = [first + i for i in self.masks(before) if after[i] != self.mask]
        for i in new:
            steps[i] = self.step
        self.step += bool(new)
        return len(new)

    def verify(self, window, guess, forward, steps, first, *, last, full, opens):
        """The rounds of a block; ``forward``: logits of states."""
        size = self.size
        while True:
            count = min(self.drafts, len(self.masks(window)))
            if opens:
                drafts = [
                    window,
                    *(self.draft(window, guess, count - 1, False) if count > 1 else []),
                ]
            else:
                drafts = self.draft(window, guess, count)
            opens = False
            self.proposed += sum(drafts[-1][i] != self.mask for i in self.masks(window))
            if len(self.masks(window[:size])) <= 1 and (last or not self.eager):
                self.hit += self.note(steps, first, window, drafts[0])
                return drafts[0]
            guesses = self.guess(drafts, forward(drafts))
            targets = [self.next(d, g) for d, g in zip(drafts, guesses, strict=True)]
            at = 0
            while True:
                good = [
                    j for j in range(at + 1, count) if self.agrees(targets[at], drafts[j], full)
                ]
                if not good:
                    break
                at = good[-1]
            before = window
            if self.eager and not self.masks(drafts[at][:size]):
                window = targets[at]
                self.proposed += sum(a != b for a, b in zip(window, drafts[at], strict=True))
            else:
                window, guess = drafts[at], guesses[at]
            self.hit += self.note(steps, first, before, window)
            if not self.masks(window if full else window[:size]):
                return window


def full(model, prompt, pads, *, max_gen_length, dual_cache, decoding_steps=None, **options):
    """The loops for full attention; ``model``: ``Plainly``."""
    d = Decoding(**options)
    batch, length = prompt.shape
    total, size, shifted = length + max_gen_length, d.size, model.shift
    x = torch.cat((prompt, torch.full((batch, max_gen_length), d.mask)), 1)
    steps = [[-1] * total for _ in range(batch)]
    for start in range(length, total, size):
        later = -(-d.drafts // size) if d.eager else 0
        stop = min(start + (1 + later) * size, total)
        kept = model(x, pads, keep=True)
        if shifted:
            token, _ = predict(kept.flatten(0, 1), *d.sampling)
            x[:, start] = token.view(batch, total)[:, start]
            for row in steps:
                row[start] = d.step
        if d.drafts and d.mask not in x[0, start : start + size]:
            continue
        windows = x[:, start:stop].tolist()

        def forward(states, start=start, stop=stop):
            """The states one after the other, with the keys of the block's first forward."""
            keys, found = model.keys, []
            for state in states:
                y = x.clone()
                y[0, start:stop] = torch.tensor(state)
                end = stop if dual_cache else total
                found.append(model(y, pads, start, end, "dual" if dual_cache else "prefix")[0])
                model.calls -= 1
            model.calls, model.keys = model.calls + 1, keys
            return found

        if d.drafts:
            (guess,) = d.guess(windows, [kept[0, start:stop]])
            last = start + size == total
            window = d.verify(
                windows[0], guess, forward, steps[0], start, last=last, full=True, opens=shifted
            )
            x[0, start:stop] = torch.tensor(window)
        else:
            forwards = decoding_steps // (max_gen_length // size)
            for count in range(forwards):
                first, number = count == 0, d.step
                if first and not shifted:
                    logits = kept[:, start:stop]
                elif not first:
                    end = stop if dual_cache else total
                    logits = model(x, pads, start, end, "dual" if dual_cache else "prefix")
                if not (first and shifted):
                    guesses, new = d.guess(windows, logits), 0
                    for b, guess in enumerate(guesses):
                        d.step = number
                        before = windows[b]
                        windows[b] = d.next(before, guess) if guess else before
                        new += d.note(steps[b], start, before, windows[b])
                    d.step = number + (new > 0)
                    x[:, start:stop] = torch.tensor(windows)
                if first:
                    d.step = number + 1
                elif d.mask not in x[:, start:stop]:
                    break
        ends = [t for t in (d.eos, d.pad) if (x[:, start : start + size] == t).all()]
        if d.early_exit and ends:
            x[:, start + size :] = ends[0]
            break
    return SimpleNamespace(
        sequences=x,
        trajectory_step_map=torch.tensor(steps)[:, length:],
        num_proposed_tokens=None,
        num_hit_tokens=None,
        nfe=model.calls,
    )


def block_causal(plain, prompt, *, max_gen_length, decoding_steps=None, **options):
    """The loops for block-causal attention, everything computed in every step."""
    d = Decoding(**options)
    length, size = prompt.shape[1], d.size
    total = -(-(length + max_gen_length) // size) * size
    x = prompt[0].tolist() + [d.mask] * (total - length)
    steps, forwards = [-1] * total, int(length >= size)
    calls = []

    def forward_from(start):
        def forward(states):
            calls.append(1)
            return [plain(torch.tensor(x[:start] + s), block=size)[1][start:] for s in states]

        return forward

    for start in range(length // size * size, total, size):
        later = -(-d.drafts // size) if d.eager else 0
        stop = min(start + (1 + later) * size, total)
        forwards += 1  # for the block's keys
        if d.drafts and not d.masks(x[start : start + size]):
            continue
        window, forward = x[start:stop], forward_from(start)
        if d.drafts:
            (guess,) = d.guess([window], forward([window]))
            last = start + size == total
            window = d.verify(
                window, guess, forward, steps, start, last=last, full=False, opens=False
            )
        else:
            for _ in range(size):
                (guess,) = d.guess([window], forward([window]))
                before, window = window, d.next(window, guess)
                new = d.note(steps, start, before, window)
                d.proposed, d.hit = d.proposed + new, d.hit + new
                if not d.masks(window):
                    break
        forwards -= bool(d.masks(window[:size]))
        x[start:stop] = window
        if d.early_exit and set(x[start : start + size]) == {d.eos}:
            x[start + size :] = [d.eos] * (total - start - size)
            break
    return SimpleNamespace(
        sequences=torch.tensor([x]),
        trajectory_step_map=torch.tensor([steps[length:]]),
        num_proposed_tokens=d.proposed,
        num_hit_tokens=d.hit,
        nfe=forwards + len(calls),
    )
