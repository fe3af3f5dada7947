"""LLaDA2.2's editing of one block, restated on lists: what ``edit_block`` is compared with."""

from __future__ import annotations

import math


class Block:
    """A block's tokens and counters; ``step`` is one update, ``steps`` the step map."""

    def __init__(self, tokens, prompt, *, ids, threshold, edit_threshold, max_post_steps):
        self.x, self.prompt, self.size = list(tokens), prompt, len(tokens)
        self.mask, self.delete, self.split = ids
        self.threshold, self.budget = threshold, max_post_steps
        self.edit_threshold = math.inf if edit_threshold is None else edit_threshold
        self.original = [j >= prompt and t == self.mask for j, t in enumerate(tokens)]
        self.post = self.updates = self.changed = 0
        self.history, self.tried = [], [set() for _ in tokens]
        self.steps, self.complete = [-1] * self.size, False
        self.repeats = self.rebuilds = 0  # how often these happened

    def step(self, logits):
        """One update with the logits of a forward over the block, a list of rows."""
        step, self.changed = self.updates, 0
        self.updates += 1
        masks = [j for j in range(self.prompt, self.size) if self.x[j] == self.mask]
        old = [j for j in masks if self.original[j]]
        if not old:
            self.post += 1
        if self.budget:
            last = self.post >= self.budget or self.updates > self.size + self.budget
        else:
            last = not old or self.updates > self.size
        choice, score = {}, {}
        for j in range(self.prompt, self.size):
            choice[j] = best_of(logits[j])
            if choice[j] == self.mask and j in old and not last:
                choice[j] = best_of(logits[j], {self.mask})
            score[j] = share_of(logits[j], choice[j])
        wanted = 1 + len(masks) - len(old)
        fill = [j for j in masks if score[j] > self.threshold]
        if len(fill) < wanted:
            fill = sorted(masks, key=lambda j: (-score[j], j))[:wanted]
        if not self.budget and old and all(j in fill for j in old):
            last = True
        if last or not old:
            fill = masks
        edit = []
        for j in range(self.prompt, self.size):
            if j not in masks and score[j] > self.edit_threshold and choice[j] != self.x[j]:
                edit.append(j)
        write = sorted([*fill, *edit])
        if not write:
            self.complete = True
            return
        special = {self.mask, self.delete, self.split}
        moving = [j for j in write if choice[j] != self.x[j]]
        if last:
            for j in write:
                if choice[j] in special:
                    choice[j] = best_of(logits[j], special)
        elif self.x in self.history and moving:
            weakest = min(moving, key=lambda j: (score[j], j))
            never = self.tried[weakest] | ({self.mask} if weakest in old else set())
            choice[weakest] = best_of(logits[weakest], never)
            self.repeats += 1
        self.history.append(self.x)
        for j in write:
            self.tried[j].add(choice[j])
        new = self.rebuilt({j: choice[j] for j in write})
        self.rebuilds += any(choice[j] in (self.delete, self.split) for j in write)
        for j, (token, _) in enumerate(new):
            if token != self.x[j]:
                self.steps[j] = -1 if token == self.mask else step
                self.changed += 1
        self.x, self.original = map(list, zip(*new, strict=True))
        self.complete = last

    def rebuilt(self, choice):
        """(token, whether it is or was an original mask) of each position after the writes."""
        out = []
        for j, pair in enumerate(zip(self.x, self.original, strict=True)):
            token = choice.get(j)
            if token == self.split:
                out += [(self.mask, False), pair]
            elif token is None:
                out.append(pair)
            elif token != self.delete:
                out.append((token, pair[1]))
        return (out + [(self.mask, False)] * self.size)[: self.size]


def best_of(row, without=()):
    """The largest logit's id, the lowest of equals; NaN is none; 0 where there is none."""
    there = [(-v if v == v else math.inf, i) for i, v in enumerate(row) if i not in without]
    return min(there, default=(0, 0))[1]


def share_of(row, token):
    """The probability of an id; -inf where the row has no distribution."""
    peak = max((v for v in row if v == v), default=-math.inf)
    if any(v != v for v in row) or math.isinf(peak):
        return -math.inf
    return math.exp(row[token] - peak) / sum(math.exp(v - peak) for v in row)
