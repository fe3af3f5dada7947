"""Small modules with the names, attributes and signatures of published models, written for tests.

Only what a patch sees is theirs; widths, caches and feed-forward layers are as simple as can be.
"""

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, KV_HEADS, DIM, VOCAB = 32, 4, 2, 8, 41


def scaled_dot_product_attention(
    q, k, v, mask=None, attn_mask=None, dropout_p=0.0, is_causal=False
):
    """Fast-dLLM's own function of this name; there it is compiled."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal)


def repeat_kv(states, n):
    return states.repeat_interleave(n, dim=1)


def turn(x):
    """Half-split rotation by position, so that orders of keys matter."""
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / 10 ** torch.arange(DIM // 2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


class RMSLayerNorm(nn.Module):
    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.eps, self.bias, self.weight = eps, None, nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class DreamRMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.variance_epsilon, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, hidden_states):
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


class GemmaRMSNorm(DreamRMSNorm):
    """Looks like an RMS norm and is another."""

    def forward(self, hidden_states):
        return super().forward(hidden_states) + hidden_states * 0.1


class DreamMLP(nn.Module):
    def __init__(self, act=F.silu):
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, 48, bias=False)
        self.up_proj = nn.Linear(WIDTH, 48, bias=False)
        self.down_proj = nn.Linear(48, WIDTH, bias=False)
        self.act_fn = act

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def heads(x, count):
    return x.unflatten(-1, (count, DIM)).transpose(1, 2)


class LLaDALlamaBlock(nn.Module):
    def __init__(self, kv_heads=KV_HEADS):
        super().__init__()
        self.kv_heads, self.flash_attn_func = kv_heads, None
        self.attn_norm, self.ff_norm = RMSLayerNorm(WIDTH), RMSLayerNorm(WIDTH)
        self.q_proj = nn.Linear(WIDTH, HEADS * DIM, bias=False)
        self.k_proj = nn.Linear(WIDTH, kv_heads * DIM, bias=False)
        self.v_proj = nn.Linear(WIDTH, kv_heads * DIM, bias=False)
        self.attn_out = nn.Linear(HEADS * DIM, WIDTH, bias=False)

    def _scaled_dot_product_attention(
        self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False
    ):
        k, v = (repeat_kv(t, HEADS // self.kv_heads) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)

    def forward(self, x, attention_mask, cache):
        normed = self.attn_norm(x)
        q, k, v = (
            heads(part(normed), count)
            for part, count in (
                (self.q_proj, HEADS),
                (self.k_proj, self.kv_heads),
                (self.v_proj, self.kv_heads),
            )
        )
        if cache is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(cache, (k, v), strict=True))
        bias = attention_mask
        if bias is not None and bias.ndim == 2:  # a new view in every layer, as theirs
            bias = bias[:, None, None, :].expand(-1, 1, q.shape[2], -1)
            bias = torch.zeros(bias.shape).masked_fill(bias == 0, torch.finfo(q.dtype).min)
            bias = bias[:, :, : q.shape[2]]
        y = self._scaled_dot_product_attention(q, turn(k), v, attn_mask=bias, dropout_p=0.0)
        return x + self.attn_out(self.ff_norm(y.transpose(1, 2).contiguous().flatten(2)))


class FastdLLMLLaDALlamaBlock(LLaDALlamaBlock):
    """With one more argument, and a function of its module."""

    def _scaled_dot_product_attention(
        self, q, k, v, mask=None, attn_mask=None, dropout_p=0.0, is_causal=False
    ):
        k, v = (repeat_kv(t, HEADS // self.kv_heads) for t in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)


class DreamSdpaAttention(nn.Module):
    def __init__(self, kv_heads=KV_HEADS):
        super().__init__()
        self.kv_heads, self.num_key_value_groups = kv_heads, HEADS // kv_heads
        self.q_proj = nn.Linear(WIDTH, HEADS * DIM)
        self.k_proj = nn.Linear(WIDTH, kv_heads * DIM)
        self.v_proj = nn.Linear(WIDTH, kv_heads * DIM)
        self.o_proj = nn.Linear(HEADS * DIM, WIDTH, bias=False)

    def states(self, x, cache):
        q, k, v = (
            heads(part(x), count)
            for part, count in (
                (self.q_proj, HEADS),
                (self.k_proj, self.kv_heads),
                (self.v_proj, self.kv_heads),
            )
        )
        if cache is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(cache, (k, v), strict=True))
        return q, turn(k), v

    def forward(self, hidden_states, attention_mask=None, past_key_value=None):
        q, k, v = self.states(hidden_states, past_key_value)
        k, v = (repeat_kv(t, self.num_key_value_groups) for t in (k, v))
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None
        y = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False
        )
        return self.o_proj(y.transpose(1, 2).contiguous().flatten(2)), None, past_key_value


class SDARAttention(DreamSdpaAttention):
    """Keys with their own heads go to SDPA; the mask says 1 for visible."""

    def forward(self, hidden_states, attention_mask=None, past_key_value=None, store_kv=False):
        q, k, v = self.states(hidden_states, past_key_value)
        mask = None if attention_mask is None else attention_mask.bool()
        y = F.scaled_dot_product_attention(
            query=q, key=k, value=v, attn_mask=mask, scale=DIM**-0.5, enable_gqa=True
        )
        return self.o_proj(y.transpose(1, 2).flatten(2)), None, past_key_value


class LLaDAMoESdpaAttention(DreamSdpaAttention):
    def forward(self, hidden_states, attention_mask=None, past_key_value=None):
        q, k, v = self.states(hidden_states, past_key_value)
        k, v = (repeat_kv(t, self.num_key_value_groups) for t in (k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self.o_proj(y.transpose(1, 2).contiguous().flatten(2)), None, past_key_value


def sdpa(module, q, k, v, attention_mask, dropout=0.0, scaling=None, is_causal=None, **_):
    k, v = (repeat_kv(t, module.num_key_value_groups) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, attention_mask, scale=scaling)
    return y.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS = {"sdpa": sdpa}


class Fast_dLLM_QwenAttention(DreamSdpaAttention):
    def forward(self, hidden_states, attention_mask=None, past_key_value=None):
        q, k, v = self.states(hidden_states, past_key_value)
        y, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
            self, q, k, v, attention_mask, is_causal=False, dropout=0.0, scaling=DIM**-0.5
        )
        return self.o_proj(y.flatten(2)), None, past_key_value


def deep(q, k, v, mask):
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


class UnheardOfAttention(DreamSdpaAttention):
    """A variant that nobody knows, and whose forward does not say SDPA."""

    def forward(self, hidden_states, attention_mask=None, past_key_value=None):
        q, k, v = self.states(hidden_states, past_key_value)
        k, v = (repeat_kv(t, self.num_key_value_groups) for t in (k, v))
        y = deep(q, k, v, attention_mask)
        return self.o_proj(y.transpose(1, 2).contiguous().flatten(2)), None, past_key_value


class EagerAttention(DreamSdpaAttention):
    """One that computes its softmax itself."""

    def forward(self, hidden_states, attention_mask=None, past_key_value=None):
        q, k, v = self.states(hidden_states, past_key_value)
        k, v = (repeat_kv(t, self.num_key_value_groups) for t in (k, v))
        scores = q @ k.mT * DIM**-0.5
        y = scores.softmax(-1) @ v
        return self.o_proj(y.transpose(1, 2).contiguous().flatten(2)), None, past_key_value


class Layer(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.self_attn, self.mlp = attention(), DreamMLP()
        self.input_layernorm, self.post_attention_layernorm = (
            DreamRMSNorm(WIDTH),
            DreamRMSNorm(WIDTH),
        )

    def forward(self, x, attention_mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), attention_mask, cache)[0]
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """Two layers of a kind between an embedding and a head."""

    def __init__(self, layer, seed=0):
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.layers = nn.ModuleList(layer() for _ in range(2))
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            nn.init.normal_(p, std=0.25, mean=float(p.ndim == 1), generator=generator)
        self.eval()

    def forward(self, ids, attention_mask=None, caches=(None, None)):
        x = self.embed_tokens(ids)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, attention_mask, cache)
        return self.lm_head(x)


def of(attention):
    """A model maker: blocks stand for a layer, attention modules are put into one."""
    if attention.__name__.endswith("Block"):
        return lambda **options: Model(attention, **options)
    return lambda **options: Model(lambda: Layer(attention), **options)


KINDS = {
    kind.__name__: kind
    for kind in (
        LLaDALlamaBlock,
        FastdLLMLLaDALlamaBlock,
        DreamSdpaAttention,
        SDARAttention,
        LLaDAMoESdpaAttention,
        Fast_dLLM_QwenAttention,
        UnheardOfAttention,
    )
}
