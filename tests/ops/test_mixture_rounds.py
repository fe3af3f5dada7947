"""Whole rounds of ``mixture_draft`` and ``mixture_accept``: their law, and what they read."""

import importlib
import itertools

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from bench.ops.cases import mixture_accept as accept_case
from bench.ops.cases import mixture_draft as draft_case
from pydllm import ops, reference
from tests.ops import test_mixture_accept as acceptance
from tests.ops.test_mixture_accept import accept, all_rows, assert_same, make

INF = float("inf")


def _law(start_logits, next_logits, vocab, size, mixture):
    """Probability of each sequence under emit "draft", a run's expected acceptance included."""

    def shared(p, q):
        return [1 / sum(max(p[u] / p[v], q[u] / q[v]) for u in range(vocab)) for v in range(vocab)]

    def go(start, prefix):
        at = len(prefix)
        if at == size:
            return {prefix: 1.0}
        p = start_logits[start][prefix[:start]][at].softmax(-1).tolist()
        law, parts = {}, []
        if at == start:
            parts = [(p[v], start, (*prefix, v)) for v in range(vocab)]
        else:
            mixed = start_logits[start][prefix[:start]][at] * mixture
            mixed = (mixed + next_logits[prefix] * (1 - mixture)).softmax(-1).tolist()
            both = shared(p, mixed)
            parts = [(both[v], start, (*prefix, v)) for v in range(vocab)]
            parts.append((1 - sum(both), at, prefix))
        for weight, begin, now in parts:
            for sequence, probability in go(begin, now).items():
                law[sequence] = law.get(sequence, 0.0) + weight * probability
        return law

    return go(0, ())


def test_rounds_follow_the_law_and_need_the_draw_of_their_own():
    """Sequences of three ids by whole rounds against enumeration; see ``round_counter``."""
    vocab, size, count, mixture = 3, 3, 40000, 0.4
    generator = torch.Generator().manual_seed(3)

    def table(*shape):
        return torch.randn(*shape, vocab, generator=generator, dtype=torch.float64) * 1.5

    prefixes = {n: list(itertools.product(range(vocab), repeat=n)) for n in range(size)}
    start_logits = {c: {p: table(size) for p in prefixes[c]} for c in range(size)}
    next_logits = {p: table() for n in range(size) for p in prefixes[n]}
    law = _law(start_logits, next_logits, vocab, size, mixture)
    assert sum(law.values()) == pytest.approx(1)
    expected = count * torch.tensor([law[s] for s in sorted(law)], dtype=torch.float64)
    width = vocab**size
    by_start = torch.zeros(size, width, size, vocab, dtype=torch.float64)
    by_prefix = torch.zeros(size, width, vocab, dtype=torch.float64)
    for n in range(size):
        for code, prefix in enumerate(prefixes[n]):
            by_start[n, code] = start_logits[n][prefix]
            by_prefix[n, code] = next_logits[prefix]

    def chi_square(separate):
        c = torch.zeros(count, dtype=torch.int32)
        code = torch.zeros(count, dtype=torch.int64)  # of what has been emitted
        request = torch.arange(count, dtype=torch.int32)
        steps = torch.arange(size)
        for _ in range(size):
            begin = c.clamp(max=size - 1).long()
            position = (c[:, None] + steps).clamp(max=size - 1)
            logits = by_start[begin[:, None], code[:, None], position].view(-1, vocab)
            emit = "draft" if separate else "draft_then_target"
            counter = ops.round_counter(c, request, size, emit=emit)
            options = {"temperature": 1.0, "seed": 17, "counter": counter}
            draft = ops.mixture_draft(logits, **options).token
            grid, codes = draft.view(count, size), [code]
            for j in range(size):
                codes.append(codes[-1] * vocab + grid[:, j])
            seen = torch.stack(codes, 1)
            verifier = by_prefix[position, seen[:, :size].clamp(max=width - 1)].view(-1, vocab)
            accepted = ops.mixture_accept(
                logits, verifier, draft, length=size - c, mixture=mixture, **options
            ).accepted
            code = seen.gather(1, accepted[:, None].long()).squeeze(1)
            c = c + accepted
        assert (c == size).all()
        found = code.bincount(minlength=width).double()
        return ((found - expected) ** 2 / expected).sum().item()

    assert chi_square(True) < 54.1  # 26 degrees of freedom: passed by chance once in a thousand
    assert chi_square(False) > 500


def _loaded(monkeypatch, call):
    """Bytes that the kernels load, lane by lane."""
    total = [0]
    load = InterpreterBuilder.create_masked_load

    def counted(self, pointers, mask, *rest):
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        total[0] += int(mask.data.sum()) * size
        return load(self, pointers, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counted)
        call()
    return total[0]


def test_each_kernel_reads_its_logits_once(monkeypatch):
    """2 bytes an element for the draft; 4 for the dense acceptance; none for the sparse one."""
    vocab = 5000
    inputs = draft_case.make(torch.float16, "cpu", rows=2, temperature=0.2, vocab=vocab)
    least = draft_case.bytes_moved(inputs)
    assert least == 2 * vocab * 2
    found = _loaded(monkeypatch, lambda: draft_case.call(inputs, "triton"))
    # What is in the scratch is read ten times, as fp32: at most 64 ids a row.
    assert least <= found <= least + 2 * 64 * 4 * 12
    inputs = accept_case.make(torch.float16, "cpu", form="dense", batch=1, rows=2, vocab=vocab)
    head = inputs["weight"].numel() * 2
    least = accept_case.bytes_moved(inputs) - head
    assert least == 2 * vocab * 4
    inputs["threshold"] = torch.full((2,), -INF)
    found = _loaded(monkeypatch, lambda: accept_case.call(inputs, "triton"))
    assert least <= found <= least + 1000
    # Of pieces outside the nucleus only the draft model's logits are read; at mixture 1 of all.
    for change in ({"threshold": torch.full((2,), 1e4)}, {"mixture": 1.0}):
        found = _loaded(monkeypatch, lambda c=change: accept_case.call(inputs | c, "triton"))
        assert least / 2 <= found <= least / 2 + 1000
    inputs = accept_case.make(torch.float16, "cpu", form="sparse", batch=1, rows=2, vocab=vocab)
    least = accept_case.bytes_moved(inputs)
    assert least == inputs["list size"].sum() * (896 * 2 + 12)
    found = _loaded(monkeypatch, lambda: accept_case.call(inputs, "triton"))
    rows_of_hidden = 2 * 896 * 2
    assert least <= found <= least + rows_of_hidden + 1000


def test_a_nucleus_of_the_drafts_alone_rejects_at_mixture_one():
    """Negative control of "mixture 1 accepts everything"."""
    logits, verifier, draft, shared = make(4, 8, 70, top_p=0.5, temperature=1.0)
    call = {"length": all_rows(4, 8), "mixture": 1.0}
    assert accept(logits, verifier, draft, shared, **call).accepted.tolist() == [8] * 4
    call["threshold"] = None
    assert (accept(logits, verifier, draft, shared, **call).accepted < 8).any()


def test_a_mixture_of_two_products_is_noticed(monkeypatch, cuda_on_cpu):
    """Negative control of "equal logits accept everything": R x + (1 - R) x is not always x."""

    def two_products(x, y, weight):
        return weight * x + (1 - weight) * y

    # The package's attribute of that name is the function.
    definition = importlib.import_module("pydllm.reference.mixture_accept")
    assert reference.mixture_accept is definition.mixture_accept
    monkeypatch.setattr(definition, "_mix", two_products)
    with pytest.raises(AssertionError):
        acceptance.test_equal_models_and_mixture_one_accept_everything(
            None, 0.0, "draft", cuda_on_cpu
        )


def test_shifts_of_a_row_change_nothing_in_fp32_where_the_margin_decides():
    rows, vocab, mixture, temperature = 32, 400, 0.4, 0.7
    logits, verifier, draft, shared = make(
        4, rows // 4, vocab, temperature=temperature, dtype=torch.float32
    )
    exact = logits.double(), verifier.double()
    mixed = exact[1] + mixture * (exact[0] - exact[1])
    noise = reference.philox.vocab_gumbel(vocab, shared["counter"], shared["seed"]).double()
    margins = [
        top[:, 0] - top[:, 1]
        for top in ((t / temperature + noise).topk(2).values for t in (exact[0], mixed))
    ]
    decided = torch.minimum(*margins) > 1e-4
    assert decided.float().mean() > 0.9
    call = {"length": all_rows(4, rows // 4), "mixture": mixture}
    expected = accept(logits, verifier, draft, shared, **call)
    for one, other in ((0.0, 11.5), (-3.0, 7.25), (5.125, 0.0)):
        moved = logits + one, verifier + other
        redrafted = ops.mixture_draft(moved[0], **shared)
        assert torch.equal(redrafted.token[decided], draft.token[decided])
        found = accept(*moved, redrafted, shared, **call)
        assert torch.equal(found.target[decided], expected.target[decided])
        if decided.all():
            assert_same(found[:2], expected[:2])
