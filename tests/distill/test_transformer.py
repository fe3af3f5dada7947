import pytest
import torch
from torch import nn

import pydllm
from pydllm.distill import add_lora, load_transformer
from tests.models.plain import CONFIGS, random_plain, write_checkpoint

FULL = sorted(name for name in CONFIGS if name != "sdar")


@pytest.fixture(params=FULL)
def folder(request, tmp_path):
    return write_checkpoint(tmp_path / request.param, random_plain(CONFIGS[request.param]))


def _native(folder, ids, lengths):
    model = pydllm.load(folder, device="cpu", dtype=torch.float64)
    batch = len(ids)
    zero, length = torch.zeros(batch, dtype=torch.int32), lengths.int()
    hidden = model.forward(
        ids, zero, model.new_cache(batch, 0), length=length, kv_len=length, commit=zero
    )
    return hidden, model.head(hidden)


def test_the_forward_is_the_native_one(folder):
    """On a ragged batch, in fp64, at the positions in use; padding changes nothing."""
    model = load_transformer(folder, dtype=torch.float64)
    ids = torch.randint(0, 50, (3, 11), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([11, 4, 7])
    hidden, logits = _native(folder, ids, lengths)
    got = model(ids, lengths)
    weight, bias = model.head
    used = torch.arange(11) < lengths[:, None]
    torch.testing.assert_close(got[used], hidden[used], rtol=0, atol=1e-11)
    ours = nn.functional.linear(got, weight, bias)
    torch.testing.assert_close(ours[used], logits[used], rtol=0, atol=1e-11)
    other = torch.where(used, ids, (ids + 1) % 50)
    assert torch.equal(model(other, lengths)[used], got[used])


def test_every_weight_is_trained_and_has_the_checkpoint_s_name(folder):
    model = load_transformer(folder)
    ids = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    hidden = model(ids, torch.tensor([6, 6]))
    weight, bias = model.head
    # Squared: the sum of a norm's output has hardly a gradient.
    nn.functional.linear(hidden, weight, bias).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in stored.items()
    }


def test_lora_reaches_every_projection_of_every_layer(folder):
    pytest.importorskip("peft", reason="peft is not installed (pip install 'pydllm[distill]')")
    model = load_transformer(folder)
    names = model.family.names
    inner = [*names.qkv, names.out, *names.gate_up, names.down]
    expected = {names.layer.format(layer) + name for layer in range(3) for name in inner}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears - expected <= {names.head}
    ids, lengths = torch.arange(6).repeat(2, 1), torch.tensor([6, 6])
    before = model(ids, lengths)
    add_lora(model, 4)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == expected and len(adapted) == 7 * 3
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained) and len(trained) == 2 * 7 * 3
    torch.testing.assert_close(model(ids, lengths), before)  # adapters begin as nothing


def test_other_attention_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "sdar", random_plain(CONFIGS["sdar"]))
    with pytest.raises(ValueError, match="expected a model with full attention, got 'block_causal"):
        load_transformer(folder)
