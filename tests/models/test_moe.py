"""Mixtures of experts in the native transformer: against a plain forward and public classes."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from pydllm.models import load
from pydllm.models.experts import Experts
from pydllm.models.partition import Partition
from tests.models.moe_plain import CONFIGS, forward, fused, random_weights, write_moe
from tests.models.test_native import at, close, random_ids, refresh

BLOCKS = [name for name in CONFIGS if "block_size" in CONFIGS[name] and name != "ling"]
SPARSE = ["llada2", "sdar-moe-mixed", "llada-moe"]


def make(folder, name, dtype=torch.float64, seed=0, layout=None):
    config = CONFIGS[name]
    weights = random_weights(config, seed, torch.float64)
    stored = weights if layout is None else fused(weights, config, layout)
    write_moe(folder / f"{name}-{layout}", config, stored)
    return load(folder / f"{name}-{layout}", device="cpu", dtype=dtype), config, weights


@pytest.mark.parametrize("name", CONFIGS)
def test_full_forward_in_fp64(tmp_path, name):
    model, config, weights = make(tmp_path, name)
    ids = random_ids(2, 21)
    got = refresh(model, ids, model.new_cache(2, 24))
    for row in range(2):
        hidden, logits = forward(config, weights, ids[row])
        close(got[row], hidden)
        close(model.head(got)[row], logits)
        assert len(logits.argmax(-1).unique()) > 1


@pytest.mark.parametrize("name", CONFIGS)
def test_full_forward_in_fp32(tmp_path, name):
    model, config, weights = make(tmp_path, name, torch.float32)
    ids = random_ids(1, 24, seed=1)
    got = model.head(refresh(model, ids, model.new_cache(1, 0)))[0]
    _, exact = forward(config, weights, ids[0])
    close(got.double(), exact, 2e-5)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_blocks_one_after_the_other_are_the_whole(tmp_path, name, backend):
    """Windows over a cache, of sequences that are at different blocks, with rows not in use."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    model, config, weights = make(tmp_path, name, dtype)
    size, ids = config["block_size"], random_ids(2, 24, seed=2)
    cache = model.new_cache(2, 24)
    length = at(24, 12 if size == 4 else 8)
    for block in range(24 // size if backend == "torch" else 2):  # interpreted: slow
        start = torch.minimum(at(block * size, block * size), length)
        own = (length - start).clamp(max=size)
        window = torch.stack(
            [
                torch.nn.functional.pad(row[s : s + size], (0, size))[:size]
                for row, s in zip(ids, start.tolist(), strict=True)
            ]
        )
        got = model.forward(
            window, start, cache, length=own, kv_len=start + own, commit=own, backend=backend
        )
        for row in range(2):
            if own[row]:
                hidden, _ = forward(config, weights, ids[row, : start[row] + own[row]])
                limit = 1e-10 if backend == "torch" else 2e-5
                close(got[row, : own[row]].double(), hidden[start[row] :], limit)


@pytest.mark.parametrize("name", ["llada2", "llada2.2", "rnd1"])
def test_branches_and_left_padding(tmp_path, name):
    model, config, weights = make(tmp_path, name)
    size = config.get("block_size", 6)
    ids = random_ids(1, 3 * size, seed=3)
    cache = model.new_cache(1, size + 5)
    options = {"pad": at(5), "kv_len": at(5 + size), "commit": at(0), "branches": 3}
    got = model.forward(ids, at(5), cache, length=at(size), **options)
    for branch in range(3):
        part = slice(branch * size, (branch + 1) * size)
        close(got[0, part], forward(config, weights, ids[0, part])[0])


MUTANTS = {
    "no bias": "llada2",
    "no groups": "llada2",
    "no pools": "llada2.2",
    "not renormalised": "llada2",
    "no scale": "llada2",
    "no shared expert": "llada2",
    "shared expert twice": "llada2",
    "up before gate": "sdar-moe",
    "next expert": "sdar-moe",
    "renormalised the other way": "llada-moe",
    "whole rotation": "llada2",
    "last dimensions rotate": "llada2",
    "norm after rotation": "rnd1",
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_finds_a_wrong_model(mutant):
    config = CONFIGS[MUTANTS[mutant]]
    weights, ids = random_weights(config, 0, torch.float64), random_ids(21)
    right, wrong = (forward(config, weights, ids, mutant=m)[1] for m in (None, mutant))
    assert (right - wrong).abs().max() > 1e-2


def same(one, other):
    return (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("layout", ["dfactory", "dinfer", "w13", "transformers", "mlx"])
@pytest.mark.parametrize("name", SPARSE)
def test_stored_layouts_are_one_model(tmp_path, name, layout):
    plain, _, _ = make(tmp_path, name)
    model, _, _ = make(tmp_path, name, layout=layout)
    for ours, theirs in zip(plain._layers, model._layers, strict=True):
        for field in dataclasses.fields(ours):
            one, other = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name == "experts":
                assert (one is None) == (other is None)
                for name in ("router", "router_bias", "shared_gate_up", "shared_down"):
                    assert one is None or same(getattr(one, name), getattr(other, name))
            else:
                assert same(one, other), field.name


def test_other_names_of_the_same_tensors(tmp_path):
    config = CONFIGS["llada2"]
    weights = random_weights(config, 0, torch.float64)
    renamed = {}
    for name, tensor in weights.items():
        name = name.replace("mlp.gate.expert_bias", "mlp.gate.e_score_correction_bias")
        name = name.replace("lm_head.", "model.lm_head.")
        renamed[name.replace("model.layers.", "model.language_model.layers.")] = tensor
    folder = write_moe(tmp_path / "renamed", config, renamed)
    model, ids = load(folder, device="cpu", dtype=torch.float64), random_ids(1, 9)
    got = model.head(refresh(model, ids, model.new_cache(1, 0)))[0]
    close(got, forward(config, weights, ids[0])[1])


@pytest.mark.parametrize("name", SPARSE)
def test_router_and_bias_are_fp32_where_scores_are_sigmoids(tmp_path, name):
    model, config, weights = make(tmp_path, name, torch.bfloat16)
    layer = model._layers[1].experts
    sigmoid = name == "llada2"
    assert layer.router.dtype == (torch.float32 if sigmoid else torch.bfloat16)
    assert layer.gate_up.dtype == torch.bfloat16 and layer.gate_up.ndim == 3
    if sigmoid:
        stored = weights["model.layers.1.mlp.gate.expert_bias"].float()
        assert torch.equal(layer.router_bias, stored)


@pytest.mark.parametrize("name", CONFIGS)
def test_dtypes_stay_near_the_exact_model(tmp_path, name):
    """bf16 with the routes of the bf16 model: most rows stay near, however experts change."""
    model, config, weights = make(tmp_path, name, torch.bfloat16)
    ids = random_ids(1, 24, seed=5)
    got = model.head(refresh(model, ids, model.new_cache(1, 0)))[0].double()
    exact = forward(config, weights, ids[0])[1]
    error = (got - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.median() < 0.1


def test_routes_are_recorded_on_demand(tmp_path):
    model, _, _ = make(tmp_path, "llada2")
    model.routed = []
    ids = random_ids(1, 9)
    model.forward(ids, at(0), model.new_cache(1, 0), length=at(7), kv_len=at(7), commit=at(0))
    assert [tuple(routes.shape) for routes in model.routed] == [(1, 9, 4)] * 2
    assert all(
        (routes[0, 7:] == 16).all() and (routes[0, :7] < 16).all() for routes in model.routed
    )


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("layout", [None, "dfactory", "transformers"])
@pytest.mark.parametrize("name", ["llada2", "llada-moe-mixed"])
def test_parts_of_the_experts_add_up(tmp_path, name, layout, size):
    """Each process's inner columns of every expert, and of the shared one; routers whole."""
    from pydllm.models.checkpoint import Shards
    from pydllm.models.families import FAMILIES
    from pydllm.models.weights import slots

    model, config, weights = make(tmp_path, name, layout=layout)
    family = FAMILIES[config["architectures"][0]]
    sizes = dataclasses.replace(model.sizes, heads=4, kv_heads=4)  # of no interest here
    shards = Shards(tmp_path / f"{name}-{layout}")
    shards.read_layout(family.names, model.sizes, "")
    wanted = [s for s in slots(family.names, model.sizes) if s.name.startswith("layers.2.")]
    wanted = [s for s in wanted if not s.name.endswith(("qkv", "out", "norm"))]
    x = random_ids(5, 48).double().sin()
    outputs = []
    for rank in range(size):
        partition = Partition(rank, size, sizes, 61)
        local, moe = shards.load(wanted, "cpu", torch.float64, partition), partition.local.moe
        assert moe.width == 24 // size
        w = {key.removeprefix("layers.2."): t for key, t in local.items()}
        experts = Experts.of(w, moe)
        assert torch.equal(experts.router, model._layers[2].experts.router)
        window = {"start": at(0), "pad": None, "length": at(5), "branches": 1, "backend": None}
        outputs.append(experts(x[None], window, None))
    whole = model._layers[2].experts(x[None], window, None)
    close(sum(outputs), whole)


def test_a_number_of_processes_that_does_not_divide_the_experts(tmp_path):
    model, _, _ = make(tmp_path, "llada-moe")
    with pytest.raises(ValueError, match="tp: expected a divisor of the experts's 24 columns, got"):
        Partition(
            0,
            32,
            dataclasses.replace(model.sizes, heads=32, kv_heads=32, moe=model.sizes.moe),
            6100,
        )


def qwen3_moe(name, **changes):
    transformers = pytest.importorskip("transformers")
    c = CONFIGS[name]
    config = transformers.Qwen3MoeConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=c["num_key_value_heads"],
        head_dim=c.get("head_dim") or 8,
        rms_norm_eps=c["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": float(c["rope_theta"])},
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=24,
        norm_topk_prob=bool(c["norm_topk_prob"]),
        mlp_only_layers=c.get("mlp_only_layers") or [],
        decoder_sparse_step=c.get("decoder_sparse_step", 1),
        tie_word_embeddings=False,
        max_position_embeddings=64,
        **changes,
    )
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    return model


def load_in(module, weights, dtype):
    """Load in a dtype; the frequencies stay in fp32, as ``from_pretrained`` leaves them."""
    frequencies = module.model.rotary_emb.inv_freq.clone()
    module.to(dtype).load_state_dict(weights, strict=True)
    module.model.rotary_emb.inv_freq = frequencies
    module.config._attn_implementation = "eager"


def mask_of(config, length, dtype):
    """transformers' additive mask of the model's blocks."""
    name = config["architectures"][0]
    block = 1 if name in ("Qwen3MoeForCausalLM", "BailingMoeV2ForCausalLM") else length
    block = config.get("block_size", block) if "LLaDA2" in name or "SDAR" in name else block
    number = torch.arange(length) // block
    return torch.zeros(length, length, dtype=dtype).masked_fill(
        number[:, None] < number, torch.finfo(dtype).min
    )[None, None]


@pytest.mark.parametrize("name", ["sdar-moe", "sdar-moe-mixed", "rnd1", "llada-moe", "qwen3-moe"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_transformers_qwen3_moe_is_the_softmax_line(name, dtype):
    """The plain forward is transformers' class, bit for bit."""
    if name == "llada-moe" and dtype == torch.bfloat16:
        pytest.skip("without grouped heads its attention is another matrix product's rounding")
    config, module = CONFIGS[name], qwen3_moe(name)
    weights = random_weights(config, 0, torch.float64)
    load_in(module, fused(weights, config, "transformers"), dtype)
    ids = random_ids(1, 21)
    with torch.no_grad():
        theirs = module(ids, attention_mask=mask_of(config, 21, dtype)).logits[0]
    ours = {key: t.to(dtype) for key, t in weights.items()}
    _, plain = forward(config, ours, ids[0], inner=torch.float32, qwen_rounding=True)
    assert torch.equal(theirs, plain)


@pytest.mark.parametrize("name", ["llada2", "llada2-flat"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_transformers_glm4_moe_is_llada2(name, dtype):
    transformers = pytest.importorskip("transformers")
    c = CONFIGS[name]
    module = transformers.Glm4MoeForCausalLM(
        transformers.Glm4MoeConfig(
            vocab_size=61,
            hidden_size=48,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            rms_norm_eps=1e-6,
            use_qk_norm=True,
            attention_bias=False,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_shared_experts=c["num_shared_experts"] or 1,
            n_group=c["n_group"],
            topk_group=c["topk_group"],
            first_k_dense_replace=1,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            moe_intermediate_size=24,
            tie_word_embeddings=False,
            max_position_embeddings=64,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 6e5,
                "partial_rotary_factor": 0.5,
            },
        )
    ).eval()
    module.set_experts_implementation("eager" if dtype == torch.float64 else "batched_mm")
    weights = random_weights(c, 0, torch.float64)
    renamed = {}
    for key, tensor in fused(weights, c, "transformers").items():
        key = key.replace("word_embeddings", "embed_tokens")
        key = key.replace("attention.dense", "self_attn.o_proj")
        key = key.replace("attention.query_layernorm", "self_attn.q_norm")
        key = key.replace("attention.key_layernorm", "self_attn.k_norm")
        key = key.replace("expert_bias", "e_score_correction_bias")
        if "query_key_value" in key:
            at_ = key.replace("attention.query_key_value", "self_attn.{}_proj")
            parts = tensor.split((96, 32, 32))
            renamed |= {at_.format(n): t for n, t in zip("qkv", parts, strict=True)}
        else:
            renamed[key] = tensor
    if not c["num_shared_experts"]:  # the class always has one: of zeros
        for layer in (1, 2):
            for part, shape in (("gate", (24, 48)), ("up", (24, 48)), ("down", (48, 24))):
                renamed[f"model.layers.{layer}.mlp.shared_experts.{part}_proj.weight"] = (
                    torch.zeros(shape, dtype=torch.float64)
                )
    load_in(module, renamed, dtype)
    for layer in module.model.layers[1:]:  # as LLaDA2's buffer: not rounded
        layer.mlp.gate.e_score_correction_bias.data = (
            layer.mlp.gate.e_score_correction_bias.data.float()
        )
    ids = random_ids(1, 21)
    with torch.no_grad():
        theirs = module(ids, attention_mask=mask_of(c, 21, dtype)).logits[0]
    ours = {key: t.to(dtype) for key, t in weights.items()}
    _, plain = forward(c, ours, ids[0], inner=torch.float32)
    if dtype == torch.bfloat16:
        assert torch.equal(theirs, plain)
    else:
        close(theirs, plain, 1e-5)  # the class weighs in fp32


@pytest.mark.parametrize("name", ["qwen3-moe"])
def test_a_module_shares_its_experts(name):
    """Fused parameters of transformers 5 are taken as they are: no copy, changes seen."""
    module = qwen3_moe(name).double()
    config = CONFIGS[name]
    module.load_state_dict(fused(random_weights(config, 0, torch.float64), config, "transformers"))
    module.config.norm_topk_prob = False
    model = load(module)
    experts = module.model.layers[1].mlp.experts
    assert model._layers[1].experts.gate_up.data_ptr() == experts.gate_up_proj.data_ptr()
    assert model._layers[1].experts.down.data_ptr() == experts.down_proj.data_ptr()
    assert (
        model._layers[1].experts.router.data_ptr()
        == module.model.layers[1].mlp.gate.weight.data_ptr()
    )
    ids = random_ids(1, 13)
    with torch.no_grad():
        for _ in range(2):
            theirs = module.model(ids).last_hidden_state
            close(refresh(model, ids, model.new_cache(1, 0)), theirs, 1e-5)
            experts.down_proj.mul_(1.5)


class PerExpert(torch.nn.Module):
    """Parameters by the names of a checkpoint."""

    def __init__(self, config, weights, kind):
        super().__init__()
        self.config = config
        self.tensors = {}
        for name, tensor in weights.items():
            place = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, torch.nn.Module())
                place = getattr(place, part)
            place.register_parameter(last, torch.nn.Parameter(tensor.clone()))
        self.__class__ = type(kind, (PerExpert,), {})


@pytest.mark.parametrize("layout", [None, "dfactory", "dinfer"])
def test_modules_in_other_layouts_share_their_parameters(layout):
    config = CONFIGS["llada2"]
    weights = random_weights(config, 0, torch.float64)
    stored = weights if layout is None else fused(weights, config, layout)
    module = PerExpert(config, stored, "LLaDA2MoeModelLM")
    model, ids = load(module), random_ids(1, 9)
    close(
        model.head(refresh(model, ids, model.new_cache(1, 0)))[0],
        forward(config, weights, ids[0])[1],
    )
    state = module.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "experts" in name or ".w1" in name or ".w2" in name:
                parameter.mul_(0.5)
    changed = {
        name: tensor * (0.5 if "experts" in name else 1.0) for name, tensor in weights.items()
    }
    close(
        model.head(refresh(model, ids, model.new_cache(1, 0)))[0],
        forward(config, changed, ids[0])[1],
    )


def test_facts_of_the_families(tmp_path):
    for name, attention, shift, eos in (
        ("llada2", "block_causal", False, (58,)),
        ("ling", "causal", False, (58,)),
        ("sdar-moe", "block_causal", False, (57,)),
        ("rnd1", "full", True, (57,)),
        ("llada-moe", "full", False, ()),
    ):
        spec = make(tmp_path, name)[0].spec
        assert (spec.attention, spec.shift_logits, spec.eos_ids) == (attention, shift, eos)


def test_extra_rotary_buffers_are_ignored(tmp_path):
    config = CONFIGS["llada2"]
    weights = random_weights(config)
    folder = write_moe(tmp_path / "m", config, weights)
    extra = {"model.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | extra, folder / "model.safetensors")
    assert load(folder, device="cpu").sizes.moe.experts == 16
