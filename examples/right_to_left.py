"""An algorithm of one's own: a fixed number of tokens per forward, from right to left.

    python examples/right_to_left.py

Ragged batches, admission, CUDA graphs and the step map come with the driver.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import pydllm
from pydllm.decoding.driver import Algorithm, Decoder, Plan
from pydllm.decoding.state import Selection, State, Window
from pydllm.decoding.step import busy, forward, statistics, write
from pydllm.demo import WEIGHTS
from pydllm.demo.task import held_out_problems


@dataclass(frozen=True, kw_only=True)
class RightToLeft(Algorithm, Decoder):
    """``tokens_per_step`` masks per forward, the last ones first; for full attention."""

    tokens_per_step: int = 1

    def check(self, model, max_new_tokens):
        if model.spec.attention != "full":
            raise ValueError(f"model: expected full attention, got {model.spec.attention!r}")

    def decoder(self, call):
        return self

    def begin(self, call, prompts):
        cache = call.runner.cache("cache", call.model, len(prompts), 0)
        return State.begin(call, prompts, cache), None

    def plan(self, state, counts):
        return Plan((state.call.whole_width(state.live_prompts),))

    def step(self, state, plan):
        call, width = state.call, plan.key[0]
        zero = torch.zeros_like(state.end)
        window = Window.make(zero, state.end, state.end, width=width)
        region = Selection(state.prompt_length, state.end - state.prompt_length, width)
        hidden, ids = forward(state, window), call.suppress_ids
        stats = statistics(state, hidden, zero, region, suppress_ids=ids)
        ending = pydllm.ops.Ending(state.done, state.end, call.eos)
        write(state, stats, region, self.accept, ending=ending)
        return busy(state, zero), None

    def accept(self, stats):
        place = torch.arange(stats.prob.shape[1], device=stats.prob.device)
        quota = torch.full_like(stats.token[:, 0], self.tokens_per_step, dtype=torch.int32)
        return place.expand_as(stats.prob).float(), {"rule": "quota", "quota": quota}


if __name__ == "__main__":
    prompts = [problem.prompt for problem in held_out_problems(2)]
    got = pydllm.generate(pydllm.load(WEIGHTS), prompts, RightToLeft(), max_new_tokens=48)
    print(*got.text, got.nfe.tolist(), sep="\n")
