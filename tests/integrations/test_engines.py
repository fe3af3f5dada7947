"""The engines' plug-ins against plain restatements of the rules they replace.

The engines themselves are stand-ins: classes of their names with the interface that their releases
have, and a model whose logits are a function of the tokens.
"""

import sys
from collections import Counter
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import List, Optional, Tuple, Union  # noqa: UP035, the annotations that are looked at

import pytest
import torch

from pydllm import PydllmError
from pydllm._backend import env
from pydllm.integrations.engines import lmdeploy, sglang, vllm

BLOCK, MASK, VOCAB = 8, 30, 31


class Model:
    """Logits of a block from its tokens: every position looks at all of them."""

    def __init__(self, seed=0, dtype=torch.float32, scale=3.0):
        generator = torch.Generator().manual_seed(seed)
        self.mix = torch.randn(BLOCK, BLOCK, generator=generator)
        self.table = torch.randn(VOCAB, VOCAB, generator=generator) * scale
        self.place = torch.randn(BLOCK, VOCAB, generator=generator) * scale
        self.place[:, MASK] = -50
        self.dtype, self.calls = dtype, 0

    def forward(self, forward_batch, pp_proxy_tensors=None):
        self.calls += 1
        x = forward_batch.input_ids.view(-1, BLOCK).long()
        logits = (self.mix @ self.table[x] / BLOCK + self.place).to(self.dtype)
        output = SimpleNamespace(full_logits=logits.flatten(0, 1))
        return SimpleNamespace(logits_output=output, can_run_graph=True)


class Output:
    full_logits: torch.Tensor


class StepBase:
    """An engine that asks an algorithm for steps."""

    def __init__(self, config):
        self.block_size, self.mask_id = config.block_size, config.mask_id

    def init_step_state(self, forward_batch):
        return [None] * forward_batch.batch_size

    def max_steps(self, block_size):
        return block_size + 1

    def hand_over(self, output):
        return output.full_logits

    def run(self, model_runner, forward_batch):
        first = (forward_batch.input_ids.view(-1, BLOCK) != self.mask_id).sum(1).tolist()
        states = self.init_step_state(forward_batch)
        out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
        if all(start == BLOCK for start in first):
            return out.logits_output, [], out.can_run_graph
        for _ in range(self.max_steps(BLOCK)):
            if all(self.step(forward_batch, self.hand_over(out.logits_output), states)):
                break
            out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
        x = forward_batch.input_ids.view(-1, BLOCK)
        return out.logits_output, [row[n:] for row, n in zip(x, first)], out.can_run_graph  # noqa: B905


class OutputBase(StepBase):
    def hand_over(self, output):
        return output


class RunBase:
    def __init__(self, config):
        self.block_size, self.mask_id = config.block_size, config.mask_id


class LogitsLowConfidence:
    def step(self, forward_batch, full_logits: torch.Tensor, states: List): ...  # noqa: UP006


class OutputLowConfidence:
    def step(self, forward_batch, logits_output: Output, states: List): ...  # noqa: UP006


class RunLowConfidence:
    def run(
        self, model_runner, forward_batch
    ) -> Tuple[Union[Output, torch.Tensor], List[torch.Tensor], bool]: ...  # noqa: UP006, UP007


class OldestLowConfidence:
    def run(
        self, model_runner, forward_batch
    ) -> Tuple[Union[Output, torch.Tensor], Optional[torch.Tensor], bool]: ...  # noqa: UP006, UP007, UP045


class NewestLowConfidence:
    def step(self, forward_batch, outputs, states, stream): ...


INTERFACES = {
    "logits": (StepBase, LogitsLowConfidence),
    "output": (OutputBase, OutputLowConfidence),
    "run": (RunBase, RunLowConfidence),
}


def install_sglang(monkeypatch, base, low_confidence):
    """Stand-in modules under SGLang's names; the registry of algorithms."""
    package = ModuleType("sglang.srt.dllm.algorithm")
    package.algo_name_to_cls = {"LowConfidence": low_confidence}
    module = ModuleType("sglang.srt.dllm.algorithm.base")
    module.DllmAlgorithm = base
    for name in ("sglang", "sglang.srt", "sglang.srt.dllm"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    sglang.register()
    return package.algo_name_to_cls


def config(**options):
    return SimpleNamespace(block_size=BLOCK, mask_id=MASK, algorithm_config=options)


def blocks(prompts, dtype=torch.int64):
    """A batch of blocks that begin with so many tokens of a prompt, then masks."""
    x = torch.full((len(prompts), BLOCK), MASK, dtype=dtype)
    for row, length in enumerate(prompts):
        x[row, :length] = torch.arange(length) + row
    return SimpleNamespace(input_ids=x.flatten(), batch_size=len(prompts))


def low_confidence(x, logits, threshold):
    """One step of SGLang's rule, one block: above the threshold, or else the best one."""
    prob, token = logits.softmax(-1).max(-1)
    masked = x == MASK
    if not masked.any():
        return
    chosen = masked & (prob > threshold)
    if not chosen.any():
        chosen[torch.where(masked, prob, -1).argmax()] = True
    x[chosen] = token[chosen]


def plain_joint(model, x, threshold, edit_threshold, budget, penalty):
    """SGLang's JointThreshold on one block, to its end; how many forwards it took."""
    prompt = x != MASK
    edits = forwards = 0
    while True:
        logits = model.forward(SimpleNamespace(input_ids=x)).logits_output.full_logits
        forwards += 1
        for row in range(1, BLOCK):
            logits[row, x[row - 1]] -= penalty
        prob, token = logits.softmax(-1).max(-1)
        masked = x == MASK
        chosen = torch.zeros_like(masked)
        if masked.any():
            chosen = masked & (prob > threshold)
            if not chosen.any():
                chosen[torch.where(masked, prob, -1).argmax()] = True
        else:
            edits += 1
            if edits > budget:
                return forwards
        chosen |= (prob > edit_threshold) & (token != x) & ~masked & ~prompt
        if not chosen.any():
            return forwards
        x[chosen] = token[chosen]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("interface", INTERFACES)
def test_sglang_low_confidence(monkeypatch, interface, dtype):
    known = install_sglang(monkeypatch, *INTERFACES[interface])
    algorithm = known["PydllmLowConfidence"](config(threshold=0.6))
    for seed in range(12):
        batch = blocks((0, 3, 7, BLOCK))
        wanted = batch.input_ids.view(-1, BLOCK).clone()
        plain = Model(seed, dtype)
        while (wanted == MASK).any():
            everything = SimpleNamespace(input_ids=wanted.flatten())
            logits = plain.forward(everything).logits_output.full_logits
            for x, own in zip(wanted, logits.view(4, BLOCK, VOCAB), strict=True):
                low_confidence(x, own, 0.6)
        model = Model(seed, dtype)
        _, tokens, graph = algorithm.run(model, batch)
        assert graph is True
        for got, x, start in zip(tokens, wanted, (0, 3, 7, BLOCK), strict=True):
            assert torch.equal(got, x[start:])
        assert model.calls == plain.calls + 1  # one more stores the keys of the last tokens


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("penalty", [0.0, 1.5])
def test_sglang_joint_threshold(monkeypatch, interface, penalty):
    known = install_sglang(monkeypatch, *INTERFACES[interface])
    options = {"threshold": 0.5, "edit_threshold": 0.3, "max_post_edit_steps": 3}
    algorithm = known["PydllmJointThreshold"](config(**options, penalty_lambda=penalty))
    ended = Counter()
    for seed in range(12):
        batch = blocks((0, 2, 5))
        wanted = batch.input_ids.view(-1, BLOCK).clone()
        steps = [plain_joint(Model(seed, scale=6), x, 0.5, 0.3, 3, penalty) for x in wanted]
        model = Model(seed, scale=6)
        algorithm.run(model, batch)
        assert torch.equal(batch.input_ids.view(-1, BLOCK), wanted)
        assert model.calls == max(steps) + 1
        ended.update(steps)
    assert len(ended) > 3  # blocks of a batch end at different steps


def test_sglang_int32_ids_and_finished_blocks(monkeypatch):
    """Ids of another type are written in place too; a finished block is not touched again."""
    known = install_sglang(monkeypatch, *INTERFACES["logits"])
    batch = blocks((0, BLOCK), torch.int32)
    held = batch.input_ids
    known["PydllmEntropyBound"](config(bound=0.5)).run(Model(), batch)
    assert batch.input_ids is held and held.dtype == torch.int32
    assert (held != MASK).all() and held[BLOCK:].tolist() == list(range(1, BLOCK + 1))


@pytest.mark.parametrize("name", ["EntropyBound", "EntropyThreshold", "Factor", "LowConfidence"])
def test_sglang_rules_fill_every_block(monkeypatch, name):
    known = install_sglang(monkeypatch, *INTERFACES["output"])
    batch, model = blocks((1, 0, 6)), Model()
    known[f"Pydllm{name}"](config()).run(model, batch)
    assert (batch.input_ids != MASK).all() and model.calls <= BLOCK + 1


def test_one_copy_to_the_host_a_step(monkeypatch):
    """The list that the interface returns is all that a step reads."""
    known = install_sglang(monkeypatch, *INTERFACES["logits"])
    reads = Counter()
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu"):
        original = getattr(torch.Tensor, name)

        def counted(self, *arguments, original=original, name=name):
            reads[name] += 1
            return original(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    batch = blocks((0, 3))
    for name in ("LowConfidence", "JointThreshold"):
        algorithm = known[f"Pydllm{name}"](config())
        states = algorithm.init_step_state(batch)
        logits = Model().forward(batch).logits_output.full_logits
        reads.clear()
        algorithm.step(batch, logits, states)
        assert reads == {"tolist": 1}, name


def test_sglang_names_are_replaced_only_when_asked(monkeypatch):
    known = install_sglang(monkeypatch, *INTERFACES["logits"])
    assert known["LowConfidence"] is LogitsLowConfidence
    monkeypatch.setattr(env, "REPLACE", True)
    known = install_sglang(monkeypatch, *INTERFACES["logits"])
    assert known["LowConfidence"] is known["PydllmLowConfidence"]


@pytest.mark.parametrize(
    "algorithm, found",
    [
        (OldestLowConfidence, r"run that returns .*Optional"),
        (NewestLowConfidence, r"\(forward_batch, outputs, states, stream\)"),
        (object, "neither step nor run"),
    ],
)
def test_unknown_sglang_interfaces_are_refused(algorithm, found):
    with pytest.raises(PydllmError, match=rf"^sglang .*: .*: expected .*, found {found}"):
        sglang.interface_of(algorithm)


@pytest.mark.parametrize(
    "name, changed",
    [
        ("__init__", lambda self, config, runner: None),
        ("init_step_state", lambda self, forward_batch, stream: None),
        ("max_steps", lambda self: None),
    ],
)
def test_a_changed_base_of_sglang_is_refused(monkeypatch, name, changed):
    base = type("DllmAlgorithm", (StepBase,), {name: changed})
    with pytest.raises(PydllmError, match=r"^sglang .*expected \(.*\), found \(.*\)"):
        install_sglang(monkeypatch, base, LogitsLowConfidence)


def test_a_changed_runner_of_sglang_is_refused(monkeypatch):
    known = install_sglang(monkeypatch, *INTERFACES["run"])
    runner = SimpleNamespace(forward=lambda forward_batch, skip_attn_backend_init: None)
    with pytest.raises(PydllmError, match=r"^sglang .*pp_proxy_tensors\), found"):
        known["PydllmLowConfidence"](config()).run(runner, blocks((0,)))


def test_compact_state_is_refused(monkeypatch):
    known = install_sglang(monkeypatch, *INTERFACES["output"])
    algorithm = known["PydllmLowConfidence"](config())
    with pytest.raises(PydllmError, match="expected full_logits, a tensor, got NoneType"):
        algorithm.step(blocks((0,)), SimpleNamespace(full_logits=None), [None])


def test_plug_ins_do_nothing_without_their_engine(monkeypatch):
    monkeypatch.setattr(env, "REPLACE", True)
    for name in ("sglang", "dllm_plugin", "lmdeploy"):
        monkeypatch.setitem(sys.modules, name, None)
    sglang.register()
    vllm.register()
    with pytest.raises(PydllmError, match="LMDeploy with dLLM strategies is not here"):
        lmdeploy.install()


def plain_remask(logits, draft, mask, threshold):
    """dllm-plugin's rule in plain torch: within 1e-5 of the best, or above the threshold."""
    prob, token = logits.float().softmax(-1).max(-1)
    able = (draft == mask) & (token != mask)
    prob = torch.where(able, prob, -torch.inf)
    limit = (prob.amax(-1, keepdim=True) - 1e-5).clamp(max=threshold)
    new = torch.where(able & (prob >= limit), token, draft)
    return new, (new != mask).all(-1), (new != draft).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_vllm_remask(monkeypatch, dtype):
    generator = torch.Generator().manual_seed(0)
    for threshold in (0.0, 0.3, 0.9, 1.0):
        logits = torch.randn(64, BLOCK, VOCAB, generator=generator).mul(3).to(dtype)
        logits[::7, :, MASK] = 40  # predicts the mask itself
        draft = torch.randint(0, MASK, (64, BLOCK), generator=generator)
        draft[torch.rand(64, BLOCK, generator=generator) < 0.7] = MASK
        before = draft.clone()
        got = vllm.batched_remask(logits, draft, MASK, threshold)
        wanted = plain_remask(logits, draft, MASK, threshold)
        assert all(
            torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, wanted, strict=True)
        )
        assert torch.equal(draft, before)


def test_vllm_plug_in(monkeypatch):
    calls = []

    def batched_remask(logits, input_draft, mask_token_id, threshold, temperature=0.0, out=None):
        calls.append(temperature)

    module = ModuleType("dllm_plugin.sampling.diffusion_sampler")
    module.batched_remask = batched_remask
    for name in ("dllm_plugin", "dllm_plugin.sampling"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vllm.register()
    assert module.batched_remask is batched_remask  # not asked for
    monkeypatch.setattr(env, "REPLACE", True)
    vllm.register()
    logits, draft = torch.randn(2, BLOCK, VOCAB), torch.full((2, BLOCK), MASK)
    module.batched_remask(logits, draft, MASK, 0.9, temperature=0.0)
    assert calls == []
    module.batched_remask(logits, draft, MASK, 0.9, temperature=0.5)  # not ours
    assert calls == [0.5]
    module.batched_remask = lambda logits, draft: None
    changed = r"^dllm-plugin .*expected \(logits, input_draft, .*\), found \(logits, draft\)"
    with pytest.raises(PydllmError, match=changed):
        vllm.register()


MASKED, UNMASKED, CACHED = 0, 1, 2


class Strategy(Enum):
    LOW_CONFIDENCE_STATIC = 1
    LOW_CONFIDENCE_DYNAMIC = 2
    SEQUENTIAL = 3
    ANOTHER = 4


class OwnProcessor:
    """The interface of LMDeploy's."""

    def __init__(self, dllm_config):
        self.dllm_config = dllm_config

    def __call__(self, logits, input_ids, token_ids, dllm_mask):
        return "the original"


def plain_unmasking(config, logits, input_ids, token_ids, states):
    """LMDeploy's three strategies, block by block."""
    states, tokens = states.clone().view(-1, BLOCK), token_ids.clone().view(-1, BLOCK)
    prob = logits.softmax(-1).view(-1, BLOCK, VOCAB)
    for row, state in enumerate(states):
        if (state == UNMASKED).all():
            state[:] = CACHED
        masked = state == MASKED
        tokens[row] = torch.where(masked, tokens[row], input_ids.view(-1, BLOCK)[row])
        score = prob[row].gather(1, tokens[row][:, None]).squeeze(1)
        score = torch.where(masked, score, -1)
        count = max(1, BLOCK // config.denoising_steps)
        if config.unmasking_strategy is Strategy.LOW_CONFIDENCE_DYNAMIC:
            chosen = score >= config.confidence_threshold
            chosen[score.argmax()] = True
        elif config.unmasking_strategy is Strategy.LOW_CONFIDENCE_STATIC:
            chosen = torch.zeros_like(masked)
            chosen[score.sort(descending=True, stable=True).indices[:count]] = True
        else:
            place = torch.arange(BLOCK) - masked.int().argmax()
            chosen = (place >= 0) & (place < count)
        state[masked & chosen] = UNMASKED
    return states.flatten(), tokens.flatten()


def install_lmdeploy(monkeypatch):
    for name in ("lmdeploy", "lmdeploy.pytorch", "lmdeploy.pytorch.strategies"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    dllm = "lmdeploy.pytorch.strategies.dllm"
    user, consts = ModuleType(f"{dllm}.model_agent"), ModuleType("lmdeploy.pytorch.consts")
    consts.DLLM_MASKED, consts.DLLM_UNMASKED, consts.DLLM_CACHED = MASKED, UNMASKED, CACHED
    user.UnmaskingProcessor = OwnProcessor
    monkeypatch.setitem(sys.modules, dllm, ModuleType(dllm))
    for module in (user, consts):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return user, lmdeploy.install()


@pytest.mark.parametrize("strategy", list(Strategy)[:3], ids=lambda strategy: strategy.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_lmdeploy_processor(monkeypatch, strategy, dtype):
    user, uninstall = install_lmdeploy(monkeypatch)
    settings = SimpleNamespace(
        block_length=BLOCK, unmasking_strategy=strategy, denoising_steps=4, confidence_threshold=0.4
    )
    processor = user.UnmaskingProcessor(dllm_config=settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        logits = torch.randn(4 * BLOCK, VOCAB, generator=generator).mul(2).to(dtype)
        token_ids, input_ids = torch.randint(0, VOCAB, (2, 4 * BLOCK), generator=generator)
        states = (torch.rand(4, BLOCK, generator=generator) < 0.4).int()
        states[2], states[3] = UNMASKED, CACHED
        wanted = plain_unmasking(settings, logits, input_ids, token_ids, states.flatten())
        got = processor(logits, input_ids, token_ids, states.flatten())
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    uninstall()
    assert user.UnmaskingProcessor is OwnProcessor


def test_lmdeploy_leaves_what_it_does_not_know(monkeypatch):
    user, _ = install_lmdeploy(monkeypatch)
    settings = SimpleNamespace(block_length=BLOCK, unmasking_strategy=Strategy.ANOTHER)
    processor = user.UnmaskingProcessor(dllm_config=settings)
    assert processor(None, None, None, None) == "the original"
    with pytest.raises(PydllmError, match="expected dllm_block_length or block_length, has none"):
        user.UnmaskingProcessor(dllm_config=SimpleNamespace())


@pytest.mark.parametrize("name", ["__init__", "__call__"])
def test_a_changed_processor_of_lmdeploy_is_refused(monkeypatch, name):
    changed = type("OwnProcessor", (OwnProcessor,), {name: lambda self, dllm_config, state: None})
    monkeypatch.setitem(globals(), "OwnProcessor", changed)
    with pytest.raises(PydllmError, match=r"^lmdeploy .*found \(dllm_config, state\)"):
        install_lmdeploy(monkeypatch)
    user = sys.modules["lmdeploy.pytorch.strategies.dllm.model_agent"]
    assert user.UnmaskingProcessor is changed
