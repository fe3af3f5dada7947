"""Loops that come with a model's weights, and dllm's sampler of block diffusion.

``pydllm.generate`` is compared with the last three: prompts of several lengths together, each
against the published loop alone. Answers are compared up to their first EOS.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import pydllm
from pydllm.integrations import fast_dllm_v2
from tests.integrations.published_blocks import fast_dllm_v2 as restated_v2
from tests.integrations.tiny import EOS, MASK
from tests.models.plain import Plain
from tests.upstream.compare import Case, Loop, Result, Run
from tests.upstream.models import Trio, trios
from tests.upstream.sources import Absent, Checkouts

SCALES = (0.0, 1.0, 1.3, 1.7)  # of the head's row of EOS
PAD = 58
# The rules are ours, but the probabilities are those of all tokens, the mask's among them.
THEIRS = "dllm"
ENDS = {"eos_token_id": EOS}


def load_fast_dllm_v2(checkouts: Checkouts) -> dict[str, Loop]:
    root = checkouts.root("S2D2", "Fast-dLLM-v2")
    modeling, configuration = checkouts.package(root, "modeling_fast", "configuration_fast")
    require_transformers("4.53", "Fast-dLLM v2's cache")

    def build(values: dict[str, Any]) -> nn.Module:
        known = {key: value for key, value in values.items() if key != "architectures"}
        settings = configuration.Fast_dLLM_QwenConfig(**known)
        settings._attn_implementation = "sdpa"
        return modeling.Fast_dLLM_QwenForCausalLM(settings)

    make = trios(
        "fast-dllm-v2",
        build,
        num_hidden_layers=2,
        bd_size=32,
        tie_word_embeddings=False,
        max_position_embeddings=512,
        **ENDS,
    )

    def draw(rng: random.Random) -> Case:
        trio, told = draw_ending(rng, make)
        length = rng.choice([n for n in range(5, 65) if n != 32])  # 32 is lost in the original
        options: dict[str, Any] = {
            "max_new_tokens": rng.choice([32, 64, 70]),
            "small_block_size": rng.choice([4, 8, 32]),
            "threshold": rng.choice([0.3, 0.5, 0.9, 1]),
            "use_block_cache": rng.random() < 0.5,
            "temperature": rng.choice([0, 0, 0, 0.7]),
        }
        return Case(trio, torch.tensor([draw_prompt(rng, length)]), None, options, told)

    ids = {"mask_id": MASK, "stop_token": EOS}

    def run_original(case: Case) -> Result:
        return Result(case.trio.limited().generate(case.prompt, **case.options, **ids))

    def run_dropin(case: Case) -> Result:
        return Result(fast_dllm_v2.generate(case.trio.own, case.prompt, **case.options, **ids))

    def run_restated(case: Case) -> Result | None:
        given = case.options
        if given["temperature"]:
            return None
        rule = (given["small_block_size"], given["threshold"], given["use_block_cache"])
        new = given["max_new_tokens"]
        tokens = restated_v2(case.trio.plain, case.prompt[0].tolist(), new, MASK, EOS, *rule)
        return Result(torch.tensor([tokens]))

    return {"generate": Loop(draw, run_original, run_dropin, run_restated)}


def load_bd3lm(checkouts: Checkouts) -> dict[str, Loop]:
    root = checkouts.root("dllm")
    modeling = checkouts.file(root / "dllm/pipelines/a2d/models/qwen3", "modeling_qwen3.py")
    (sampling,) = checkouts.package(root, "dllm.core.samplers.bd3lm", bare=True)
    block = 8

    def build(values: dict[str, Any]) -> nn.Module:
        known = {key: value for key, value in values.items() if key != "architectures"}
        settings = modeling.A2DQwen3Config(**known)
        settings._attn_implementation = "sdpa"
        return modeling.A2DQwen3LMHeadModel(settings)

    # A token of the padding's id would count as padding in the original.
    make = trios("a2d-bd3lm", build, silent=(PAD,), num_hidden_layers=2, block_size=block, **ENDS)
    names = {"mask": MASK, "bos": None, "pad": PAD, "eos": EOS}
    tokenizer = SimpleNamespace(**{f"{name}_token_id": value for name, value in names.items()})

    def draw(rng: random.Random) -> Case:
        case = draw_batch(rng, make, new=rng.choice([8, 16, 24]))
        case.options["tokens_per_step"] = rng.choice([1, 1, 2, 4])
        return case

    def run_original(case: Case) -> Result:
        sampler = sampling.BD3LMSampler(model=case.trio.limited(), tokenizer=tokenizer)
        given = case.options
        steps = block // given["tokens_per_step"]
        new = given["new"]
        x = sampler.sample(
            given["prompts"], max_new_tokens=new, block_size=block, steps_per_block=steps
        )
        at = -(-max(map(len, given["prompts"])) // block) * block
        return Result(torch.tensor([ended(row[at:], new) for row in x.tolist()]))

    def run_own(case: Case) -> Result:
        algorithm = pydllm.Static(
            block_length=block, tokens_per_step=case.options["tokens_per_step"], compat=THEIRS
        )
        return Result(answers(case, algorithm).tokens)

    return {"BD3LMSampler": Loop(draw, run_original, run_own)}


def load_stable_diffcoder(checkouts: Checkouts) -> dict[str, Loop]:
    name = "modeling_stable_diffcoder.py"
    file = checkouts.file(checkouts.root("Stable-DiffCoder-8B-Instruct"), name)
    require_transformers("4", "Stable-DiffCoder's cache")

    def build(values: dict[str, Any]) -> nn.Module:
        import transformers

        known = {key: value for key, value in values.items() if key != "architectures"}
        settings = transformers.LlamaConfig(**known)
        settings._attn_implementation = "eager"  # its mask is bf16
        return file.StableDiffcoderForCausalLM(settings)

    make = trios("stable-diffcoder", build, num_hidden_layers=2, mask_token_id=MASK, **ENDS)

    def draw(rng: random.Random) -> Case:
        case = draw_batch(rng, make, new=rng.choice([4, 8, 16, 20]), whole=4)
        case.options["threshold"] = rng.choice([0.3, 0.5, 0.8, 0.95])
        return case

    def run_original(case: Case) -> Result:
        new, rows, forwards = case.options["new"], [], 0
        for prompt in case.options["prompts"]:
            x, nfe = case.trio.limited().generate_block(
                torch.tensor([prompt]),
                steps=new,
                gen_length=new,
                threshold=case.options["threshold"],
                mask_id=MASK,
                eos_id=EOS,
            )
            fresh = x[0, len(prompt) :].tolist()
            rows.append(ended(fresh, new))
            # It stores every block but one with an EOS by a forward that decides nothing.
            forwards += nfe - len(fresh) // 4 + (EOS in fresh)
        return Result(torch.tensor(rows), forwards)

    def run_own(case: Case) -> Result:
        threshold = case.options["threshold"]
        algorithm = pydllm.Threshold(threshold=threshold, block_length=4, compat=THEIRS)
        return answers(case, algorithm)

    return {"generate_block": Loop(draw, run_original, run_own)}


class KeptKeys:
    """Keys and values of one sequence, of every layer, each ``(positions, heads, head_dim)``."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def get_seq_length(self) -> int:
        return len(self.layers[0][0]) if self.layers else 0

    def crop(self, length: int) -> None:
        self.layers = [(k[:length], v[:length]) for k, v in self.layers]

    def append(self, made: list[tuple[Tensor, Tensor]]) -> None:
        before = self.layers or [(k[:0], v[:0]) for k, v in made]
        self.layers = [
            (torch.cat((k, new_k)), torch.cat((v, new_v)))
            for (k, v), (new_k, new_v) in zip(before, made, strict=True)
        ]


class Encoder(nn.Module):
    """Hidden states of a plain forward; causal unless ``diffusion_lm`` is set."""

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.plain = plain
        self.attention = SimpleNamespace(diffusion_lm=True)
        self.layers = [SimpleNamespace(self_attn=self.attention)]

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: KeptKeys | None = None,
        use_cache: bool = False,
        use_causal_mask: bool | None = None,
        **positions: Any,
    ) -> SimpleNamespace:
        kept = KeptKeys() if past_key_values is None else past_key_values
        causal = not self.attention.diffusion_lm
        if use_causal_mask not in (None, causal):
            raise RuntimeError("expected one kind of mask, got two")
        first = kept.get_seq_length()
        hidden, _, made = self.plain(input_ids[0], first, kept.layers or None, causal=causal)
        if use_cache:
            kept.append(made)
        return SimpleNamespace(last_hidden_state=hidden[None], past_key_values=kept)


class NemotronModel(nn.Module):
    """A plain forward with the attributes that Nemotron's loops use."""

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.config = SimpleNamespace(mask_token_id=MASK, eos_token_id=EOS)
        self.mask_token_id = MASK
        self.encoder = Encoder(plain)
        self.diffusion_head = lambda hidden: plain.linear(hidden, plain.ends[2])

    def forward(self, input_ids: Tensor, **options: Any) -> SimpleNamespace:
        out = self.encoder(input_ids, **options)
        logits = self.diffusion_head(out.last_hidden_state)
        return SimpleNamespace(logits=logits, past_key_values=out.past_key_values)


def load_nemotron(checkouts: Checkouts) -> dict[str, Loop]:
    root = checkouts.root("Nemotron-Labs-Diffusion-8B")
    loops = checkouts.functions(root / "modeling_nemotron_labs_diffusion.py", DynamicCache=KeptKeys)
    block = 4
    make = trios("nemotron", None, num_hidden_layers=2, block_size=block, **ENDS)

    def draw_blocks(rng: random.Random) -> Case:
        case = draw_batch(rng, make, new=rng.choice([4, 8, 16]))
        case.options["threshold"] = rng.choice([None, 0.3, 0.5, 0.8])
        return case

    def draw_tokens(rng: random.Random) -> Case:
        case = draw_batch(rng, make, new=rng.randrange(1, 17))
        case.options["block_length"] = rng.choice([2, 4, 8])
        return case

    def original(name: str, *options: str, **more: Any) -> Run:
        def run(case: Case) -> Result:
            new, rows, forwards = case.options["new"], [], 0
            given = {option: case.options[option] for option in options} | more
            for prompt in case.options["prompts"]:
                model = NemotronModel(case.trio.plain)
                x, nfe = loops[name](model, torch.tensor([prompt]), max_new_tokens=new, **given)
                fresh = x[0, len(prompt) :].tolist()
                rows.append(ended(fresh, new))
                forwards += nfe
            return Result(torch.tensor(rows), forwards)

        return run

    def run_blocks(case: Case) -> Result:
        threshold = case.options["threshold"]
        if threshold is None:
            algorithm: Any = pydllm.Static(block_length=block, compat=THEIRS)
        else:
            algorithm = pydllm.Threshold(threshold=threshold, block_length=block, compat=THEIRS)
        got = answers(case, algorithm)
        # With an EOS, the original leaves a block's other masks; a batch goes on with them.
        return got._replace(forwards=None) if (got.tokens == EOS).any() else got

    def run_causal(case: Case) -> Result:
        return answers(case, pydllm.Autoregressive())

    def run_speculative(case: Case) -> Result:
        drafts = case.options["block_length"] - 1
        got = answers(case, pydllm.SelfSpeculative(drafts=drafts))
        return got._replace(forwards=None)  # the last token takes no draft: fewer than there

    return {
        "generate": Loop(
            draw_blocks, original("generate", "threshold", block_length=block), run_blocks
        ),
        "ar_generate": Loop(draw_tokens, original("ar_generate"), run_causal),
        "linear_spec_generate": Loop(
            draw_tokens, original("linear_spec_generate", "block_length"), run_speculative
        ),
    }


def draw_ending(rng: random.Random, make: Callable[[int, float, bool], Trio]) -> tuple[Trio, str]:
    """A model that does not predict masks, which these loops decode again and again."""
    seed, scale = rng.randrange(8), rng.choice(SCALES)
    return make(seed, scale, False), f"model {seed}, EOS x {scale}"


def draw_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(50) for _ in range(length)]


def draw_batch(
    rng: random.Random,
    make: Callable[[int, float, bool], Trio],
    *,
    new: int,
    whole: int = 1,
) -> Case:
    """One to three prompts, their lengths multiples of ``whole``, decoded together."""
    trio, told = draw_ending(rng, make)
    lengths = [whole * rng.randrange(1, 24 // whole) for _ in range(rng.choice([1, 2, 3]))]
    options = {"prompts": [draw_prompt(rng, length) for length in lengths], "new": new}
    return Case(trio, torch.zeros(0), None, options, told)


def ended(tokens: list[int], new: int) -> list[int]:
    """The first ``new`` tokens, all EOS from the first one on."""
    fresh = (tokens + [EOS] * new)[:new]
    end = fresh.index(EOS) if EOS in fresh else new
    return fresh[:end] + [EOS] * (new - end)


def answers(case: Case, algorithm: Any) -> Result:
    """New tokens ``(B, new)`` of the case's prompts, decoded together, and all forwards."""
    prompts, new = case.options["prompts"], case.options["new"]
    got = pydllm.generate(case.trio.own, prompts, algorithm, max_new_tokens=new)
    rows = [row[len(p) :].tolist() for row, p in zip(got.sequences, prompts, strict=True)]
    return Result(torch.tensor([ended(row, new) for row in rows]), int(got.nfe.sum()))


def require_transformers(version: str, why: str) -> None:
    import transformers

    if not f"{transformers.__version__}.".startswith(f"{version}."):
        raise Absent(f"{why} needs transformers {version}, found {transformers.__version__}")
