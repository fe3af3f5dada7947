"""Modules that compute more than their weights say: refused by name, or known to be harmless."""

import pytest
import torch
from torch import nn

import pydllm
from pydllm._backend.errors import CheckpointError
from pydllm.integrations import llada
from tests.models import test_load
from training.llada import CONFIG


def LLaDAModelLM():
    torch.manual_seed(0)
    return test_load.LLaDAModelLM(CONFIG | {"n_layers": 2})


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.5


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 1


def layer(module, kind):
    return next((name, part) for name, part in module.named_modules() if type(part) is kind)


def put(module, name, new):
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, new)


def hook(module):
    name, part = layer(module, nn.Linear)
    part.register_forward_hook(lambda part, inputs, output: output + 1)
    return name, "forward hook"


def pre_hook(module):
    name, part = layer(module, nn.Linear)
    part.register_forward_pre_hook(lambda part, inputs: (inputs[0] * 2,))
    return name, "forward pre hook"


def root_hook(module):
    module.register_forward_hook(lambda part, inputs, output: None)
    return "the module", "forward hook"


def replaced(module):
    name, part = layer(module, nn.Linear)
    part.forward = lambda x: nn.Linear.forward(part, x) * 2
    return name, "a forward that was replaced"


def linear(module):
    name, part = layer(module, nn.Linear)
    new = Scaled(part.in_features, part.out_features, bias=False)
    new.weight = part.weight
    put(module, name, new)
    return name, "Scaled, a Linear with a forward of its own"


def embedding(module):
    name, part = layer(module, nn.Embedding)
    new = Shifted(*part.weight.shape)
    new.weight = part.weight
    put(module, name, new)
    return name, "Shifted, a Embedding with a forward of its own"


def someone_elses_accelerate_hook(module):
    hooks = pytest.importorskip("accelerate.hooks")

    class Steer(hooks.ModelHook):
        def post_forward(self, part, output):
            return output + 1

    name, part = layer(module, nn.Linear)
    hooks.add_hook_to_module(part, Steer())
    return name, "a forward that was replaced"


def replaced_under_accelerate(module):
    hooks = pytest.importorskip("accelerate.hooks")
    name, part = layer(module, nn.Linear)
    part.forward = lambda x: nn.Linear.forward(part, x) * 2
    hooks.add_hook_to_module(part, hooks.AlignDevicesHook("cpu"))
    return name, "a forward that was replaced"


CHANGES = (
    hook,
    pre_hook,
    root_hook,
    replaced,
    linear,
    embedding,
    someone_elses_accelerate_hook,
    replaced_under_accelerate,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_would_be_left_out_is_refused(change):
    module = LLaDAModelLM()
    name, found = change(module)
    with pytest.raises(CheckpointError) as raised:
        pydllm.load(module)
    message = str(raised.value)
    assert f": {name}: expected" in message and found in message
    assert message.endswith("pydllm.patch(module) keeps it")
    ids = torch.randint(5, 20, (1, 4))
    with pytest.raises(CheckpointError, match="would be left out"):
        llada.generate(module, ids, steps=4, gen_length=4, block_length=4, mask_id=2)


def test_accelerates_own_hooks_pass():
    """Those of a model on one device, alone and in a sequence."""
    hooks = pytest.importorskip("accelerate.hooks")
    module, ids = LLaDAModelLM(), torch.randint(5, 20, (1, 4))
    options = {"steps": 4, "gen_length": 4, "block_length": 4, "mask_id": CONFIG["mask_token_id"]}
    want = llada.generate(LLaDAModelLM(), ids, **options)
    for part in list(module.modules()):
        hooks.add_hook_to_module(part, hooks.AlignDevicesHook("cpu", io_same_device=True))
        hooks.add_hook_to_module(part, hooks.AlignDevicesHook("cpu"), append=True)
    assert all("forward" in vars(part) for part in module.modules())
    assert torch.equal(llada.generate(module, ids, **options), want)


def test_what_changes_nothing_passes():
    module = LLaDAModelLM()
    for part in module.modules():
        part.register_full_backward_hook(lambda part, inputs, outputs: None)
    pydllm.load(module)
