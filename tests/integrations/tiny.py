"""Tiny random models in fp64: a plain one for the oracles, and what a caller would hold."""

import torch
from torch import nn

from pydllm.models import load
from tests.models.plain import CONFIGS, random_plain

MASK, EOS, EOT = 60, 59, 57


def standin(plain):
    """A loaded module: the parameters of ``plain`` under their names, a class name, a config."""
    name = plain.config["architectures"][0]
    module = type(name, (nn.Module,), {})()
    for path, value in plain.weights.items():
        parent, (*parts, last) = module, path.split(".")
        for part in parts:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.register_parameter(last, nn.Parameter(value.clone()))
    module.config = dict(plain.config)
    return module


def pair(name, seed=0, predicts_masks=True, **changes):
    """The plain model, and one of ours; with random weights it may predict the mask."""
    plain = random_plain(CONFIGS[name] | {"n_layers": 2} | changes, seed)
    if not predicts_masks:
        plain.weights[plain.ends[2] + ".weight"][MASK] = 0
    return plain, load(standin(plain))


class Plainly:
    """Logits ``(B, T, V)`` of a left-padded batch, row by row, with frozen keys and values.

    ``keys`` are what the last call with ``keep`` saw: (keys, values) of each row and layer.
    """

    def __init__(self, plain, block=None):
        self.plain, self.block, self.calls, self.keys = plain, block, 0, None
        self.shift = "Dream" in plain.config["architectures"][0]

    def __call__(self, x, pad=None, start=0, stop=None, cache=None, keep=False):
        """Positions [start, stop); ``cache``: the part of ``keys`` to see: "prefix" or "dual"."""
        self.calls += 1
        stop = x.shape[1] if stop is None else stop
        pad = [0] * len(x) if pad is None else pad
        rows, kept = [], []
        for b, hidden in enumerate(pad):
            frozen = None
            if cache is not None:
                span = (start - hidden, stop - hidden)  # a row's keys begin after its padding
                frozen = [tuple(self._seen(t, *span, cache) for t in kv) for kv in self.keys[b]]
            first = max(start, hidden)
            _, logits, keys = self.plain(x[b, first:stop], first - hidden, frozen, self.block)
            rows.append(torch.cat((logits.new_zeros(first - start, logits.shape[1]), logits)))
            kept.append(keys)
        if keep:
            self.keys = kept
        logits = torch.stack(rows)
        if self.shift:
            logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)
        return logits

    @staticmethod
    def _seen(t, start, stop, cache):
        return torch.cat((t[:start], t[stop:])) if cache == "dual" else t[:start]


def prompts(batch, length, seed=0, pads=None):
    """Token ids ``(B, P)`` and an attention mask with so many zeros a row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads or []):
        ids[row, :pad], mask[row, :pad] = 58, 0
    return ids, mask
