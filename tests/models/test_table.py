"""docs/models.md: the table is the families', and every row decodes with what it claims."""

from pathlib import Path

import pytest
import torch

import pydllm
from pydllm.models.families import FAMILIES
from pydllm.models.table import ROWS, replaced
from tests.models import moe_plain
from tests.models.plain import CONFIGS, LLADA, QWEN, RECENT, random_plain, write_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
NEW = 10
# A configuration with the published keys for each class, small.
TINY = {
    "LLaDAModelLM": LLADA,
    "DreamModel": CONFIGS["dream"],
    "SDARForCausalLM": CONFIGS["sdar"],
    "Fast_dLLM_QwenForCausalLM": RECENT["fast-dllm-v2"],
    "NemotronLabsDiffusionModel": RECENT["nemotron"],
    "DiffEncoderModel": RECENT["diff-encoder"],
    "StableDiffcoderForCausalLM": RECENT["stable-diffcoder"],
    "A2DLlama*": CONFIGS["partial-rotary"],
    "A2DQwen2*": CONFIGS["a2d-qwen2-tied"],
    "A2DQwen3*": CONFIGS["a2d-qwen3"],
    "CoDALanguageModel": RECENT["coda"],
    "Qwen2ForCausalLM": RECENT["qwen2-yarn"],
    "Qwen3ForCausalLM": QWEN | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    "LlamaForCausalLM": RECENT["llama3"],
    "MistralForCausalLM": RECENT["mistral"],
    "Ministral3ForCausalLM": RECENT["mistral"] | {"architectures": ["Ministral3ForCausalLM"]},
}
MOE = {config["architectures"][0]: config for config in moe_plain.CONFIGS.values()}
MASK = 60
ALGORITHMS = {
    "Autoregressive": lambda size: pydllm.Autoregressive(),
    "SelfSpeculative": lambda size: pydllm.SelfSpeculative(drafts=3),
    "Static": lambda size: pydllm.Static(block_length=size),
    "Threshold": lambda size: pydllm.Threshold(threshold=0.5, block_length=size),
    "Factor": lambda size: pydllm.Factor(factor=1.0, block_length=size),
    "EntropyBound": lambda size: pydllm.EntropyBound(bound=0.5, block_length=size),
    "Editing": lambda size: pydllm.Editing(threshold=0.5, edit_threshold=0.2, block_length=size),
    "FreeDave": lambda size: pydllm.FreeDave(draft_steps=3, block_length=size),
    "LeftToRight": lambda size: pydllm.LeftToRight(tokens_per_step=2),
    "MultiBlock": lambda size: pydllm.MultiBlock(threshold=0.5, block_length=size),
}


def test_the_page_has_the_table():
    page = PAGE.read_text(encoding="utf-8")
    assert page == replaced(page), "run python -m pydllm.models.table"


def test_every_family_has_a_row():
    assert {row.family for row in ROWS} == {*TINY, *MOE} == set(FAMILIES)


def write_tiny(folder, family):
    if family in TINY:
        return write_checkpoint(folder, random_plain(TINY[family]))
    weights = moe_plain.random_weights(MOE[family], 0, torch.float64)
    moe_plain.write_moe(folder, MOE[family], weights)
    return folder


@pytest.fixture(scope="module")
def helpers(tmp_path_factory):
    """A diffusion model and a verifier with the vocabulary of the tiny checkpoints."""
    folder = tmp_path_factory.mktemp("helpers")
    draft = write_checkpoint(folder / "llada", random_plain(LLADA))
    verifier = write_checkpoint(folder / "qwen", random_plain(RECENT["qwen2-yarn"]))
    return tuple(pydllm.load(path, device="cpu") for path in (draft, verifier))


def algorithm(name, model, helpers):
    if name == "APD":
        if model.spec.attention != "full":
            return model, pydllm.APD(model, window=0)
        return model, pydllm.APD(helpers[1])
    if name == "APD.verifier":
        return helpers[0], pydllm.APD(model)
    return model, ALGORITHMS[name](model.spec.block_size or 4)


def load_row(folder, row):
    overrides = dict(row.overrides)
    if "mask_id" in overrides:
        overrides["mask_id"] = MASK
    if "block_size" in overrides:
        overrides["block_size"] = 8
    return pydllm.load(
        write_tiny(folder, row.family), device="cpu", dtype=torch.float64, **overrides
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model)
def test_a_row_decodes_with_what_it_claims(tmp_path, helpers, row):
    model = load_row(tmp_path, row)
    prompts = [[1, 2, 3, 4, 8], [6, 7]]
    assert row.decoders
    for name in row.decoders:
        decoded, chosen = algorithm(name, model, helpers)
        got = pydllm.generate(decoded, prompts, chosen, max_new_tokens=NEW)
        for row_index, prompt in enumerate(prompts):
            tokens = got.sequences[row_index].tolist()
            assert tokens[: len(prompt)] == prompt and len(tokens) == len(prompt) + NEW
            assert decoded.spec.mask_id not in tokens
            assert got.nfe[row_index] >= 1


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (next(row for row in ROWS if "Nemotron-Labs" in row.model), "MultiBlock"),
        (next(row for row in ROWS if row.model == "Qwen 3"), "Static"),
        (next(row for row in ROWS if row.model == "SDAR, TraDo"), "LeftToRight"),
    ],
)
def test_what_a_row_does_not_claim_is_refused(tmp_path, helpers, row, name):
    folder = write_checkpoint(tmp_path, random_plain(TINY[row.family]))
    model = pydllm.load(folder, device="cpu")
    assert name not in row.decoders
    with pytest.raises(ValueError, match="expected"):
        pydllm.generate(model, [[1, 2]], ALGORITHMS[name](4), max_new_tokens=NEW)


FORCED = {
    "Dream 7B",
    "CoDA 1.7B",
    "Open-dCoder 0.5B",
    "RND1 30B-A3B",
    "Fast-dLLM v2",
    "Nemotron-Labs-Diffusion 3B, 8B, 14B",
    "Nemotron's Qwen 3 sister",
}


@pytest.mark.parametrize(
    "row", [row for row in ROWS if "Static" in row.decoders], ids=lambda row: row.model
)
def test_a_forced_first_token_works_or_is_refused(tmp_path, row):
    """It works where a block's first forward predicts its first token from the one before."""
    model = load_row(tmp_path, row)
    cache = "dual" if model.spec.attention == "full" else "none"
    size = model.spec.block_size or 4
    algorithm = pydllm.Static(
        block_length=size, tokens_per_step=2, cache=cache, first_token="forced"
    )
    prompt = list(range(1, size + 1))  # a whole block: the next one is forced wherever it begins
    if row.model not in FORCED:
        with pytest.raises(
            ValueError, match="first_token: expected 'window' with .*, got 'forced'"
        ):
            pydllm.generate(model, [prompt], algorithm, max_new_tokens=2 * size)
        return
    got = pydllm.generate(model, [prompt], algorithm, max_new_tokens=2 * size)
    steps = got.step_map[0].tolist()
    for block in (steps[:size], steps[size:]):
        written = [step for step in block if step >= 0]
        if written:  # the first token alone, before all others of its block
            assert written.count(block[0]) == 1 and min(written) == block[0]
