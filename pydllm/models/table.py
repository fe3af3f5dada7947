"""The table of models in docs/models.md: ``python -m pydllm.models.table`` writes it.

What loads and decodes comes from the families; names, drop-ins and what a row was compared with are
said here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from pydllm.models.families import FAMILIES

BEGIN, END = "<!-- table: pydllm.models.table -->", "<!-- end -->"
_BLOCKWISE = ("Static", "Threshold", "Factor", "EntropyBound")
_COLUMNS = (
    "model",
    "repository",
    "class",
    "load",
    "decoders",
    "drop-in",
    "patch",
    "chat",
    "tensor parallel",
    "compared with",
)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        model, repository: as its makers call it.
        family: a class, or pattern of classes, in ``FAMILIES``.
        compared: what its forward or its decoding was compared with.
        overrides: arguments of ``load`` without which the class is another model.
        drop_in: modules of ``pydllm.integrations`` with the signature of its own code.
        patch: whether ``pydllm.patch`` knows its attention.
    """

    model: str
    repository: str
    family: str
    compared: str
    overrides: tuple[tuple[str, object], ...] = ()
    drop_in: tuple[str, ...] = ()
    patch: bool = True

    @property
    def attention(self) -> str:
        given = dict(self.overrides).get("attention")
        return str(given or FAMILIES[self.family].attention)

    @property
    def decoders(self) -> tuple[str, ...]:
        """Names of the algorithms; ``"APD.verifier"`` for causal models."""
        family = FAMILIES[self.family]
        if self.attention == "causal":
            return ("Autoregressive", "APD.verifier")
        if self.attention == "full":
            return (*_BLOCKWISE, "FreeDave", "LeftToRight", "MultiBlock", "APD")
        names: tuple[str, ...] = (*_BLOCKWISE, "FreeDave")
        if family.context == "block" and not family.seeded:
            names = (*names, "MultiBlock")
        if self.family == "LLaDA2MoeModelLM":
            names = (*names, "Editing")
        if family.causal is not None:
            names = (*names, "Autoregressive", "SelfSpeculative", "APD")
        return names

    def cells(self) -> tuple[str, ...]:
        options = "".join(f", {name}={value!r}" for name, value in self.overrides)
        return (
            self.model,
            self.repository,
            f"`{self.family}`",
            f"`load(..{options})`",
            ", ".join(self.decoders).replace("APD.verifier", "as APD's verifier"),
            ", ".join(f"`{name}`" for name in self.drop_in) or "-",
            "yes" if self.patch else "-",
            "-" if self.attention == "causal" else "yes",
            "yes",
            self.compared,
        )


_TRUNK = "its trunk in transformers 5.24 (`pydllm verify`), an fp64 forward"
_MOE = "an fp64 forward"
_SOFTMAX = "an fp64 forward, Qwen3MoeForCausalLM of transformers 4.57 and 5.24"
_CAUSAL = "transformers 4.57 and 5.24, causal"
ROWS = (
    Row(
        "LLaDA 8B, 1.5",
        "GSAI-ML/LLaDA-8B-Instruct",
        "LLaDAModelLM",
        "LLaDA b7e6c35, Fast-dLLM 24cc59e, d3LLM e5bfcac",
        drop_in=("llada", "fast_dllm", "d3llm"),
    ),
    Row(
        "Dream 7B",
        "Dream-org/Dream-v0-Instruct-7B",
        "DreamModel",
        "Dream a1b4472, Fast-dLLM 24cc59e, APD a555561",
        drop_in=("dream", "fast_dllm_dream"),
    ),
    Row(
        "SDAR, TraDo",
        "JetLM/SDAR-8B-Chat",
        "SDARForCausalLM",
        _TRUNK,
        drop_in=("sdar",),
    ),
    Row(
        "I-DLM 8B, 32B",
        "yifanyu/I-DLM-8B",
        "SDARForCausalLM",
        "an fp64 forward",
        overrides=(("attention", "causal"), ("shift_logits", True)),
    ),
    Row(
        "Fast-dLLM v2",
        "Efficient-Large-Model/Fast_dLLM_v2_7B",
        "Fast_dLLM_QwenForCausalLM",
        "its class (S2D2 279500a, transformers 4.53.3)",
        drop_in=("fast_dllm_v2",),
    ),
    Row(
        "Nemotron-Labs-Diffusion 3B, 8B, 14B",
        "nvidia/Nemotron-Labs-Diffusion-8B",
        "NemotronLabsDiffusionModel",
        "its three loops; `Ministral3ForCausalLM` of transformers 5.24",
        patch=False,
    ),
    Row(
        "Nemotron's Qwen 3 sister",
        "-",
        "DiffEncoderModel",
        _TRUNK,
        patch=False,
    ),
    Row(
        "Stable-DiffCoder 8B",
        "ByteDance-Seed/Stable-DiffCoder-8B-Instruct",
        "StableDiffcoderForCausalLM",
        "its class, transformers 4.57.1",
        patch=False,
    ),
    Row("A2D Llama (MDLM)", "-", "A2DLlama*", _TRUNK),
    Row(
        "A2D Qwen2 (MDLM)",
        "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1",
        "A2DQwen2*",
        _TRUNK,
    ),
    Row("A2D Qwen3 (MDLM)", "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1", "A2DQwen3*", _TRUNK),
    Row(
        "A2D BD3LM",
        "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1",
        "A2DQwen3*",
        "dllm ca17675, `BD3LMSampler`",
        overrides=(("attention", "block_causal"), ("block_size", 32)),
    ),
    Row(
        "CoDA 1.7B",
        "Salesforce/CoDA-v0-Instruct",
        "CoDALanguageModel",
        _TRUNK,
        patch=False,
    ),
    Row(
        "Open-dCoder 0.5B",
        "fredzzp/open-dcoder-0.5B",
        "Qwen2ForCausalLM",
        _TRUNK,
        overrides=(("attention", "full"), ("shift_logits", True), ("mask_id", 151666)),
    ),
    Row(
        "LLaDA-MoE 7B-A1B",
        "inclusionAI/LLaDA-MoE-7B-A1B-Instruct",
        "LLaDAMoEModelLM",
        _SOFTMAX,
    ),
    Row(
        "LLaDA2.x mini, flash",
        "inclusionAI/LLaDA2.0-mini",
        "LLaDA2MoeModelLM",
        _MOE,
        drop_in=("llada2", "llada21"),
    ),
    Row("SDAR 30B-A3B", "JetLM/SDAR-30B-A3B-Chat", "SDARMoeForCausalLM", _SOFTMAX),
    Row("RND1 30B-A3B", "radicalnumerics/RND1-Base-0910", "RND1LM", _SOFTMAX, patch=False),
    Row("Ling 2.0", "inclusionAI/Ling-mini-2.0", "BailingMoeV2ForCausalLM", _MOE, patch=False),
    Row("Qwen 3 MoE", "Qwen/Qwen3-30B-A3B", "Qwen3MoeForCausalLM", _SOFTMAX),
    Row("Qwen 2, 2.5", "Qwen/Qwen2.5-7B-Instruct", "Qwen2ForCausalLM", _CAUSAL),
    Row("Qwen 3", "Qwen/Qwen3-8B", "Qwen3ForCausalLM", _CAUSAL),
    Row("Llama 2, 3.x", "meta-llama/Llama-3.1-8B-Instruct", "LlamaForCausalLM", _CAUSAL),
    Row("Mistral", "mistralai/Mistral-7B-v0.3", "MistralForCausalLM", _CAUSAL),
    Row("Ministral 3", "mistralai/Ministral-3-8B-Base-2512", "Ministral3ForCausalLM", _CAUSAL),
)


def table() -> str:
    """The rows in Markdown."""
    lines = [" | ".join(_COLUMNS), " | ".join("---" for _ in _COLUMNS)]
    lines += [" | ".join(row.cells()) for row in ROWS]
    return "\n".join(f"| {line} |" for line in lines)


def replaced(page: str) -> str:
    """The page with the table as it is now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/models.md")
    path.write_text(replaced(path.read_text(encoding="utf-8")), encoding="utf-8")
