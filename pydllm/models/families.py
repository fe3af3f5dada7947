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
from pydllm.models.spec import ModelSpec

Shape = tuple[int, ...]


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
_LLAMA = Names(
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
    rope_theta: float
    rotary: int  # leading dimensions of a head that rotate
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_bias: bool
    qk_norm: bool
    tied: bool


@dataclass(frozen=True)
class Family:
    """One row of the table below.

    Attributes:
        qkv_bias: q, k and v have biases and nothing else has; None: as ``attention_bias`` says.
    """

    names: Names
    sizes: Callable[[Config, Family], Sizes]
    attention: str
    shift_logits: bool = False
    qkv_bias: bool | None = None
    qk_norm: bool = False


def _head_dim(config: Config, hidden: int, heads: int, hidden_key: str, heads_key: str) -> int:
    if config.get("head_dim") is not None:
        return config.integer("head_dim")
    if hidden % heads:
        raise config.wrong(heads_key, f"a divisor of {hidden_key} {hidden} (or a head_dim)")
    return hidden // heads


def _check_heads(config: Config, sizes: Sizes, kv_key: str) -> Sizes:
    if sizes.heads % sizes.kv_heads:
        raise config.wrong(kv_key, f"a divisor of the {sizes.heads} heads")
    if sizes.rotary % 2 or not 0 < sizes.rotary <= sizes.head_dim:
        raise CheckpointError(
            f"{config.where}: expected an even number of rotary dimensions, at most the head size "
            f"{sizes.head_dim}, found {sizes.rotary}"
        )
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
        layers=config.integer("n_layers"),
        heads=heads,
        kv_heads=config.integer("n_kv_heads", 1 if config.flag("multi_query_attention") else heads),
        head_dim=head_dim,
        intermediate=config.integer("mlp_hidden_size", hidden * config.integer("mlp_ratio", 4)),
        embeddings=embeddings,
        eps=config.number("rms_norm_eps"),
        rope_theta=config.number("rope_theta"),
        rotary=head_dim,
        qkv_bias=bias or config.flag("include_qkv_bias"),
        out_bias=bias,
        mlp_bias=bias,
        head_bias=bias and not config.flag("weight_tying"),
        qk_norm=False,
        tied=config.flag("weight_tying"),
    )
    return _check_heads(config, sizes, "n_kv_heads")


def _llama_sizes(config: Config, family: Family) -> Sizes:
    config.only("hidden_act", "silu", "swish")
    config.only("use_sliding_window", False)
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise CheckpointError(
            f"{config.where}: layer_types: expected 'full_attention' alone, found {min(kinds)!r}"
        )
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = _head_dim(config, hidden, heads, "hidden_size", "num_attention_heads")
    theta, factor = _rope(config)
    bias = config.flag("attention_bias") if family.qkv_bias is None else family.qkv_bias
    sizes = Sizes(
        hidden=hidden,
        layers=config.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate=config.integer("intermediate_size"),
        embeddings=config.integer("vocab_size"),
        eps=config.number("rms_norm_eps"),
        rope_theta=theta,
        rotary=int(head_dim * factor),
        qkv_bias=bias,
        out_bias=bias and family.qkv_bias is None,
        mlp_bias=config.flag("mlp_bias"),
        head_bias=False,
        qk_norm=family.qk_norm,
        tied=config.flag("tie_word_embeddings"),
    )
    return _check_heads(config, sizes, "num_key_value_heads")


def _rope(config: Config) -> tuple[float, float]:
    """Base and rotating fraction: at the top level, or nested as transformers 5 writes them."""
    sections = [config.section("rope_parameters"), config.section("rope_scaling"), config]
    for section in sections[:2]:
        for key in ("rope_type", "type"):
            section.only(key, "default")
    with_theta = next((s for s in sections if s.get("rope_theta") is not None), config)
    with_factor = next((s for s in sections if s.get("partial_rotary_factor") is not None), None)
    factor = 1.0 if with_factor is None else with_factor.number("partial_rotary_factor")
    return with_theta.number("rope_theta"), factor


_QWEN2 = Family(_LLAMA, _llama_sizes, "causal", qkv_bias=True)
_QWEN3 = Family(_LLAMA, _llama_sizes, "causal", qk_norm=True)
FAMILIES = {
    "LLaDAModelLM": Family(_LLADA, _llada_sizes, "full"),
    "DreamModel": replace(_QWEN2, attention="full", shift_logits=True),
    "SDARForCausalLM": replace(_QWEN3, attention="block_causal"),
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": _QWEN3,
    "LlamaForCausalLM": Family(_LLAMA, _llama_sizes, "causal"),
}
# Autoregressive models retrained with full attention: A2DQwen2LMHeadModel and the like.
FAMILIES |= {
    f"A2D{base}*": replace(FAMILIES[f"{base}ForCausalLM"], attention="full")
    for base in ("Llama", "Qwen2", "Qwen3")
}


def find_family(config: Config, *classes: str) -> Family:
    """The family of the first class name that has one.

    Args:
        config: asked for what no family has: experts, quantised weights.
        classes: class names, most specific first; without any, ``architectures`` is read.
    """
    names = classes or config.get("architectures")
    if not isinstance(names, list | tuple) or not names:
        raise config.wrong("architectures", "a list with the name of the model's class")
    if any("moe" in str(name).lower() for name in names):
        raise CheckpointError(f"{config.where}: {names[0]}: mixtures of experts are not supported")
    for key in ("num_experts", "n_routed_experts", "num_local_experts"):
        if config.get(key):
            raise config.wrong(key, "none (mixtures of experts are not supported)")
    if config.get("quantization_config") is not None:
        raise config.wrong("quantization_config", "none (quantised weights are not supported)")
    for name in names:
        for pattern, family in FAMILIES.items():
            if fnmatchcase(str(name), pattern):
                return family
    raise CheckpointError(
        f"{config.where}: architectures: expected one of {', '.join(sorted(FAMILIES))}, "
        f"found {names[0]!r}"
    )


def make_spec(config: Config, family: Family, sizes: Sizes, mask_id: int | None) -> ModelSpec:
    """The model's facts. ``mask_id`` is taken where the configuration names none."""
    vocab = config.integer("vocab_size")
    masks = config.ids("mask_token_id", sizes.embeddings) or (mask_id,)
    if family.attention == "causal":
        masks = (None,)
    elif masks[0] is None:
        raise config.wrong("mask_token_id", "the id of the mask token")
    pads = config.ids("pad_token_id", sizes.embeddings)
    long = "max_sequence_length" if family.names is _LLADA else "max_position_embeddings"
    return ModelSpec(
        vocab_size=vocab,
        mask_id=masks[0],
        eos_ids=config.ids("eos_token_id", sizes.embeddings),
        shift_logits=family.shift_logits,
        attention=family.attention,
        block_size=config.integer("block_size") if family.attention == "block_causal" else None,
        max_positions=config.integer(long),
        pad_id=pads[0] if pads else None,
    )
