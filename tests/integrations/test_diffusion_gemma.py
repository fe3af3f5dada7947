"""DiffusionGemma's generation with the step replaced, against transformers' own."""

import importlib
import re
from types import SimpleNamespace

import pytest
import torch

from pydllm import PydllmError
from pydllm.integrations.diffusion_gemma import EntropyBoundSampler, accelerate

transformers = pytest.importorskip("transformers", minversion="5.12")
gemma = importlib.import_module("transformers.models.diffusion_gemma")
LENGTH, VOCAB = 16, 256


@pytest.fixture(scope="module")
def model():
    from transformers import Gemma4VisionConfig

    text = gemma.DiffusionGemmaTextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        num_global_key_value_heads=1,
        head_dim=16,
        global_head_dim=32,
        sliding_window=8,
        num_experts=4,
        top_k_experts=2,
        max_position_embeddings=512,
    )
    vision = Gemma4VisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    config = gemma.DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=LENGTH,
        image_token_id=250,
        boi_token_id=251,
        eoi_token_id=252,
    )
    torch.manual_seed(0)
    model = gemma.DiffusionGemmaForBlockDiffusion(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.25)
    return model


def run(model, seed=3, batch=2, **options):
    ids = torch.randint(5, 240, (batch, 6), generator=torch.Generator().manual_seed(9))
    mask = torch.ones_like(ids)
    if batch > 1:
        ids[1, :2], mask[1, :2] = 0, 0
    torch.manual_seed(seed)
    given = {"max_new_tokens": 2 * LENGTH, "max_denoising_steps": 5} | options
    return model.generate(ids, attention_mask=mask, **given)


class NoFives:
    """A caller's logits processor."""

    def __call__(self, input_ids, scores, cur_step):
        scores = scores.clone()
        scores[..., 5] = -torch.inf
        return scores


CASES = {
    "default": {},
    "one sequence": {"batch": 1},
    "few accepted": {"bound": 0.01},
    "many accepted": {"bound": 20.0},
    "stops early": {"confidence_threshold": 100.0, "stability_threshold": 0},
    "stops when stable": {"confidence_threshold": 100.0, "stability_threshold": 2, "bound": 60.0},
    "never stops": {"confidence_threshold": None, "stability_threshold": None},
    "cold": {"t_min": 0.01, "t_max": 0.02},
    "no schedule": {"t_min": None, "t_max": None},
}


def options_of(case):
    options = dict(case)
    if "bound" in options:
        module = gemma.generation_diffusion_gemma
        bound = module.EntropyBoundSamplerConfig(entropy_bound=options.pop("bound"))
        options["sampler_config"] = bound
    return options


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_same_seed_same_tokens(model, case):
    options = options_of(case)
    expected = run(model, **options)
    with accelerate(model) as ours:
        out = run(ours, **options)
    assert type(out) is type(expected)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.tokens_per_forward, expected.tokens_per_forward)
    assert "_denoising_step" not in vars(model) and "_prepare_sampler" not in vars(model)


@pytest.mark.parametrize("compat", ["diffusion_gemma", None])
def test_the_callers_processors_are_called(model, compat):
    from transformers import LogitsProcessorList

    def options():
        return {"logits_processor": LogitsProcessorList([NoFives()]), "max_denoising_steps": 3}

    expected = run(model, **options())
    with accelerate(model, compat=compat) as ours:
        out = run(ours, **options())
    assert out.sequences.shape == expected.sequences.shape
    assert not (out.sequences[:, 6:] == 5).any()
    if compat:
        assert torch.equal(out.sequences, expected.sequences)


def test_one_step_without_noise_of_ours(model):
    """The emitted canvas is the arg-max: with one step nothing that is drawn differs."""
    expected = run(model, max_denoising_steps=1, max_new_tokens=LENGTH)
    with accelerate(model, compat=None) as ours:
        out = run(ours, max_denoising_steps=1, max_new_tokens=LENGTH)
        assert torch.equal(out.sequences, expected.sequences)
        again = [run(ours, seed=seed).sequences for seed in (0, 0, 1)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


def test_the_softcap_is_that_of_the_forward(model):
    """Fused on the head's logits, and through the model's forward: same canvas, same entropies."""
    made = []
    for hooked in (False, True):
        with accelerate(model, compat=None) as ours:
            if hooked:  # as a wrapper would; the temperature then comes from the processor
                ours.forward = type(model).forward.__get__(model)
            made.append(run(ours, max_denoising_steps=4).sequences)
            vars(model).pop("forward", None)
    assert torch.equal(*made)


def test_distribution_of_a_step(model):
    """A step on logits of two positions: one is accepted, one renoised."""
    rows, vocab, temperature = 4000, 12, 0.6
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, vocab, generator=generator) * torch.tensor([[3.0], [0.3]])
    bound = 1e-3
    sampler = EntropyBoundSampler(SimpleNamespace(entropy_bound=bound), 2, vocab, 1)
    schedule = type("LinearTemperatureScheduleLogitsProcessor", (), {})()
    schedule.t_min = schedule.t_max = temperature
    schedule.max_denoising_steps = 1
    fake = SimpleNamespace(
        model=SimpleNamespace(
            decoder=SimpleNamespace(embed_tokens=SimpleNamespace(weight=torch.zeros(1)))
        )
    )
    from pydllm.integrations.diffusion_gemma import _Step

    class Processors(list):
        def __call__(self, input_ids, scores, cur_step):
            return scores / temperature

    fake.forward = lambda **_: SimpleNamespace(logits=logits.expand(rows, -1, -1).clone())
    torch.manual_seed(6)
    canvas, best, conditioning, finished = _Step(False, None)(
        fake,
        decoder_forward=fake.forward,
        current_canvas=torch.zeros(rows, 2, dtype=torch.int64),
        argmax_canvas=torch.zeros(rows, 2, dtype=torch.int64),
        input_ids=torch.zeros(rows, 1, dtype=torch.int64),
        decoder_position_ids=None,
        self_conditioning_logits=None,
        mask_mapping=None,
        cache=None,
        finished_denoising=torch.zeros(rows, dtype=torch.bool),
        cur_step=1,
        sampler=sampler,
        logits_processor=Processors([schedule]),
        diffusion_stopping_criteria=None,
    )
    assert torch.equal(best, logits.argmax(-1).expand(rows, 2)) and not finished.any()
    assert torch.allclose(conditioning[7], logits / temperature)
    assert sampler.accepted_token_mask.tolist() == [[True, False]] * rows
    wanted = torch.stack(((logits[0] / temperature).softmax(-1), torch.full((vocab,), 1 / vocab)))
    for place in range(2):
        p, seen = wanted[place], torch.bincount(canvas[:, place], minlength=vocab) / rows
        mean = ((p * (1 - p) / rows).sqrt().sum() / 2).item()
        # Off the mean by 0.045 once in exp(-2 n 0.045^2) < 1e-7 (McDiarmid).
        assert (seen - p).abs().sum().item() / 2 < mean + 0.045


def test_the_sampler_alone(model):
    """In the original's loop, instead of its own sampler."""
    expected = run(model)

    def prepare(generation_config):
        return EntropyBoundSampler(generation_config.sampler_config, LENGTH, VOCAB, 5)

    model._prepare_sampler = prepare
    try:
        assert torch.equal(run(model).sequences, expected.sequences)
    finally:
        del model._prepare_sampler
    sampler = EntropyBoundSampler(SimpleNamespace(entropy_bound=0.1), 4, 8, 1)
    with pytest.raises(ValueError, match="accept_canvas to be called before"):
        sampler.renoise_canvas(torch.zeros(1, 4, dtype=torch.int64), 1)


def test_another_model_is_refused():
    with pytest.raises(TypeError, match="expected transformers' DiffusionGemmaForBlockDiffusion"):
        accelerate(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("kind", "name", "changed"),
    [
        ("model", "_denoising_step", lambda self, *, decoder_forward, states, **model_kwargs: None),
        ("model", "_prepare_sampler", lambda self, generation_config, canvas_length: None),
        ("model", "forward", lambda self, decoder_input_ids, states: None),
        ("inner", "forward", lambda self, decoder_input_ids, states: None),
        ("EntropyBoundSampler", "accept_canvas", lambda self, current_canvas, logits: None),
        ("EntropyBoundSampler", "renoise_canvas", lambda self, canvas, cur_step: None),
        ("EntropyBoundSampler", "initialize_canvas", lambda self, batch_size, device, seed: None),
        ("StableAndConfidentStoppingCriteria", "__call__", lambda self, argmax_canvas: None),
        ("LinearTemperatureScheduleLogitsProcessor", "__call__", lambda self, scores: None),
    ],
)
def test_another_signature_is_refused(model, monkeypatch, kind, name, changed):
    kinds = {"model": type(model), "inner": type(model.model)}
    changed.__qualname__ = f"{kind}.{name}"
    owner = kinds.get(kind) or getattr(gemma.generation_diffusion_gemma, kind)
    monkeypatch.setattr(owner, name, changed)
    named = re.escape(f"transformers {transformers.__version__}: {kind}.{name}: expected (")
    with pytest.raises(PydllmError, match=named + r".*\), found \(.*\)"):
        accelerate(model)
    assert "_denoising_step" not in vars(model) and "_prepare_sampler" not in vars(model)


def test_what_was_there_before_comes_back(model):
    mine = object()
    model.__dict__["_denoising_step"] = mine
    done = accelerate(model)
    assert model._denoising_step is not mine
    done.undo()
    assert vars(model).pop("_denoising_step") is mine
