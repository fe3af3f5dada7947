import pytest
import torch
from safetensors.torch import save_file

import pydllm
from pydllm.distill import extract, join, load_trajectories, save_trajectories
from pydllm.distill.prompts import Prompt, answer_checker, read_prompts
from tests.models.plain import CONFIGS, random_plain, write_checkpoint

PROMPTS = [
    "sam has 7 coins . he finds 5 . how many coins ? in order",
    "sam has 4 cards . how many cards ? each once",
]


@pytest.fixture(scope="module")
def teacher():
    from pydllm.demo import WEIGHTS

    return pydllm.load(WEIGHTS, device="cpu")


@pytest.fixture(scope="module")
def trajectories(teacher):
    return extract(teacher, PROMPTS, max_new_tokens=48, block_length=24)


def test_trajectories_are_what_static_decoding_did(teacher, trajectories):
    plain = pydllm.generate(teacher, PROMPTS, pydllm.Static(block_length=24), max_new_tokens=48)
    assert trajectories.ids.dtype == torch.int32 and trajectories.step_map.dtype == torch.int16
    for row, sequence in enumerate(plain.sequences):
        assert trajectories.prompt_length[row] == len(sequence) - 48
        assert torch.equal(trajectories.ids[row, : len(sequence)].long(), sequence)
        steps, decoded = trajectories.step_map[row].long(), plain.step_map[row]
        written = decoded >= 0
        # The order of what was decoded is kept; what was filled comes after it, left to right.
        assert torch.equal(steps[written].argsort(), decoded[written].argsort())
        assert 0 < written.sum() < 48
        assert steps[~written].tolist() == list(range(int(written.sum()), 48))
        assert sorted(steps.tolist()) == list(range(48))


def test_a_shifted_model_s_are_too(tmp_path):
    folder = write_checkpoint(tmp_path / "dream", random_plain(CONFIGS["dream"]))
    model = pydllm.load(folder, device="cpu")
    prompts = [[1, 2, 3], [4]]
    got = extract(model, prompts, max_new_tokens=10, block_length=4, score="entropy")
    plain = pydllm.generate(
        model, prompts, pydllm.Static(block_length=4, score="entropy"), max_new_tokens=10
    )
    for row, sequence in enumerate(plain.sequences):
        assert torch.equal(got.ids[row, : len(sequence)].long(), sequence)
    assert got.prompt_length.tolist() == [3, 1]


def test_a_rejected_answer_is_tried_again_and_dropped_with_its_trajectory(teacher, trajectories):
    tries = []

    def accept(row, text):
        tries.append((row, text))
        return row == 1

    options = {"max_new_tokens": 48, "block_length": 24, "temperatures": (0.0, 0.4)}
    kept = extract(teacher, PROMPTS, accept=accept, **options)
    assert [row for row, _ in tries] == [0, 1, 0]
    assert torch.equal(kept.step_map, trajectories.step_map[1:])
    assert kept.ids[0, : kept.prompt_length[0] + 48].tolist() == (
        trajectories.ids[1, : trajectories.prompt_length[1] + 48].tolist()
    )
    nothing = extract(teacher, PROMPTS[:1], accept=lambda row, text: False, **options)
    assert len(nothing) == 0 and len(join([nothing, kept])) == 1


def test_files_keep_everything(tmp_path, trajectories):
    save_trajectories(trajectories, tmp_path / "a.safetensors")
    loaded = load_trajectories(tmp_path / "a.safetensors", 92)
    for name, tensor in vars(trajectories).items():
        assert torch.equal(getattr(loaded, name), tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.full((2, 9), 92, dtype=torch.int32)}, r"token ids in \[0, 92\)"),
        ({"ids": torch.zeros(2, 9)}, "found .*float32"),
        ({"step_map": torch.zeros(2, 4, dtype=torch.int16)}, "each of the n steps once"),
        ({"prompt_length": torch.full((2,), 6, dtype=torch.int32)}, "prompt_length: expected at m"),
        ({"prompt_length": torch.ones(3, dtype=torch.int32)}, r"expected \(N, L\), \(N\) and"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    tensors = {
        "ids": torch.zeros(2, 9, dtype=torch.int32),
        "prompt_length": torch.ones(2, dtype=torch.int32),
        "step_map": torch.arange(4, dtype=torch.int16).repeat(2, 1),
    }
    save_file(tensors | change, tmp_path / "a.safetensors")
    with pytest.raises(pydllm.CheckpointError, match=message):
        load_trajectories(tmp_path / "a.safetensors", 92)
    (tmp_path / "b.safetensors").write_bytes(b"none")
    with pytest.raises(pydllm.CheckpointError, match="expected a file of trajectories"):
        load_trajectories(tmp_path / "b.safetensors", 92)


def test_bad_arguments(teacher):
    with pytest.raises(ValueError, match="max_new_tokens: expected at most 32767, got 40000"):
        extract(teacher, PROMPTS, max_new_tokens=40000)
    with pytest.raises(ValueError, match="temperatures: expected at least one"):
        extract(teacher, PROMPTS, max_new_tokens=48, temperatures=())
    part = extract(teacher, PROMPTS[:1], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"one answer length, got \[2, 3\]"):
        join([part, extract(teacher, PROMPTS[:1], max_new_tokens=3)])


def test_prompts_and_their_answers(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "answer": 7}\n\n{"prompt": [1, 2]}\n')
    prompts = read_prompts(path)
    assert prompts == [Prompt("a", "7"), Prompt([1, 2], None)]
    accept = answer_checker(prompts[:1], r"answer (\d+)")
    assert accept(0, "answer 3 no answer 7") and not accept(0, "answer 7 no answer 3")
    assert not accept(0, "nothing") and answer_checker(prompts, None) is None
    for pattern, message in (("(", "regular"), ("(a)(b)", "at most one"), ("a", "in each line")):
        with pytest.raises(ValueError, match=message):
            answer_checker(prompts, pattern)
