"""Autoregressive decoding against plain loops, and self-speculation against it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import pydllm
from tests.decoding.test_graph import LENGTHS, NEW, assert_same, models, prompts
from tests.decoding.trajectories import random_pair


def readable(causal="shifted", seed=8, block=None):
    """A random diffusion model that may be read causally."""
    model, _ = random_pair(seed, block=block)
    model.spec = dataclasses.replace(model.spec, causal=causal)
    return model


def plain(model, prompt, *, masked, new=NEW):
    """One token per forward of the whole sequence, without a cache, in full precision."""
    spec = model.spec
    tokens, forwards = list(prompt), 0
    while len(tokens) < len(prompt) + new:
        seen = [*tokens, spec.mask_id] if masked else tokens
        ids = torch.tensor([seen])
        length = torch.tensor([len(seen)], dtype=torch.int32)
        zero = torch.zeros_like(length)
        cache = model.new_cache(1, 0)
        options = {"length": length, "kv_len": length, "commit": zero}
        hidden = model.forward(ids, zero, cache, attention="causal", **options)
        logits = model.head(hidden)[0, -1]
        if spec.mask_id is not None:
            logits[spec.mask_id] = -torch.inf
        tokens.append(int(logits.argmax()))
        forwards += 1
        if tokens[-1] in spec.eos_ids:
            break
    fill = spec.eos_ids[0] if spec.eos_ids else 0
    tokens += [fill] * (len(prompt) + new - len(tokens))
    return tokens, forwards


@pytest.mark.parametrize("causal", ["shifted", "masked"])
@pytest.mark.parametrize("options", [{}, {"graph": True}, {"max_batch": 2}], ids=str)
def test_autoregressive_equals_a_plain_loop(causal, options):
    for seed in range(4):
        model = readable(causal, seed, block=4 if causal == "masked" else None)
        ids = prompts(LENGTHS, 20 * seed)
        expected = [plain(model, prompt, masked=causal == "masked") for prompt in ids]
        for _ in range(3 if "graph" in options else 1):
            got = pydllm.generate(
                model, ids, pydllm.Autoregressive(), max_new_tokens=NEW, **options
            )
            assert [s.tolist() for s in got.sequences] == [tokens for tokens, _ in expected]
            assert got.nfe.tolist() == [forwards for _, forwards in expected]


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_a_causal_model_answers_as_in_transformers(kind):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=7,
        bos_token_id=None,
        pad_token_id=7,
    )
    torch.manual_seed(0)
    module = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    model = pydllm.load(module)
    assert model.spec.mask_id is None
    ids = prompts((5, 3, 9, 1), 3)
    got = pydllm.generate(model, ids, pydllm.Autoregressive(), max_new_tokens=12)
    for row, prompt in enumerate(ids):
        theirs = module.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, use_cache=False
        )[0].tolist()
        theirs += [7] * (len(prompt) + 12 - len(theirs))
        assert got.sequences[row].tolist() == theirs


@pytest.mark.parametrize("graph", [False, True], ids=["runs", "replays"])
@pytest.mark.parametrize("drafts", [1, 3, 31])
@pytest.mark.parametrize("temperature", [0.0, 0.8, [0.0, 0.5, 1.0, 0.3, 2.0]], ids=str)
def test_self_speculation_gives_the_autoregressive_answer(drafts, temperature, graph):
    fewer = 0
    for seed in range(3 if graph else 12):
        model = readable(seed=seed)
        ids = prompts(LENGTHS, 30 * seed)
        options = {"max_new_tokens": NEW, "temperature": temperature, "seed": seed}
        expected = pydllm.generate(model, ids, pydllm.Autoregressive(), **options)
        algorithm = pydllm.SelfSpeculative(drafts=drafts)
        for _ in range(3 if graph else 1):
            got = pydllm.generate(model, ids, algorithm, **options, graph=graph)
            assert torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))
            # A draft and a verification per round; alone where one token is left. The prompt's.
            assert (got.nfe <= 1 + 2 * got.rounds).all() and (got.nfe >= 2 * got.rounds).all()
            assert (got.rounds < expected.nfe).logical_or(expected.nfe == 1).all()
        fewer += int((got.rounds < expected.nfe - 1).sum())
    assert fewer > 0  # some draft was right


def test_admitted_prompts_speculate_as_alone():
    model, ids = readable(), prompts(LENGTHS, 0)
    options = {"max_new_tokens": NEW, "temperature": 0.6, "seed": 1}
    algorithm = pydllm.SelfSpeculative(drafts=4)
    got = pydllm.generate(model, ids, algorithm, **options, max_batch=2)
    for row, prompt in enumerate(ids):
        lone = pydllm.generate(model, [prompt], algorithm, **options, request_ids=[row])
        assert torch.equal(got.sequences[row], lone.sequences[0])
        assert (got.nfe[row], got.rounds[row]) == (lone.nfe[0], lone.rounds[0])
        assert torch.equal(got.step_map[row], lone.step_map[0])


def test_a_draft_that_is_written_is_noticed(monkeypatch):
    """Negative control: emit one draft too many, and the answer is another."""
    from pydllm.decoding import speculative_rounds

    model, ids = readable(), prompts(LENGTHS, 0)
    expected = pydllm.generate(model, ids, pydllm.Autoregressive(), max_new_tokens=NEW)
    plainly = speculative_rounds.commit_tokens

    def eager(state, token, length):
        plainly(state, token, torch.where(length > 0, length + 1, 0).clamp(max=token.shape[1]))

    monkeypatch.setattr(speculative_rounds, "commit_tokens", eager)
    got = pydllm.generate(model, ids, pydllm.SelfSpeculative(drafts=4), max_new_tokens=NEW)
    assert not torch.equal(torch.cat(got.sequences), torch.cat(expected.sequences))


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (pydllm.Autoregressive(), "Autoregressive: expected a causal model, or one that can be"),
        (pydllm.SelfSpeculative(), "SelfSpeculative: expected a causal model, or one that can be"),
    ],
)
def test_models_that_were_not_trained_causally_are_refused(algorithm, message):
    model, _ = models()
    with pytest.raises(ValueError, match=message):
        pydllm.generate(model, [[10]], algorithm, max_new_tokens=4)


def test_diffusion_needs_a_mask():
    model, verifier = models()
    verifier.spec = dataclasses.replace(verifier.spec, mask_id=None)
    with pytest.raises(ValueError, match="model: expected a masked diffusion model, got one with"):
        pydllm.generate(verifier, [[10]], pydllm.Static(), max_new_tokens=4)
    got = pydllm.generate(verifier, [[10]], pydllm.Autoregressive(), max_new_tokens=4)
    assert_same(got, pydllm.generate(verifier, [[10]], pydllm.Autoregressive(), max_new_tokens=4))
