"""Keywords of earlier versions: a TypeError that says what replaces them (docs/migration.md)."""

import pytest
import torch

import pydllm
from pydllm import ops
from pydllm.integrations import samplers

OLD = [
    (pydllm.Static, {"semantics": "llada"}, "Static: .* use compat"),
    (pydllm.Threshold, {"semantics": "exact"}, "Threshold: .* use compat"),
    (pydllm.Factor, {"semantics": "dinfer"}, "Factor: .* use a function of pydllm.integrations"),
    (pydllm.EntropyBound, {"semantics": "exact"}, "EntropyBound: .* use a function of"),
    (pydllm.APD, {"verifier": None, "rule": "paper"}, "APD: rule .* use compat"),
    (ops.mixture_draft, {"rule": "paper"}, "mixture_draft: rule .* use the square"),
    (ops.mixture_accept, {"rule": "paper"}, "mixture_accept: rule .* use temperature 0"),
    (pydllm.MultiBlock, {"profile": "compat"}, "MultiBlock: .* use pydllm.integrations.d3llm"),
    (ops.unmask, {"semantics": "llada"}, "unmask: .* use the samplers of pydllm.integrations"),
    (samplers.get_transfer_index, {"precise": True}, "get_transfer_index: .* use compat"),
    (samplers.get_transfer_index_dynamic, {"precise": True}, "use compat"),
    (samplers.get_transfer_index_threshold, {"precise": False}, "use compat"),
    (samplers.sample_tokens, {"precise": False}, "sample_tokens: precise .* use compat"),
]


@pytest.mark.parametrize(
    ("function", "old", "message"), OLD, ids=lambda v: getattr(v, "__name__", "")
)
def test_an_old_keyword_names_the_new_one(function, old, message):
    with pytest.raises(TypeError, match=message):
        function(**old)


@pytest.mark.parametrize("compat", [True, False, "dinfer"])
def test_compat_is_a_name_or_none(compat):
    logits = torch.randn(2, 5)
    with pytest.raises(TypeError, match="compat: expected 'dream' or None, got"):
        samplers.sample_tokens(logits, compat=compat)
    token = samplers.sample_tokens(logits, compat=None)[1]
    assert torch.equal(token, samplers.sample_tokens(logits, compat="dream")[1])
