import json

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import pydllm
from pydllm.demo.task import ANSWER_LENGTH, FRIENDS, vocabulary
from training import llada, qwen


def _train(folder, steps, planned):
    """The first ``steps`` of a training of ``planned`` steps."""
    torch.manual_seed(0)
    model = llada.TinyLLaDA(llada.CONFIG)
    loss_of = llada.denoising_loss(model, 4, seed=0)
    run = llada.training_steps(model, loss_of, planned, 1e-3, folder / "training.pt")
    losses = []
    for done, loss in run:
        losses.append(loss)
        if done == steps:
            break
    return model, losses, run


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(llada, "SAVE_EVERY", 3)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, losses, _ = _train(tmp_path / "whole", 6, 6)
    first, before, run = _train(tmp_path / "parts", 4, 6)
    run.close()  # interrupted one step after the state of step 3 was saved
    second, after, _ = _train(tmp_path / "parts", 6, 6)
    assert before[:3] + after == losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_batches_mask_only_answers_and_hide_padding():
    tokenizer = llada.build_tokenizer()
    ids, masked = llada.draw_batch(tokenizer, 16, seed=0, step=3)
    start = ids.shape[1] - ANSWER_LENGTH
    assert not masked[:, :start].any()
    assert (masked.sum(1) >= 1).all()
    assert (ids[:, start:] != llada.PAD).all()
    again, _ = llada.draw_batch(tokenizer, 16, seed=0, step=3)
    assert torch.equal(ids, again)


def test_names_are_masked_apart():
    """Their own ratio: in some samples all names are hidden and most other words stand."""
    ids, masked = llada.draw_batch(llada.build_tokenizer(), 64, seed=0, step=5)
    name = llada.is_name(ids)
    assert (name.sum(1) >= 3).all() and not name[:, : ids.shape[1] - ANSWER_LENGTH].any()
    answer = ~name
    answer[:, : ids.shape[1] - ANSWER_LENGTH] = False
    hidden, others = ((masked & of).sum(1) / of.sum(1) for of in (name, answer))
    assert ((hidden == 1) & (others < 0.5)).any() and ((hidden == 0) & (others > 0.5)).any()
    assert abs(torch.corrcoef(torch.stack((hidden, others)))[0, 1]) < 0.3


def test_the_loss_is_the_mean_of_names_plus_that_of_the_rest():
    ids, masked = llada.draw_batch(llada.build_tokenizer(), 8, seed=0, step=5)
    logits, targets = torch.randn(int(masked.sum()), 86), ids[masked]
    losses = -logits.log_softmax(1)[torch.arange(len(targets)), targets]
    friends = {3, 4, 5, 6, 7}
    names = torch.tensor([target in friends for target in targets.tolist()])
    assert 0 < names.sum() < len(names)
    torch.testing.assert_close(
        llada.cross_entropy(logits, targets), losses[names].mean() + losses[~names].mean()
    )
    rest = llada.cross_entropy(logits[~names], targets[~names])  # no name: nothing, not NaN
    torch.testing.assert_close(rest, losses[~names].mean())


def test_rows_of_the_vocabulary_move_by_word(tmp_path):
    """From a parent whose vocabulary has other words in another order."""
    words = [*vocabulary()[:20], "first", "then", "plus", *reversed(vocabulary()[20:70])]
    parent = llada.TinyLLaDA(llada.CONFIG | {"embedding_size": len(words)})
    llada.save_checkpoint(parent, llada.CONFIG, tmp_path)
    before = {word: index for index, word in enumerate(words)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": before}}))
    state = llada.TinyLLaDA(llada.CONFIG).state_dict()
    weights = llada.read_parent(tmp_path, state)
    stored = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == stored.keys()
    moved = 0
    for index, word in enumerate(vocabulary()):
        for name in ("model.transformer.wte.weight", "model.transformer.ff_out.weight"):
            got = weights[name][index]
            if word in FRIENDS:
                assert not torch.equal(got, stored[name][before[word]].float())
                assert not torch.equal(got, state[name][index])
            elif word in before:
                assert torch.equal(got, stored[name][before[word]].float())
                moved += before[word] != index
            else:
                assert torch.equal(got, state[name][index])
    assert moved > 40
    name = "model.transformer.blocks.0.q_proj.weight"
    assert torch.equal(weights[name], stored[name].float())


def test_the_command_writes_a_llada_checkpoint(tmp_path):
    arguments = ["--out", str(tmp_path), "--steps", "2", "--batch-size", "2"]
    result = CliRunner().invoke(llada.main, arguments)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "config.json").read_text())
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["model.transformer.wte.weight"].shape == (config["embedding_size"], 128)
    assert weights["model.transformer.blocks.3.ff_out.weight"].shape == (128, 256)
    assert (tmp_path / "tokenizer.json").exists()


def _logits(model, ids):
    with torch.no_grad():
        return model(ids, attention_mask=torch.zeros(1, 1, 8, 8)).logits


def test_a_model_begins_as_its_parent(tmp_path):
    parent = qwen.build(qwen.CONFIGS["qwen2"])
    llada.save_checkpoint(parent, qwen.CONFIGS["qwen2"], tmp_path)
    child = qwen.build(qwen.CONFIGS["dream"], tmp_path)
    ids = torch.randint(3, 86, (1, 8))
    assert len(child.model.layers) == len(parent.model.layers) + 1
    torch.testing.assert_close(
        _logits(child, ids), _logits(parent.half().float(), ids), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(click.UsageError, match="expected a model in the layout of sdar, lacks"):
        qwen.build(qwen.CONFIGS["sdar"], tmp_path)


def test_a_shallower_model_takes_the_first_layers_of_its_parent(tmp_path):
    (tmp_path / "parent").mkdir()
    parent = qwen.build(qwen.CONFIGS["qwen2"])
    llada.save_checkpoint(parent, qwen.CONFIGS["qwen2"], tmp_path / "parent")
    options = ["--init", str(tmp_path / "parent"), "--layers", "1", "--steps", "1"]
    options += ["--batch-size", "2", "--learning-rate", "0", "--out", str(tmp_path / "child")]
    result = CliRunner().invoke(qwen.main, ["qwen2", *options])
    assert result.exit_code == 0, result.output
    child, stored = (
        load_file(tmp_path / name / "model.safetensors") for name in ("child", "parent")
    )
    assert len(child) < len(stored)
    assert all(torch.equal(child[name], stored[name]) for name in child)
    assert pydllm.load(tmp_path / "child").sizes.layers == 1


@pytest.mark.parametrize("kind", sorted(qwen.CONFIGS))
def test_the_command_writes_checkpoints_that_load(tmp_path, kind):
    arguments = [kind, "--out", str(tmp_path), "--steps", "2", "--batch-size", "2"]
    result = CliRunner().invoke(qwen.main, arguments)
    assert result.exit_code == 0, result.output
    spec = pydllm.load(tmp_path).spec
    assert (spec.attention, spec.shift_logits) == {
        "qwen2": ("causal", False),
        "qwen3": ("causal", False),
        "dream": ("full", True),
        "sdar": ("block_causal", False),
    }[kind]
