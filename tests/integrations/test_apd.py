"""APD's ``diffusion_generate`` for Dream against the published loop, stated plainly."""

from types import SimpleNamespace

import pytest
import torch

from pydllm import PydllmError
from pydllm.integrations import apd
from pydllm.models import load
from tests.integrations.published_apd import apd as published
from tests.integrations.tiny import EOS, MASK, pair, prompts, standin
from tests.models.plain import RECENT, random_plain


@pytest.fixture(scope="module")
def models():
    return pair("dream", 3, predicts_masks=False, num_hidden_layers=2)


@pytest.fixture(scope="module")
def verifier():
    config = RECENT["qwen2-sliding"] | {"use_sliding_window": False, "num_hidden_layers": 2}
    plain = random_plain(config, 5)
    return plain, load(standin(plain))


FIXED = {"mask_token_id": MASK, "eos_token_id": EOS, "return_dict_in_generate": True}
CASES = {
    "one a step": {"tokens_per_step": 1},
    "three a step, the last fewer": {"tokens_per_step": 3, "kv_window": 4},
    "the published sweep's window": {"tokens_per_step": 1, "kv_window": 0},
    "window of one": {"tokens_per_step": 2, "kv_window": 1, "max_lookahead": 5},
    "window of two": {"tokens_per_step": 1, "kv_window": 2, "max_lookahead": 3},
    "drawn": {"tokens_per_step": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 20},
    "verified": {"apd_mixture_weight": 0.8},
    "verified, window": {"apd_mixture_weight": 0.9, "kv_window": 2, "max_lookahead": 6},
    "verified, one mask shown": {"apd_mixture_weight": 0.5, "kv_window": 1, "max_lookahead": 1},
    "verifier alone": {"apd_mixture_weight": 0.0, "max_lookahead": 4},
    "no verifier's weight": {"apd_mixture_weight": 1.0},
    "verified, drawn": {"apd_mixture_weight": 0.9, "temperature": 0.4, "kv_window": 3},
    "verified, cold": {"apd_mixture_weight": 0.95, "temperature": 0.2, "top_p": 0.8},
}


def expected(models, verifier, ids, **options):
    return published(models[0], verifier[0], ids, mask_id=MASK, eos_id=EOS, **options)


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_tokens_and_counts(models, verifier, options, length):
    ids, _ = prompts(1, length, seed=length)
    torch.manual_seed(4)
    wanted = expected(models, verifier, ids, new=11, **options)
    torch.manual_seed(4)
    given = FIXED | options | {"max_new_tokens": 11, "verifier_model": verifier[1]}
    # The name decides nothing, the weight does.
    out = apd.diffusion_generate(models[1], ids, alg="leftright", **given)
    assert torch.equal(out.sequences, wanted.sequences)
    profile = out.profile
    assert profile.acceptance_counts == wanted.acceptance_counts
    assert profile.num_forward_evals == len(wanted.acceptance_counts)
    assert profile.num_tokens_generated == sum(wanted.acceptance_counts)
    assert 0 <= profile.verification_time <= profile.total_time and out.history is None


def test_a_weight_of_one_accepts_all(models, verifier):
    ids, _ = prompts(1, 4)
    given = {"apd_mixture_weight": 1.0, "max_new_tokens": 9, "verifier_model": verifier[1]}
    out = apd.diffusion_generate(models[1], ids, alg="apd", **FIXED | given)
    assert out.profile.acceptance_counts == [9]


def test_modules_configs_and_plain_tensors(models, verifier):
    ids, _ = prompts(1, 5)
    config = SimpleNamespace(alg="apd", apd_mixture_weight=0.9, max_lookahead=4, max_new_tokens=8)
    given = {"mask_token_id": MASK, "eos_token_id": EOS, "verifier_model": standin(verifier[0])}
    x = apd.diffusion_generate(standin(models[0]), ids, config, **given)
    more = {"apd_mixture_weight": 0.9, "max_lookahead": 4}
    assert torch.equal(x, expected(models, verifier, ids, new=8, **more).sequences)
    # The call goes before the config.
    x = apd.diffusion_generate(models[1], ids, vars(config), **given, apd_mixture_weight=0.0)
    more = {"apd_mixture_weight": 0.0, "max_lookahead": 4}
    assert torch.equal(x, expected(models, verifier, ids, new=8, **more).sequences)


def test_padding_is_text_and_an_eos_in_the_prompt_ends_it(models, verifier):
    ids, mask = prompts(1, 6, 0, [2])
    given = FIXED | {"max_new_tokens": 8, "tokens_per_step": 2, "alg": "leftright"}
    out = apd.diffusion_generate(models[1], ids, attention_mask=mask, **given)
    wanted = expected(models, verifier, ids, new=8, tokens_per_step=2)
    assert torch.equal(out.sequences, wanted.sequences)
    ids[0, 1] = EOS
    out = apd.diffusion_generate(models[1], ids, **given)
    assert out.profile.acceptance_counts == [2] and (out.sequences[0, 8:] == MASK).all()


def test_masks_at_the_prompts_end_are_filled(models, verifier):
    ids, _ = prompts(1, 6)
    ids[0, -2:] = MASK
    for options in ({"tokens_per_step": 3}, {"apd_mixture_weight": 0.9}):
        given = FIXED | options | {"max_new_tokens": 5, "verifier_model": verifier[1]}
        out = apd.diffusion_generate(models[1], ids, alg="apd", **given)
        wanted = expected(models, verifier, ids, new=5, **options)
        assert torch.equal(out.sequences, wanted.sequences) and MASK not in out.sequences


def test_hooks_see_every_round(models):
    ids, _ = prompts(1, 4)
    tokens, logits = [], []
    apd.diffusion_generate(
        models[1],
        ids,
        alg="leftright",
        tokens_per_step=2,
        max_new_tokens=6,
        generation_tokens_hook_func=lambda step, x, counts: tokens.append((step, counts)),
        generation_logits_hook_func=lambda step, x, none: logits.append((step, none)),
        **FIXED,
    )
    assert [step for step, _ in tokens] == [None, 6, 8, 10] and tokens[-1][1] == [2, 2, 2]
    assert logits == [(4, None), (6, None), (8, None)]


@pytest.mark.parametrize("options", [{"tokens_per_step": 2}, {"apd_mixture_weight": 0.8}])
def test_without_compat_it_is_ours(models, verifier, options):
    ids, _ = prompts(1, 4)
    given = FIXED | options | {"max_new_tokens": 8, "alg": "apd", "verifier_model": verifier[1]}
    out = apd.diffusion_generate(models[1], ids, compat=None, **given)
    assert out.sequences.shape == (1, 12) and MASK not in out.sequences
    assert out.profile.num_forward_evals >= 1
    if "tokens_per_step" in options and EOS not in out.sequences:
        assert out.profile.num_forward_evals == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alg": "entropy"}, "alg: expected one of apd, leftright"),
        ({"tokens_per_step": 0}, "tokens_per_step: expected an int of at least 1"),
        ({"tokens_per_step": 3, "max_lookahead": 2}, "at least the 3 tokens_per_step, got 2"),
        ({"tokens_per_step": None}, "tokens_per_step: expected an int"),
        ({"kv_window": -1}, "kv_window: expected an int of at least 0"),
        ({"top_k": 0}, "top_k: expected an int of at least 1"),
        ({"apd_mixture_weight": 1.5}, "apd_mixture_weight: expected a number"),
        ({"apd_mixture_weight": 0.5}, "verifier_model: expected a causal model"),
        ({"num_return_sequences": 2}, "expected one sequence"),
        ({"tokens_a_step": 1}, "expected arguments among .*kv_window"),
        ({"compat": "dream"}, "compat: expected 'apd' or None"),
    ],
)
def test_bad_arguments(models, options, message):
    ids, _ = prompts(1, 5)
    given = FIXED | {"tokens_per_step": 1, "max_new_tokens": 8, "alg": "leftright"} | options
    with pytest.raises((ValueError, TypeError), match=message):
        apd.diffusion_generate(models[1], ids, **given)


def test_bad_verifiers_and_prompts(models, verifier):
    ids, _ = prompts(1, 5)
    given = FIXED | {"apd_mixture_weight": 0.5, "max_new_tokens": 8, "alg": "apd"}
    with pytest.raises(ValueError, match="causal attention, got full"):
        apd.diffusion_generate(models[1], ids, verifier_model=models[1], **given)
    small = random_plain(verifier[0].config | {"vocab_size": 60}, 1)
    with pytest.raises(ValueError, match="expected logits of 61 ids .* got 60"):
        apd.diffusion_generate(models[1], ids, verifier_model=standin(small), **given)
    ids[0, 2] = MASK
    with pytest.raises(PydllmError, match="masks at the end alone"):
        apd.diffusion_generate(models[1], ids, verifier_model=verifier[1], **given)
