"""d3LLM's trajectory data as training data, on records in its form that are made here."""

import json

import pytest
import torch
from click.testing import CliRunner

import pydllm
from pydllm.cli import main
from pydllm.demo import WEIGHTS
from pydllm.distill import extract, read_published

PROMPTS = [
    "sam has 7 coins . he finds 5 . how many coins ? in order",
    "sam has 4 cards . how many cards ? each once",
    "tom has 3 cards . how many cards ? in order",
]
NEW, MASK = 48, 0


@pytest.fixture(scope="module")
def teacher():
    return pydllm.load(WEIGHTS, device="cpu")


@pytest.fixture(scope="module")
def records(teacher):
    """What d3LLM's scripts write: the sequence after every step, everything decoded."""
    found = []
    static = pydllm.Static(block_length=24)
    for number, text in enumerate(PROMPTS):
        prompt, states = teacher.tokenizer.encode(text).ids, []

        def keep(step, states=states):
            states.append(step.x[0].tolist())

        pydllm.generate(
            teacher, [prompt], static, max_new_tokens=NEW, ignore_eos=True, on_step=keep
        )
        found.append(
            {
                "idx": number,
                "question": text,
                "prompt_ids": prompt,
                "trajectory": states,
                "final_output": states[-1],
                "generated_text": "",
                "llm_answer": "5",
                "gt_answer": "5",
                "is_correct": number != 1,
            }
        )
    return found


def write(path, records):
    path.write_text(json.dumps(records))
    return path


def test_the_order_is_the_recorded_one(tmp_path, records):
    """Read back by the definition: a position is a mask in the state after step j if its step is
    greater than j."""
    found = read_published([write(tmp_path / "trajectory_part_0.json", records)])
    assert (found.records, found.incorrect, found.empty, found.mask_id) == (3, 1, 0, MASK)
    assert len(found.trajectories) == 2
    for row, record in enumerate([records[0], records[2]]):
        length = int(found.trajectories.prompt_length[row])
        assert length == len(record["prompt_ids"])
        ids = found.trajectories.ids[row, : length + NEW].tolist()
        assert ids == record["final_output"]
        steps = found.trajectories.step_map[row].tolist()
        for j, state in enumerate(record["trajectory"]):
            assert [step > j for step in steps] == [token == MASK for token in state[length:]]


def test_it_is_what_the_teacher_would_have_given(tmp_path, teacher, records):
    """Where nothing follows an EOS, the two ways to trajectories are one."""
    found = read_published([write(tmp_path / "a.json", records)], keep_incorrect=True)
    own = extract(teacher, PROMPTS, max_new_tokens=NEW, block_length=24)
    assert torch.equal(found.trajectories.prompt_length, own.prompt_length)
    compared = 0
    for row in range(3):
        length = int(own.prompt_length[row])
        answer = own.ids[row, length : length + NEW].tolist()
        end = answer.index(teacher.spec.eos_ids[0])
        ours = found.trajectories.step_map[row, :end].argsort()
        assert torch.equal(ours, own.step_map[row, :end].argsort())
        compared += end
        assert found.trajectories.ids[row, length : length + end].tolist() == answer[:end]
    assert compared > 4


def test_folders_lines_and_shorter_answers(tmp_path, records):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "trajectory_part_0.json", records[:1])
    (folder / "b.jsonl").write_text(f"{json.dumps(records[2])}\n\n")
    write(folder / "dataset_info.json", {})
    found = read_published([folder], max_new_tokens=10)
    whole = read_published([folder])
    assert found.records == 2 and found.trajectories.step_map.shape == (2, 10)
    order = whole.trajectories.step_map[:, :10].argsort()
    assert torch.equal(found.trajectories.step_map.argsort(), order)


def test_records_without_a_trajectory_are_counted(tmp_path, records):
    masked = json.loads(json.dumps(records[2]))
    masked["final_output"][-1] = MASK
    for state in masked["trajectory"]:
        state[-1] = MASK
    given = [records[0] | {"trajectory": []}, records[0], masked]
    found = read_published([write(tmp_path / "a.json", given)])
    assert (found.records, found.empty, len(found.trajectories)) == (3, 2, 1)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables(tmp_path, records, kind):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = arrow.Table.from_pylist(records)
    path = tmp_path / f"data-00000-of-00001.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        with arrow.OSFile(str(path), "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
        write(tmp_path / "state.json", {})
    wanted = read_published([write(tmp_path / "x.jsonl", records[0])], keep_incorrect=True)
    path.with_suffix(".jsonl").unlink(missing_ok=True)
    (tmp_path / "x.jsonl").unlink()
    found = read_published([tmp_path], keep_incorrect=True)
    assert found.records == 3
    assert torch.equal(found.trajectories.step_map[:1], wanted.trajectories.step_map)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trajectory": None, "prompt_ids": ...}, "found none of the name prompt_ids"),
        ({"trajectory": [[1, 2], [1]]}, "record 0: expected lists of token ids"),
        ({"trajectory": [[1, 2]]}, r"trajectory \(steps, P \+ n\), found"),
        ({"final_output": [1.5]}, "expected token ids"),
        ({"prompt_ids": [1]}, "expected to begin with prompt_ids"),
        ({"trajectory": ..., "final_output": ...}, "found none of the name trajectory"),
    ],
)
def test_damaged_records_are_named(tmp_path, records, changes, message):
    record = {k: v for k, v in (records[0] | changes).items() if v is not ...}
    with pytest.raises(pydllm.CheckpointError, match=message):
        read_published([write(tmp_path / "a.json", [record])])


def test_a_token_that_changes_is_refused(tmp_path, records):
    record = json.loads(json.dumps(records[0]))
    record["trajectory"][0], record["trajectory"][-1] = (
        record["trajectory"][-1],
        record["trajectory"][0],
    )
    with pytest.raises(pydllm.CheckpointError, match="no token to change"):
        read_published([write(tmp_path / "a.json", [record])])
    with pytest.raises(pydllm.CheckpointError, match="expected an answer of 50 tokens, found 48"):
        read_published([write(tmp_path / "b.json", records)], max_new_tokens=50)
    with pytest.raises(ValueError, match=r"ending in .json, .jsonl, .parquet, .arrow, got "):
        read_published([tmp_path / "none.json"])
    with pytest.raises(pydllm.CheckpointError, match="expected a list of records, got dict"):
        read_published([write(tmp_path / "c.json", records[0])])


def distill(out, *more):
    small = ("--max-new-tokens", "24", "--windows", "12", "--batch-size", "2", "--device", "cpu")
    small += ("--accumulation", "1", "--lora-rank", "0", "--steps", "1")
    arguments = ["distill", "--teacher", WEIGHTS.name, "--out", str(out), *small, *more]
    return CliRunner().invoke(main, arguments)


def test_the_command_trains_on_them(tmp_path, records):
    data = ("--trajectories", str(write(tmp_path / "a.json", records)))
    result = distill(tmp_path / "out", *data)
    assert result.exit_code == 0, result.output
    assert "2 of 3 trajectories" in result.output
    assert pydllm.load(tmp_path / "out", device="cpu").spec.mask_id == MASK
    again = distill(tmp_path / "out", *data, "--keep-incorrect")
    assert again.exit_code == 1 and "other settings" in " ".join(again.output.split())


def test_the_command_refuses(tmp_path, records):
    data = ("--trajectories", str(write(tmp_path / "a.json", records)))
    other = [json.loads(json.dumps(records[0]).replace(" 0", " 85"))]
    foreign = ("--trajectories", str(write(tmp_path / "b.json", other)))
    for more, message in {
        (): "expected this or --trajectories, got both or neither",
        (*data, "--data", "x.jsonl"): "expected this or --trajectories, got both or neither",
        (*data, "--answer-pattern", "x"): "--answer-pattern: expected none with --trajectories",
        (*data, "--max-new-tokens", "64"): "expected an answer of 64 tokens, found 48",
        foreign: "expected the teacher's mask 0, got 85",
    }.items():
        result = distill(tmp_path / "out", *more)
        assert result.exit_code == 1, result.output
        assert message in " ".join(result.output.split()), result.output
        assert not (tmp_path / "out").exists()
