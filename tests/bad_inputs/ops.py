"""The ops."""

import torch

from pydllm import ops
from tests.bad_inputs import Case

INT32 = torch.int32


def at(*values):
    return torch.tensor(values, dtype=INT32)


def window(**more):
    def make():
        usual = {"x": torch.zeros(2, 6, dtype=torch.int64), "mask_id": 0, "start": at(1, 1)}
        usual |= {"length": at(3, 3), "token": torch.ones(2, 4, dtype=torch.int64)}
        usual |= {"score": torch.rand(2, 4)}
        return usual | {name: value() for name, value in more.items()}

    return make


def written():
    return {"step_map": lambda: torch.full((2, 6), -1).int(), "nfe": lambda: at(0, 0)}


def attention(heads=True):
    def make():
        k = torch.randn(2, 4, 1, 8)
        usual = {"k": k, "v": k.clone(), "start": at(1, 1), "commit": at(2, 2)}
        usual |= {name: torch.zeros(2, 8, 1, 8) for name in ("k_cache", "v_cache")}
        usual |= {"cos": torch.ones(8, 4), "sin": torch.zeros(8, 4), "eps": 1e-6, "branches": 2}
        if not heads:
            return usual | {"branch": at(1, 1)}
        usual |= {"q": k.clone(), "length": at(2, 2), "kv_len": at(5, 5), "causal": False}
        return usual | {"block_size": 2, "window": 3, "softcap": 5.0, "scale": 0.5}

    return make


def row_statistics(**more):
    def make():
        usual = {"rows": at(0, 1), "suppress_ids": at(1), "counter": torch.zeros(2, 3, dtype=INT32)}
        usual |= {"temperature": 1.0, "seed": 1, "softcap": 5.0, "tempered": True}
        return usual | {name: value() for name, value in more.items()}

    return make


def mixture():
    logits = torch.randn(4, 5)
    usual = {"logits": logits, "verifier_logits": logits.clone(), "length": at(2, 2)}
    usual |= {"token": torch.ones(4, dtype=torch.int64), "mixture": 0.5, "temperature": 1.0}
    usual |= {"counter": torch.zeros(4, 3, dtype=INT32), "critical": True, "emit": "draft"}
    return usual | {"shared_vocab": 4, "threshold": torch.zeros(4), "seed": 1}


def multiblock():
    x = torch.zeros(2, 10, dtype=torch.int64)
    usual = {"x": x, "step_map": torch.full((2, 10), -1).int(), "mask_id": 0, "threshold": 0.5}
    usual |= {"state": ops.MultiBlockState.make(x, 4, 2), "prompt_length": at(2, 2)}
    usual |= {"token": torch.ones(2, 3, dtype=torch.int64), "entropy": torch.rand(2, 3)}
    usual |= {"max_new_tokens": 4, "block_length": 2, "add_at": 0.1, "full_at": 0.9}
    usual |= {"eos_ids": torch.tensor([1]), "early_stop": True, "cached": True, "delay": 2}
    return usual | {"refresh": 3, "tail": 2, "shifted": False}


def moe():
    hidden = torch.randn(2, 3, 8)
    return {
        "hidden": hidden,
        "gate_up": torch.randn(4, 6, 8),
        "down": torch.randn(4, 8, 3),
        "ids": torch.zeros(2, 3, 2, dtype=INT32),
        "weights": torch.rand(2, 3, 2),
        "shared_gate_up": torch.randn(4, 8),
        "shared_down": torch.randn(8, 2),
        "activation": "silu",
    }


def router():
    usual = {"hidden": torch.randn(2, 3, 8), "router": torch.randn(4, 8), "bias": torch.randn(4)}
    usual |= {"top_k": 2, "score": "sigmoid", "renormalize": True, "scale": 2.5, "branches": 1}
    usual |= {"capacity": 3, "block_size": 2, "length": at(3, 2), "start": at(0, 1)}
    return usual | {"groups": 1, "topk_groups": 1}


def partial_stats():
    parts = ops.head_stats_partial(torch.randn(2, 8), torch.randn(5, 8))
    return {"values": parts.values, "ids": parts.ids}


def merge(values, ids):
    return ops.merge_stats(ops.StatsPartial(values, ids), ops.StatsPartial(values, ids))


def listed():
    counter = torch.zeros(4, 3, dtype=INT32)
    draft = ops.mixture_draft(
        torch.randn(4, 5), temperature=1.0, counter=counter, top_p=0.9, capacity=4
    )
    usual = {"candidates": draft.candidates, "hidden": torch.randn(4, 8)}
    usual |= {"weight": torch.randn(5, 8), "bias": torch.randn(5), "token": draft.token}
    usual |= {"length": at(2, 2), "mixture": 0.5, "temperature": 1.0, "softcap": 5.0}
    return usual | {"critical": True, "emit": "draft"}


MATRIX = {"hidden": lambda: torch.randn(4, 8), "weight": lambda: torch.randn(5, 8)}
ROW = "rows suppress_ids softcap top_k top_p bias"
CASES = (
    Case(
        ops.rms_norm,
        lambda: {
            "x": torch.randn(2, 4),
            "weight": torch.ones(4),
            "eps": 1e-6,
            "residual": torch.randn(2, 4),
        },
        "residual",
        (("eps", -1.0), ("eps", float("inf")), ("residual", torch.zeros(1, 4).expand(2, 4))),
    ),
    Case(ops.swiglu, lambda: {"gate_up": torch.randn(2, 4)}, free="gate_up"),
    Case(
        ops.vocab_stats,
        row_statistics(logits=lambda: torch.randn(4, 5), top_k=lambda: 2, top_p=lambda: 0.9),
        ROW,
        (("temperature", 1e300), ("temperature", 1e-9), ("top_k", 0), ("seed", -1)),
    ),
    Case(ops.head_stats, row_statistics(**MATRIX, bias=lambda: torch.randn(5)), ROW),
    Case(
        ops.head_stats_partial,
        row_statistics(**MATRIX, bias=lambda: torch.randn(5), vocab_offset=lambda: 4),
        ROW,
        (("vocab_offset", 3), ("vocab_offset", -4)),
    ),
    Case(
        ops.renoise,
        lambda: {
            "x": torch.zeros(2, 4, dtype=torch.int64),
            "token": torch.ones(2, 4, dtype=torch.int64),
            "entropy": torch.rand(2, 4),
            "bound": 0.5,
            "vocab_size": 9,
            "seed": 1,
            "request": at(0, 0),
            "step": at(0, 0),
        },
        "",
        (("vocab_size", 0), ("bound", -1.0)),
    ),
    Case(
        ops.edit_tokens,
        window(
            post_steps=lambda: at(0, 0),
            complete=lambda: torch.zeros(2, dtype=torch.bool),
            editable_from=lambda: at(0, 0),
            threshold=lambda: 0.5,
            edit_threshold=lambda: 0.5,
            min_tokens=lambda: 1,
            max_post_steps=lambda: 2,
            confirm=lambda: True,
            **written(),
        ),
        "edit_threshold",
        (("min_tokens", 0), ("max_post_steps", -1), ("threshold", 1.5)),
    ),
    Case(
        ops.edit_block,
        lambda: {
            "x": torch.zeros(2, 6, dtype=torch.int64),
            "step_map": torch.full((2, 6), -1).int(),
            "nfe": at(0, 0),
            "edits": ops.BlockEdits.make(2, 4, 2),
            "logits": torch.randn(2, 4, 5),
            "mask_id": 0,
            "delete_id": 1,
            "split_id": 2,
            "start": at(1, 1),
            "length": at(4, 4),
            "editable_from": at(0, 0),
            "threshold": 0.5,
            "edit_threshold": 0.5,
            "max_post_steps": 2,
        },
        "edit_threshold",
        (
            ("max_post_steps", -1),
            ("max_post_steps", 3),
            ("threshold", 1.5),
            ("mask_id", 1),
            ("split_id", 5),
            ("edits", 3),
        ),
    ),
    Case(
        ops.unmask,
        window(rule=lambda: "quota", quota=lambda: at(1, 1), seed=lambda: 1, **written()),
        "",
        (
            ("ending", 3),
            ("min_tokens", 2),
            ("x", torch.zeros(1, 6, dtype=torch.int64).expand(2, 6)),
        ),
    ),
    Case(ops.draft, window(branches=lambda: 3, block_size=lambda: 2), "block_size"),
    Case(
        ops.verify,
        window(
            candidates=lambda: torch.zeros(2, 3, 6, dtype=torch.int64),
            token=lambda: torch.ones(2, 3, 4, dtype=torch.int64),
            score=lambda: torch.rand(2, 3, 4),
            drafts=lambda: 3,
            block_size=lambda: 2,
            **written(),
        ),
        "block_size",
        (("nfe", torch.zeros(1, dtype=INT32).expand(2)),),
    ),
    Case(
        ops.window_attention,
        attention(),
        "block_size window softcap scale",
        (
            ("block_size", 0),
            ("softcap", -1.0),
            ("leaves", 1),
            ("leaf_rows", 0),
            ("k_cache", torch.zeros(1, 8, 1, 8).expand(2, -1, -1, -1)),
        ),
    ),
    Case(ops.commit_branch, attention(heads=False)),
    Case(
        ops.mixture_draft,
        lambda: {
            "logits": torch.randn(4, 5),
            "temperature": 1.0,
            "seed": 1,
            "counter": torch.zeros(2, 3, dtype=INT32),
            "rows": at(0, 1),
            "suppress_ids": at(1),
            "top_p": 0.9,
            "capacity": 4,
            "shared_vocab": 4,
        },
        "rows suppress_ids top_p shared_vocab",
        (("capacity", -1), ("shared_vocab", 6)),
    ),
    Case(ops.mixture_accept, mixture, "shared_vocab threshold", (("mixture", 1.5),)),
    Case(ops.multiblock_step, multiblock, "eos_ids refresh tail", (("add_at", 2.0),)),
    Case(
        ops.certainty_loss,
        lambda: {
            "logits": torch.randn(4, 5),
            "target": torch.ones(4, dtype=torch.int64),
            "temperature": 0.5,
        },
        "",
        (("temperature", 0.0), ("temperature", float("inf"))),
    ),
    Case(
        ops.round_counter,
        lambda: {"start": at(1, 2), "request": at(0, 0), "rows": 2, "emit": "draft"},
    ),
    Case(ops.experts, moe, "shared_gate_up shared_down"),
    Case(
        ops.route,
        router,
        "bias capacity block_size length start",
        (("top_k", 0), ("top_k", 5), ("capacity", 1), ("scale", 0.0), ("branches", 2)),
    ),
    Case(
        ops.linear,
        lambda: {"x": torch.randn(3, 8), "weight": torch.randn(5, 8), "bias": torch.randn(5)},
        "bias",
        free="x",
    ),
    Case(
        ops.linear_swiglu,
        lambda: {"x": torch.randn(3, 8), "weight": torch.randn(6, 8), "bias": torch.randn(6)},
        "bias",
        (("weight", torch.randn(5, 8)),),
        free="x",
    ),
    Case(
        ops.linear_rms_norm,
        lambda: {
            "x": torch.randn(3, 8),
            "weight": torch.randn(5, 8),
            "norm": torch.randn(5),
            "eps": 1e-5,
            "residual": torch.randn(3, 5),
            "bias": torch.randn(5),
        },
        "bias",
        (("eps", -1.0),),
        free="x",
    ),
    Case(
        ops.quantize,
        lambda: {"weight": torch.randn(5, 8), "kind": "fp8"},
        extra=(("weight", torch.full((5, 8), float("nan"))),),
    ),
    Case(
        ops.QuantizedWeight,
        lambda: {"values": torch.zeros(5, 8, dtype=torch.int8), "scale": torch.ones(5)},
    ),
    Case(merge, partial_stats, name="merge_stats"),
    Case(ops.mixture_accept_sparse, listed, "bias softcap", (("mixture", -0.5),)),
)
