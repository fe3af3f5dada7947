import json

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import pydllm
from pydllm.demo import MODELS
from pydllm.demo.task import ANSWER_LENGTH, FRIENDS, vocabulary
from training import dual, llada, llada2, qwen
from training.experts import distinct_experts


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


@pytest.mark.parametrize("causal", [False, True])
def test_each_copy_of_a_sequence_sees_what_it_should(causal):
    """Said once more, position by position."""
    ids, first = torch.arange(20).view(2, 10) + 3, 3
    masked = torch.rand(2, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    block = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2, 3], [0, 0, 1, 1, 1, 1, 1, 2, 3, 3]])
    inputs, positions, visible = qwen.two_streams(ids, masked, block, first, causal=causal)
    assert positions.tolist() == [[*range(first, 10), *range(10)]]
    for row in range(2):
        noisy = [llada.MASK if m else t for t, m in zip(ids[row], masked[row], strict=True)]
        assert inputs[row].tolist() == [*noisy[first:], *ids[row]]
        for q, asks in enumerate(positions[0]):
            for k, answers in enumerate(positions[0]):
                mine, other = block[row, asks], block[row, answers]
                if q < 10 - first:
                    sees = mine == other if k < 10 - first else other < mine
                else:
                    sees = k >= 10 - first and (answers <= asks if causal else other <= mine)
                assert visible[row, 0, q, k] == sees


def test_batches_end_where_decoding_does():
    ids, is_answer = qwen.draw_batch(8, seed=1, step=2)
    kept, wanted, first = qwen.needed(ids, is_answer, 8)
    assert first == is_answer.int().argmax(1).min() and kept.shape[1] % 8 == 0
    assert torch.equal(kept, ids[:, : kept.shape[1]]) and kept.shape[1] < ids.shape[1]
    for row, answer in zip(ids.tolist(), wanted, strict=True):
        end = row.index(llada.EOS)
        assert answer.nonzero()[-1] == end + 7


def test_the_blocks_of_the_model_trained_both_ways():
    """Of one length per sequence, shorter at the ends alone; most begin with a token that stands,
    and many have no other.
    """
    ids, is_answer, _ = qwen.needed(*qwen.draw_batch(64, seed=1, step=2), 8)
    block, masked = dual.noise(ids, is_answer, torch.Generator().manual_seed(0))
    assert (masked <= is_answer).all() and masked.any(1).all()
    known = hidden = blocks = 0
    for row in range(64):
        lengths = block[row].unique_consecutive(return_counts=True)[1]
        assert (lengths[1:-1] == lengths[1]).all() and 4 <= lengths[1] <= 16
        assert max(lengths[0], lengths[-1]) <= lengths[1]
        begins = [n for n in range(1, ids.shape[1]) if block[row, n] != block[row, n - 1]]
        for start in begins:
            inside = slice(start, start + int(lengths[1]))
            if is_answer[row, inside].all() and inside.stop <= ids.shape[1]:
                blocks += 1
                known += not masked[row, start]
                hidden += bool(masked[row, inside][1:].all())
    assert blocks > 100 and 0.7 < known / blocks < 0.9 and 0.5 < hidden / blocks < 0.7


def test_the_mixture_is_what_decoding_computes(tmp_path):
    """Trained as one matrix per layer, stored expert by expert; loads and forwards as trained."""
    options = ["--init", str(MODELS["sdar-tiny"]), "--out", str(tmp_path)]
    options += ["--steps", "2", "--batch-size", "2"]
    result = CliRunner().invoke(llada2.main, options)
    assert result.exit_code == 0, result.output
    model, trained = pydllm.load(tmp_path, device="cpu"), llada2.TinyLLaDA2()
    assert (model.spec.attention, model.spec.block_size) == ("block_causal", 8)
    state = torch.load(tmp_path / "training.pt", weights_only=True)["model"]
    assert max(v.abs().max() for k, v in state.items() if k.endswith("expert_bias")) > 0
    trained.load_state_dict({name: value.half().float() for name, value in state.items()})
    ids, block = torch.randint(3, 86, (1, 24)), torch.arange(24) // 8
    zero, length = torch.zeros(1, dtype=torch.int32), torch.tensor([24], dtype=torch.int32)
    with torch.no_grad():
        want = trained(ids, torch.arange(24)[None], (block[:, None] >= block)[None, None])
        hidden = model.forward(
            ids, zero, model.new_cache(1, 0), length=length, kv_len=length, commit=zero
        )
    torch.testing.assert_close(model.head(hidden), want, rtol=1e-4, atol=1e-4)


def test_a_mixture_begins_with_the_weights_of_a_dense_model(tmp_path):
    """Slices of the MLP's inner columns; with every expert at weight 1 it is the dense model."""
    parent = load_file(MODELS["sdar-tiny"] / "model.safetensors")
    model = llada2.TinyLLaDA2()
    llada2.start_from(model, MODELS["sdar-tiny"])
    weights = llada2.checkpoint_weights(model)
    for layer in (1, 3):
        at = f"model.layers.{layer}.mlp."
        for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
            slices = [weights[f"{at}experts.{e}.{name}_proj.weight"] for e in range(16)]
            assert torch.equal(torch.cat(slices, axis), parent[f"{at}{name}_proj.weight"].float())
        assert not weights[f"{at}shared_experts.down_proj.weight"].any()
    with pytest.raises(click.UsageError, match="expected SDAR's layout, lacks model.layers.0"):
        llada2.start_from(model, MODELS["llada-tiny"])


def test_the_model_trained_both_ways_loads(tmp_path):
    options = ["--init", str(MODELS["sdar-tiny"]), "--out", str(tmp_path)]
    options += ["--steps", "2", "--batch-size", "2", "--learning-rate", "0"]
    result = CliRunner().invoke(dual.main, options)
    assert result.exit_code == 0, result.output
    spec = pydllm.load(tmp_path).spec
    assert (spec.causal, spec.context, spec.seeded) == ("shifted", "causal", True)
    assert (spec.block_size, spec.block_origin) == (8, "prompt")
    stored = load_file(tmp_path / "model.safetensors")
    parent = load_file(MODELS["sdar-tiny"] / "model.safetensors")
    renamed = (("encoder.", "model."), ("diffusion_head.", "lm_head."))
    for name, value in stored.items():
        for ours, theirs in renamed:
            name = name.replace(ours, theirs)
        assert torch.equal(value, parent[name])
    assert len(stored) == len(parent)


def test_distinct_experts_are_of_whole_windows():
    """Windows with two rows in use of three; 5 stands for a row that is routed nowhere."""
    one = torch.tensor([[[0, 1], [1, 2], [5, 5]], [[3, 4], [3, 4], [5, 5]]])
    two = torch.tensor([[[0, 1], [5, 5], [5, 5]], [[0, 1], [2, 3], [4, 0]]])
    assert distinct_experts([one, two], 5, 2).tolist() == [3, 2]
    assert distinct_experts([one, two], 5, 3).tolist() == [5]
