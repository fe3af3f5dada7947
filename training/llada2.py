"""Train LLaDA2's mixture of experts: ``python -m training.llada2 --out out/llada2-tiny``.

Plain PyTorch, block-causal, on the task and tokenizer of the LLaDA model. The experts of a layer
are the rows of one matrix while they are trained: every row computes all of them and weighs those
that it was not routed to with 0. The checkpoint has them one by one, under LLaDA2's names.

``--init`` takes a dense model in SDAR's layout. Its MLP becomes the experts of a layer, each with a
slice of the inner columns.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from pydllm.demo.task import vocabulary
from training.llada import (
    EOS,
    MASK,
    PAD,
    _rotate,
    cross_entropy,
    hide_names,
    run_training,
    save_weights,
    training_options,
)
from training.qwen import BLOCK, draw_batch, needed, two_streams

CONFIG: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "vocab_size": len(vocabulary()),
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "use_qkv_bias": False,
    "use_bias": False,
    "use_qk_norm": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "norm_head": False,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
    "block_size": BLOCK,
    "mask_token_id": MASK,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_BALANCE = 1e-3  # what a step adds to the bias of an expert with too few rows


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, self.head_dim = config["hidden_size"], config["head_dim"]
        rows = config["num_attention_heads"] * self.head_dim
        self.query_key_value = nn.Linear(width, 3 * rows, bias=False)
        self.dense = nn.Linear(rows, width, bias=False)
        self.query_layernorm = nn.RMSNorm(self.head_dim, config["rms_norm_eps"])
        self.key_layernorm = nn.RMSNorm(self.head_dim, config["rms_norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.query_key_value(x).chunk(3, -1)
        )
        q = _rotate(self.query_layernorm(q), cos, sin)
        k = _rotate(self.key_layernorm(k), cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.dense(attended.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x) * scale)


class Router(nn.Module):
    expert_bias: Tensor

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, width) * width**-0.5)
        self.register_buffer("expert_bias", torch.zeros(experts))


class MixtureOfExperts(nn.Module):
    """Sigmoid scores; a bias that chooses experts and does not weigh them; groups of experts.

    Attributes:
        load: rows of the last forward that each expert got.
    """

    load: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, self.count = config["hidden_size"], config["num_experts"]
        self.top_k, self.scale = config["num_experts_per_tok"], config["routed_scaling_factor"]
        self.groups, self.topk_groups = config["n_group"], config["topk_group"]
        self.inner = config["moe_intermediate_size"]
        self.gate = Router(width, self.count)
        self.experts = MLP(width, self.count * self.inner)
        self.shared_experts = MLP(width, config["num_shared_experts"] * self.inner)

    def weights(self, x: Tensor) -> Tensor:
        """Weights ``(..., experts)``; 0 for the experts that a row is not routed to."""
        scores = F.linear(x, self.gate.weight).sigmoid()
        choice = (scores + self.gate.expert_bias).detach().unflatten(-1, (self.groups, -1))
        best = choice.topk(2).values.sum(-1).topk(self.topk_groups).indices
        outside = torch.ones_like(choice[..., 0], dtype=torch.bool).scatter(-1, best, False)
        choice = choice.masked_fill(outside[..., None], -torch.inf).flatten(-2)
        ids = choice.topk(self.top_k).indices
        self.load = ids.flatten().bincount(minlength=self.count)
        chosen = scores.gather(-1, ids)
        chosen = chosen / chosen.sum(-1, keepdim=True) * self.scale
        return torch.zeros_like(scores).scatter(-1, ids, chosen)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weights(x).repeat_interleave(self.inner, -1)
        return self.experts(x, scale) + self.shared_experts(x)

    def balance(self) -> None:
        """Move the bias of each expert towards an equal load, as LLaDA2's parents were trained."""
        load = self.load.float()
        self.gate.expert_bias += _BALANCE * (load.mean() - load).sign()


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any], *, sparse: bool) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = nn.RMSNorm(width, eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(width, eps)
        dense = MLP(width, config["intermediate_size"])
        self.mlp = MixtureOfExperts(config) if sparse else dense

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), cos, sin, visible)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyLLaDA2(nn.Module):
    """A LLaDA2 of the bundled size, differentiable."""

    def __init__(self, config: dict[str, Any] = CONFIG) -> None:
        super().__init__()
        self.config, width = config, config["hidden_size"]
        dense = config["first_k_dense_replace"]
        layers = [
            Layer(config, sparse=index >= dense) for index in range(config["num_hidden_layers"])
        ]
        modules = {
            "word_embeddings": nn.Embedding(config["vocab_size"], width),
            "layers": nn.ModuleList(layers),
            "norm": nn.RMSNorm(width, config["rms_norm_eps"]),
        }
        self.model = nn.ModuleDict(modules)
        self.lm_head = nn.Linear(width, config["vocab_size"], bias=False)

    def forward(self, ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Logits ``(B, S, V)`` of ``ids (B, S)`` at ``positions (1, S)``."""
        model: Any = self.model
        size = self.config["head_dim"]
        angles = positions[..., None] * self.config["rope_theta"] ** (
            -torch.arange(0, size, 2, dtype=torch.float64) / size
        )
        cos, sin = angles.cos().float(), angles.sin().float()
        x = model["word_embeddings"](ids)
        for layer in model["layers"]:
            x = layer(x, cos, sin, visible)
        return self.lm_head(model["norm"](x))

    def mixtures(self) -> list[MixtureOfExperts]:
        return [module for module in self.modules() if isinstance(module, MixtureOfExperts)]


def checkpoint_weights(model: TinyLLaDA2) -> dict[str, Tensor]:
    """The tensors of LLaDA2's checkpoint: the experts one by one."""
    inner = model.config["moe_intermediate_size"]
    weights = {}
    for name, value in model.state_dict().items():
        at, _, projection = name.partition(".mlp.experts.")
        if not projection:
            weights[name] = value
            continue
        parts = value.split(inner, dim=1 if projection.startswith("down") else 0)
        for expert, part in enumerate(parts):
            weights[f"{at}.mlp.experts.{expert}.{projection}"] = part
    return weights


def start_from(model: TinyLLaDA2, parent: Path) -> None:
    """Take over a dense model in SDAR's layout and the same vocabulary; shared experts add zero.

    Raises:
        click.UsageError: the parent's tensors are not those of such a model.
    """
    names = {
        name.replace("model.embed_tokens.", "model.word_embeddings.")
        .replace("self_attn.o_proj.", "attention.dense.")
        .replace("self_attn.q_norm.", "attention.query_layernorm.")
        .replace("self_attn.k_norm.", "attention.key_layernorm."): value.float()
        for name, value in load_file(parent / "model.safetensors").items()
    }
    layers: Any = model.model["layers"]
    for index, layer in enumerate(layers):
        at = f"model.layers.{index}."
        qkv = [f"{at}self_attn.{part}_proj.weight" for part in "qkv"]
        if names.keys().isdisjoint(qkv):
            raise click.UsageError(f"--init {parent}: expected SDAR's layout, lacks {qkv[0]}")
        names[f"{at}attention.query_key_value.weight"] = torch.cat([*map(names.pop, qkv)])
        if isinstance(layer.mlp, MixtureOfExperts):
            for name in ("gate", "up", "down"):
                slices = names.pop(f"{at}mlp.{name}_proj.weight")
                names[f"{at}mlp.experts.{name}_proj.weight"] = slices
            nn.init.zeros_(layer.mlp.shared_experts.down_proj.weight)
    missing, unexpected = model.load_state_dict(names, strict=False)
    new = [name for name in missing if ".mlp.gate." not in name and "shared_experts" not in name]
    if new or unexpected:
        raise click.UsageError(
            f"--init {parent}: expected a model in the layout of SDAR, lacks {new or 'nothing'}, "
            f"has {unexpected or 'nothing'} that does not belong"
        )


def denoising_loss(model: TinyLLaDA2, size: int, seed: int) -> Callable[[int], Tensor]:
    """Cross-entropy of masked answer tokens, each block seeing itself and the clean ones before.

    A call balances the experts by the load of the one before.
    """

    def loss_of(step: int) -> Tensor:
        ids, is_answer, first = needed(*draw_batch(size, seed, step), BLOCK)
        first -= first % BLOCK
        noise = torch.Generator().manual_seed(seed * 1_000_003 + step)
        # One mask ratio per block and sample.
        ratio = torch.rand(size, ids.shape[1] // BLOCK, generator=noise).repeat_interleave(BLOCK, 1)
        masked = is_answer & (torch.rand(ids.shape, generator=noise) < ratio)
        masked = hide_names(ids, masked, noise)
        masked |= is_answer & ~masked.any(1, keepdim=True)
        block = (torch.arange(ids.shape[1]) // BLOCK)[None]
        logits = model(*two_streams(ids, masked, block, first))
        for mixture in model.mixtures():
            mixture.balance()
        noisy = logits[:, : ids.shape[1] - first]
        return cross_entropy(noisy[masked[:, first:]], ids[masked])

    return loss_of


@click.command()
@training_options(
    "Dense checkpoint in SDAR's layout to start from.", steps=2000, learning_rate=2e-3
)
def main(
    out: Path,
    parent: Path | None,
    steps: int,
    batch_size: int,
    seed: int,
    learning_rate: float,
    threads: int | None,
) -> None:
    """Train the mixture of experts; run the same command again to resume."""
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = TinyLLaDA2()
    if parent is not None:
        start_from(model, parent)
    run_training(model, denoising_loss(model, batch_size, seed), steps, learning_rate, out)
    save_weights(checkpoint_weights(model), CONFIG, out)


if __name__ == "__main__":
    main()
