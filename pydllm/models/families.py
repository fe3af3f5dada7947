"""The model families: how each one's configuration and tensors map to the native transformer.

A family is found by the class name in ``architectures``; ``model_type`` is ambiguous (LLaDA-8B and
LLaDA-MoE share one). What a class may or may not have (biases, tied head) is read from the keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from pydllm._backend.errors import CheckpointError
from pydllm.models.config import Config
from pydllm.models.moe import (
    MoeSizes,
    has_experts,
    llada2_config,
    llada2_moe,
    llada_moe,
    llada_moe_config,
    qwen_moe,
    qwen_moe_config,
)
from pydllm.models.rope import Rope, read_query_scale, read_rope

Shape = tuple[int, ...]
_LAYERS = 4096  # far above any model; a configuration is read before its weights


@dataclass(frozen=True)
class Names:
    """Where a checkpoint keeps what; those of a layer follow ``layer``."""

    embedding: str
    norm: str
    head: str
    layer: str
    attn_norm: str
    qkv: tuple[str, str, str]
    out: str
    mlp_norm: str
    gate_up: tuple[str, str]
    down: str
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"


_LLADA = Names(
    embedding="model.transformer.wte",
    norm="model.transformer.ln_f",
    head="model.transformer.ff_out",
    layer="model.transformer.blocks.{}.",
    attn_norm="attn_norm",
    qkv=("q_proj", "k_proj", "v_proj"),
    out="attn_out",
    mlp_norm="ff_norm",
    gate_up=("ff_proj", "up_proj"),
    down="ff_out",
)
LLAMA_NAMES = Names(
    embedding="model.embed_tokens",
    norm="model.norm",
    head="lm_head",
    layer="model.layers.{}.",
    attn_norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate_up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
)
_LLADA2 = replace(
    LLAMA_NAMES,
    embedding="model.word_embeddings",
    # Three parts of one tensor, as layouts.py names them.
    qkv=tuple(f"attention.query_key_value[{part}]" for part in "qkv"),  # type: ignore[arg-type]
    out="attention.dense",
    q_norm="attention.query_layernorm",
    k_norm="attention.key_layernorm",
)
_ENCODER = replace(
    LLAMA_NAMES,
    embedding="encoder.embed_tokens",
    norm="encoder.norm",
    head="diffusion_head",
    layer="encoder.layers.{}.",
)


@dataclass(frozen=True)
class Sizes:
    """The native transformer's shape; the flags are there for what only some families have."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    embeddings: int  # rows of the embedding: the vocabulary, or more
    eps: float
    rope: Rope
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_bias: bool
    qk_norm: bool
    tied: bool
    # q times 1 + beta ln(1 + floor(position / original length)): (beta, original length).
    query_scale: tuple[float, int] | None = None
    sliding_windows: tuple[int | None, ...] = ()  # of each layer; empty: no layer has one
    moe: MoeSizes | None = None


@dataclass(frozen=True)
class Family:
    """One row of the table below.

    Attributes:
        qkv_bias: q, k and v have biases and nothing else has; None: as ``attention_bias`` says.
        attention, shift_logits, block_origin, context, seeded: as in ``ModelSpec``.
        causal: as in ``ModelSpec``, while the attention is block-causal.
        block_key: the configuration's key of the block size.
        block_size: where the configuration has no such key: what the published code's argument is.
        optional_blocks: full attention becomes block-causal where the configuration has the key.
        mask_id, eos_ids: where no file names any: what the published code's arguments are.
        tied: the head is the embedding where the configuration does not say.
        sliding: ``"flag"``: as ``use_sliding_window`` and ``max_window_layers`` or ``layer_types``
            say; ``"always"``: wherever ``sliding_window`` is not null; ``"ignored"``: the published
            forward attends without; ``"refused"``.
        draft_adapter: folder of a LoRA that ``forward(adapter=True)`` adds.
        prepare: the configuration in the words of Llama's, after checks of what it alone has.
        moe: reads the expert layers; None: there are none.
    """

    names: Names
    sizes: Callable[[Config, Family], Sizes]
    attention: str
    shift_logits: bool = False
    qkv_bias: bool | None = None
    qk_norm: bool = False
    causal: str | None = None
    block_key: str = "block_size"
    block_size: int | None = None
    optional_blocks: bool = False
    block_origin: str = "zero"
    context: str = "block"
    seeded: bool = False
    mask_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    tied: bool = False
    sliding: str = "refused"
    draft_adapter: str | None = None
    prepare: Callable[[Config], Config] | None = None
    moe: Callable[[Config, int], MoeSizes] | None = None


def _head_dim(config: Config, hidden: int, heads: int, hidden_key: str, heads_key: str) -> int:
    if config.get("head_dim") is not None:
        return config.integer("head_dim")
    if hidden % heads:
        raise config.wrong(heads_key, f"a divisor of {hidden_key} {hidden} (or a head_dim)")
    return hidden // heads


def _check_heads(config: Config, sizes: Sizes, kv_key: str) -> Sizes:
    if sizes.heads % sizes.kv_heads:
        raise config.wrong(kv_key, f"a divisor of the {sizes.heads} heads")
    return sizes


def _llada_sizes(config: Config, family: Family) -> Sizes:
    config.only("block_type", "llama")
    config.only("layer_norm_type", "rms")
    config.only("activation_type", "silu")
    config.only("rope", True)
    config.only("block_group_size", 1)
    for key in ("alibi", "attention_layer_norm", "scale_logits", "input_emb_norm"):
        config.only(key, False)
    config.only("bias_for_layer_norm", False)
    if config.get("clip_qkv") is not None:
        raise config.wrong("clip_qkv", "none (clipping is not supported)")
    hidden, heads = config.integer("d_model"), config.integer("n_heads")
    vocab = config.integer("vocab_size")
    embeddings = config.integer("embedding_size", vocab)
    if embeddings < vocab:
        raise config.wrong("embedding_size", f"at least vocab_size {vocab}")
    bias = config.flag("include_bias")
    head_dim = _head_dim(config, hidden, heads, "d_model", "n_heads")
    sizes = Sizes(
        hidden=hidden,
        layers=config.integer("n_layers", limit=_LAYERS),
        heads=heads,
        kv_heads=config.integer("n_kv_heads", 1 if config.flag("multi_query_attention") else heads),
        head_dim=head_dim,
        intermediate=config.integer("mlp_hidden_size", hidden * config.integer("mlp_ratio", 4)),
        embeddings=embeddings,
        eps=config.number("rms_norm_eps"),
        rope=read_rope(config, head_dim),
        qkv_bias=bias or config.flag("include_qkv_bias"),
        out_bias=bias,
        mlp_bias=bias,
        head_bias=bias and not config.flag("weight_tying"),
        qk_norm=False,
        tied=config.flag("weight_tying"),
    )
    return _check_heads(config, sizes, "n_kv_heads")


def _llama_sizes(config: Config, family: Family) -> Sizes:
    config = config if family.prepare is None else family.prepare(config)
    config.only("hidden_act", "silu", "swish")
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = _head_dim(config, hidden, heads, "hidden_size", "num_attention_heads")
    layers = config.integer("num_hidden_layers", limit=_LAYERS)
    bias = config.flag("attention_bias") if family.qkv_bias is None else family.qkv_bias
    sizes = Sizes(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate=config.integer("intermediate_size"),
        embeddings=config.integer("vocab_size"),
        eps=config.number("rms_norm_eps"),
        rope=read_rope(config, head_dim),
        qkv_bias=bias,
        out_bias=bias and family.qkv_bias is None,
        mlp_bias=config.flag("mlp_bias"),
        head_bias=False,
        qk_norm=family.qk_norm,
        tied=config.flag("tie_word_embeddings", family.tied),
        query_scale=read_query_scale(config),
        sliding_windows=_sliding_windows(config, family, layers),
        moe=None if family.moe is None else family.moe(config, layers),
    )
    return _check_heads(config, sizes, "num_key_value_heads")


def _sliding_windows(config: Config, family: Family, layers: int) -> tuple[int | None, ...]:
    """Positions that a layer sees, itself included, or None; empty where no layer slides."""
    kinds = config.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list | tuple)
        or len(kinds) != layers
        or not all(kind in ("full_attention", "sliding_attention") for kind in kinds)
    ):
        raise config.wrong(
            "layer_types", f"'full_attention' or 'sliding_attention' for each of {layers} layers"
        )
    if family.sliding == "ignored":
        return ()
    if family.sliding == "always":
        on = config.get("sliding_window") is not None
    else:
        on = config.flag("use_sliding_window")
    if family.sliding == "refused":
        config.only("use_sliding_window", False)
    if not on or family.sliding == "refused":
        if kinds is not None and "sliding_attention" in kinds:
            raise config.wrong(
                "layer_types", "'full_attention' alone, since there is no sliding window"
            )
        return ()
    width = config.integer("sliding_window")
    if kinds is not None:
        slides = [kind == "sliding_attention" for kind in kinds]
    else:
        first = config.get("max_window_layers") if family.sliding == "flag" else 0
        if type(first) is not int or first < 0:
            raise config.wrong("max_window_layers", "a number of layers")
        slides = [layer >= first for layer in range(layers)]
    return tuple(width if slide else None for slide in slides) if any(slides) else ()


_LLAMA_LIKE = Family(LLAMA_NAMES, _llama_sizes, "causal")
_QWEN2 = replace(_LLAMA_LIKE, qkv_bias=True, sliding="flag")
_QWEN3 = replace(_LLAMA_LIKE, qk_norm=True, sliding="flag")
_MISTRAL = replace(_LLAMA_LIKE, sliding="always")
# Autoregressive models retrained with full attention, or (BD3LM) with blocks.
_A2D = {
    base: replace(
        family,
        attention="full",
        causal="masked",
        optional_blocks=True,
        block_origin="prompt",
        sliding="ignored",
    )
    for base, family in (("Llama", _LLAMA_LIKE), ("Qwen2", _QWEN2), ("Qwen3", _QWEN3))
}
_NEMOTRON = replace(
    _LLAMA_LIKE,
    names=_ENCODER,
    attention="block_causal",
    causal="shifted",
    block_origin="prompt",
    context="causal",
    seeded=True,
    draft_adapter="linear_spec_lora",
)
_LING = replace(
    _LLAMA_LIKE,
    names=_LLADA2,
    qkv_bias=False,
    qk_norm=True,
    sliding="ignored",
    prepare=llada2_config,
    moe=llada2_moe,
    eos_ids=(156892,),
)
_QWEN3_MOE = replace(
    _QWEN3, sliding="refused", qkv_bias=None, prepare=qwen_moe_config, moe=qwen_moe
)
FAMILIES = {
    "LLaDAModelLM": Family(_LLADA, _llada_sizes, "full"),
    "DreamModel": replace(_QWEN2, attention="full", shift_logits=True, sliding="ignored"),
    "SDARForCausalLM": replace(
        _QWEN3, attention="block_causal", causal="masked", sliding="refused"
    ),
    "Fast_dLLM_QwenForCausalLM": replace(
        _QWEN2,
        attention="block_causal",
        shift_logits=True,
        causal="shifted",
        block_key="bd_size",
        block_size=32,
        seeded=True,
        mask_id=151665,
        eos_ids=(151645,),
        sliding="ignored",
    ),
    "StableDiffcoderForCausalLM": replace(
        _LLAMA_LIKE, attention="block_causal", causal="masked", block_size=4, mask_id=5
    ),
    "NemotronLabsDiffusionModel": _NEMOTRON,
    "DiffEncoderModel": replace(_NEMOTRON, qk_norm=True),
    "CoDALanguageModel": replace(
        _QWEN3, attention="full", shift_logits=True, mask_id=151669, tied=True, sliding="ignored"
    ),
    "LLaDA2MoeModelLM": replace(_LING, attention="block_causal", block_size=32, mask_id=156895),
    "LLaDAMoEModelLM": replace(
        _LLAMA_LIKE,
        attention="full",
        qk_norm=True,
        prepare=llada_moe_config,
        moe=llada_moe,
        mask_id=156895,
        eos_ids=(156892,),
    ),
    "SDARMoeForCausalLM": replace(_QWEN3_MOE, attention="block_causal", causal="masked"),
    "RND1LM": replace(
        _QWEN3_MOE, attention="full", shift_logits=True, mask_id=151669, sliding="ignored"
    ),
    "BailingMoeV2ForCausalLM": _LING,
    "Qwen3MoeForCausalLM": _QWEN3_MOE,
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": _QWEN3,
    "LlamaForCausalLM": _LLAMA_LIKE,
    "MistralForCausalLM": _MISTRAL,
    "Ministral3ForCausalLM": _MISTRAL,
}
FAMILIES |= {f"A2D{base}*": family for base, family in _A2D.items()}
REGISTERED: dict[str, Family] = {}  # those of other packages: registry.py


def find_family(config: Config, *classes: str, quantized: bool = False) -> Family:
    """The family of the first class name that has one.

    Args:
        config: asked for what the family has not: experts, quantised weights.
        classes: class names, most specific first; without any, ``architectures`` is read.
        quantized: the caller deals with quantised weights.
    """
    names = classes or config.get("architectures")
    if not isinstance(names, list | tuple) or not names:
        raise config.wrong("architectures", "a list with the name of the model's class")
    if not quantized and config.get("quantization_config") is not None:
        raise config.wrong(
            "quantization_config",
            "none (quantised weights are not supported; pydllm.patch(module) speeds up a module)",
        )
    for name in names:
        for pattern, family in (FAMILIES | REGISTERED).items():
            if fnmatchcase(str(name), pattern):
                experts = has_experts(config)
                if experts is not None and family.moe is None:
                    raise config.wrong(experts, f"none ({name} has no experts)")
                return family
    known = ", ".join(sorted(FAMILIES | REGISTERED))
    raise CheckpointError(
        f"{config.where}: architectures: expected one of {known}, found {names[0]!r} "
        "(pydllm.register_family adds a class; pydllm.patch(module) speeds up other modules)"
    )
