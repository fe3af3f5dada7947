"""Mixtures of experts: what configurations say of them, and the tensors of their layers.

Two lines share one layer. LLaDA2 and Ling: sigmoid scores with a bias that chooses and does not
weigh, groups or block pools, a shared expert. SDAR-MoE, RND1, Qwen3-MoE, LLaDA-MoE: softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydllm.models.config import Config

Shape = tuple[int, ...]
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
MOST_EXPERTS = 4096  # far above any model; a configuration is read before its weights


@dataclass(frozen=True)
class MoeSizes:
    """The expert layers of a model.

    Attributes:
        experts, top_k: experts of a layer, and of a row.
        width: inner columns of an expert.
        shared: inner columns of the shared expert; 0: there is none.
        sparse: for each layer, whether it has experts instead of one MLP.
        score, renormalize, scale, groups, topk_groups, capacity, block_size: as in ``ops.route``.
        held: the experts whose weights this process has (expert parallel); None: all of them.
    """

    experts: int
    top_k: int
    width: int
    shared: int
    sparse: tuple[bool, ...]
    score: str
    renormalize: bool
    scale: float = 1.0
    groups: int = 1
    topk_groups: int = 1
    capacity: int | None = None
    block_size: int | None = None
    held: range | None = None

    @property
    def stored(self) -> int:
        """How many experts' weights this process has."""
        return self.experts if self.held is None else len(self.held)

    @property
    def sigmoid(self) -> bool:
        return self.score == "sigmoid"


def has_experts(config: Config) -> str | None:
    """The key by which a configuration says that it has experts, if it does."""
    return next((key for key in _COUNTS if config.get(key)), None)


def _experts(config: Config) -> tuple[int, int]:
    """Experts of a layer and of a row."""
    keys = [key for key in _COUNTS if config.get(key) is not None] or [_COUNTS[0]]
    counts = {config.integer(key, limit=MOST_EXPERTS) for key in keys}
    if len(counts) > 1:
        raise config.wrong(keys[1], f"{config.integer(keys[0])} as {keys[0]} says")
    count = counts.pop()
    top_k = config.integer("num_experts_per_tok")
    if top_k > count:
        raise config.wrong("num_experts_per_tok", f"at most the {count} experts")
    return count, top_k


def _layer_count(config: Config, key: str, layers: int) -> int:
    """A number of layers that may be 0."""
    value = 0 if config.get(key) is None else config.get(key)
    if type(value) is not int or not 0 <= value <= layers:
        raise config.wrong(key, f"an integer in [0, {layers}]")
    return value


def llada2_config(config: Config) -> Config:
    """LLaDA2's and Ling's configuration with what their classes do where a key is absent.

    Raises:
        CheckpointError: a key that the forward does not have, or two that contradict each other.
    """
    for key in ("use_bias", "use_qkv_bias", "norm_head", "use_sliding_window"):
        config.only(key, False)
    for key in ("norm_topk_prob", "moe_router_enable_expert_bias", "use_qk_norm", "use_rmsnorm"):
        config.only(key, True)
    config.only("score_function", "sigmoid")
    if config.get("num_nextn_predict_layers"):
        raise config.wrong("num_nextn_predict_layers", "0 (multi-token prediction is not read)")
    nested = config.section("rope_parameters").get("partial_rotary_factor") is not None
    if config.get("partial_rotary_factor") is None and not nested:
        share = 0.5
        if config.get("rotary_dim") is not None and config.get("head_dim") is not None:
            share = config.integer("rotary_dim") / config.integer("head_dim")
        return config.replaced(partial_rotary_factor=share)
    if config.get("rotary_dim") is not None and not nested:
        rotary = int(config.integer("head_dim") * config.number("partial_rotary_factor"))
        if config.get("rotary_dim") != rotary:
            raise config.wrong("rotary_dim", f"{rotary} as partial_rotary_factor says")
    return config


def llada2_moe(config: Config, layers: int) -> MoeSizes:
    """LLaDA2.0, 2.1, 2.2, and their autoregressive parents."""
    experts, top_k = _experts(config)
    width = config.integer("moe_intermediate_size")
    shared = config.get("num_shared_experts") or 0
    if type(shared) is not int or shared < 0:
        raise config.wrong("num_shared_experts", "an integer of at least 0")
    dense = _layer_count(config, "first_k_dense_replace", layers)
    capacity = None
    groups, topk_groups = config.integer("n_group", 8), config.integer("topk_group", 4)
    if config.get("expert_capacity") is not None:
        capacity = config.integer("expert_capacity")
        if not top_k <= capacity <= experts:
            raise config.wrong("expert_capacity", f"{top_k} to {experts} experts")
        groups = topk_groups = 1
    if experts % groups or (groups > 1 and experts // groups < 2):
        raise config.wrong("n_group", f"a divisor of {experts} experts, at least 2 in each group")
    if topk_groups > groups or top_k > topk_groups * (experts // groups):
        raise config.wrong("topk_group", f"1 to {groups} groups that hold {top_k} experts")
    return MoeSizes(
        experts=experts,
        top_k=top_k,
        width=width,
        shared=shared * config.integer("moe_shared_expert_intermediate_size", width),
        sparse=tuple(layer >= dense for layer in range(layers)),
        score="sigmoid",
        renormalize=top_k > 1,
        scale=config.number("routed_scaling_factor"),
        groups=groups,
        topk_groups=topk_groups,
        capacity=capacity,
        block_size=None if capacity is None else config.integer("block_size", 32),
    )


def llada_moe_config(config: Config) -> Config:
    """LLaDA-MoE's configuration in the words of Llama's; refuses what its code would ignore."""
    config.only("qk_layernorm", True)
    config.only("moe_router_score_function", "softmax")
    config.only("moe_router_enable_expert_bias", False)
    config.only("norm_topk_prob", False)
    config.only("routed_scaling_factor", 1, 1.0)
    for key in ("clip_qkv", "shared_expert_intermediate_size"):
        if config.get(key) is not None:
            raise config.wrong(key, "none (it is not supported)")
    for key in ("router_num_group", "router_topk_group"):
        config.only(key, 0, 1)
    share = config.get("partial_rotary_factor")
    if isinstance(share, int | float) and not isinstance(share, bool) and share <= 0:
        config = config.replaced(partial_rotary_factor=1.0)  # the class's default is -1
    dense = config.integer("dense_intermediate_size", config.integer("expert_intermediate_size"))
    return config.replaced(intermediate_size=dense)


def llada_moe(config: Config, layers: int) -> MoeSizes:
    experts, top_k = _experts(config)
    kinds = config.get("moe_layer_freq")
    if kinds is None:
        kinds = [1] * layers
    fits = isinstance(kinds, list | tuple) and len(kinds) == layers
    if not fits or not all(type(kind) is int and kind in (0, 1) for kind in kinds):
        raise config.wrong("moe_layer_freq", f"0 or 1 for each of {layers} layers")
    return MoeSizes(
        experts=experts,
        top_k=top_k,
        width=config.integer("expert_intermediate_size"),
        shared=0,
        sparse=tuple(kind == 1 for kind in kinds),
        score="softmax",
        renormalize=False,
    )


def qwen_moe_config(config: Config) -> Config:
    """Qwen3-MoE's configuration; some files have a JSON false where they mean null."""
    if config.get("shared_expert_intermediate_size"):
        raise config.wrong("shared_expert_intermediate_size", "none (it is not supported)")
    absent = [key for key in ("rope_scaling", "sliding_window") if config.get(key) is False]
    return config.replaced(**dict.fromkeys(absent))


def qwen_moe(config: Config, layers: int) -> MoeSizes:
    """SDAR-MoE, RND1, Qwen3-MoE."""
    experts, top_k = _experts(config)
    step, dense = config.integer("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(dense, list | tuple) or not all(
        type(layer) is int and 0 <= layer < layers for layer in dense
    ):
        raise config.wrong("mlp_only_layers", f"numbers of layers in [0, {layers})")
    return MoeSizes(
        experts=experts,
        top_k=top_k,
        width=config.integer("moe_intermediate_size"),
        shared=0,
        sparse=tuple(i not in dense and (i + 1) % step == 0 for i in range(layers)),
        score="softmax",
        renormalize=config.flag("norm_topk_prob"),
    )


def expert_tensors(
    source: str, hidden: int, moe: MoeSizes
) -> Iterator[tuple[str, tuple[tuple[str, Shape], ...], bool]]:
    """The tensors of an expert layer: slot, sources stacked along dimension 0, and whether wide.

    A wide tensor is fp32 whatever the model's dtype. ``gate_up`` is ``(experts, 2 width, hidden)``
    flattened to two dimensions, ``down`` ``(experts, hidden, width)``.
    """

    def gate_up(prefix: str, width: int) -> list[tuple[str, Shape]]:
        return [(f"{prefix}{name}_proj.weight", (width, hidden)) for name in ("gate", "up")]

    experts = [f"{source}mlp.experts.{expert}." for expert in range(moe.experts)]
    yield "router", ((f"{source}mlp.gate.weight", (moe.experts, hidden)),), moe.sigmoid
    if moe.sigmoid:
        yield "router_bias", ((f"{source}mlp.gate.expert_bias", (moe.experts,)),), True
    halves = [half for prefix in experts for half in gate_up(prefix, moe.width)]
    yield "gate_up", tuple(halves), False
    down = [(f"{prefix}down_proj.weight", (hidden, moe.width)) for prefix in experts]
    yield "down", tuple(down), False
    if moe.shared:
        prefix = f"{source}mlp.shared_experts."
        yield "shared_gate_up", tuple(gate_up(prefix, moe.shared)), False
        yield "shared_down", ((f"{prefix}down_proj.weight", (hidden, moe.shared)),), False
