"""Batch jobs: nothing lost, nothing twice, whatever stops them."""

import errno
import hashlib
import json
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from pydllm import PydllmError, generate
from pydllm.cli import main
from pydllm.demo import VERIFIER, WEIGHTS
from pydllm.demo.task import held_out_problems
from pydllm.integrations.jobs import Job, Recipe, Worker, run_job
from pydllm.integrations.jobs import run as running
from pydllm.integrations.jobs import worker as working
from pydllm.integrations.jobs.worker import fingerprint

# In fp64 an answer does not depend on the height of a batch's matrices.
RECIPE = Recipe(
    model=str(WEIGHTS),
    algorithm="threshold",
    settings=(("threshold", "0.9"), ("block_length", "16")),
    verifier=str(VERIFIER),
    max_new_tokens=32,
    temperature=0.5,
    seed=7,
    dtype="float64",
    backend=None,
)
POISON = {"prompt": "a prompt of words that the tokenizer does not know"}


def write_data(path, count, poison=()):
    """``count`` prompts; at ``poison`` lines are prompts that nothing can answer."""
    lines = [
        json.dumps({"id": f"p{index}", "prompt": problem.prompt})
        for index, problem in enumerate(held_out_problems(count))
    ]
    for index, line in poison:
        lines[index] = line
    path.write_text("\n".join(lines) + "\n")
    return path


def results(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def a_part_per_batch(monkeypatch):
    monkeypatch.setattr(running, "CALL", 1)


def test_waiting_rows_take_the_slots_of_finished_ones(tmp_path, monkeypatch):
    data = write_data(tmp_path / "x.jsonl", 7)
    apart = run_job(data, tmp_path / "apart", RECIPE, batch_size=2)
    calls = []

    def watched(model, prompts, *arguments, **options):
        calls.append((len(prompts), options["max_batch"]))
        return generate(model, prompts, *arguments, **options)

    monkeypatch.setattr(working, "generate", watched)
    monkeypatch.setattr(running, "CALL", 3)
    together = run_job(data, tmp_path / "together", RECIPE, batch_size=2)
    assert calls == [(6, 2), (1, 2)] and together.sha256 == apart.sha256


def test_a_job_answers_every_row_in_order(tmp_path):
    data = write_data(tmp_path / "x.jsonl", 7)
    seen = []
    summary = run_job(
        data, tmp_path / "a", RECIPE, batch_size=3, progress=lambda *done: seen.append(done)
    )
    assert (summary.rows, summary.failed, summary.resumed) == (7, 0, 0)
    assert seen == [(3, 0), (6, 0), (7, 0)]
    records = results(tmp_path / "a")
    assert [record["id"] for record in records] == [f"p{index}" for index in range(7)]
    assert all(record["text"] and record["nfe"] > 0 for record in records)
    # Another batch size: the same answers, byte for byte.
    other = run_job(data, tmp_path / "b", RECIPE, batch_size=2)
    assert other.sha256 == summary.sha256
    text = (tmp_path / "a" / "results.jsonl").read_bytes()
    assert hashlib.sha256(text).hexdigest() == summary.sha256


def test_a_job_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    data = write_data(tmp_path / "x.jsonl", 7)
    whole = run_job(data, tmp_path / "whole", RECIPE, batch_size=3)

    class Failing(Worker):
        def __call__(self, rows):
            if any(self.parts.iterdir()):
                raise KeyboardInterrupt
            return super().__call__(rows)

    monkeypatch.setattr(running, "Worker", Failing)
    with pytest.raises(KeyboardInterrupt):
        run_job(data, tmp_path / "cut", RECIPE, batch_size=3)
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "results.jsonl").exists()
    with pytest.raises(PydllmError, match="expected 7 rows, got 3: run the same command again"):
        Job(data, tmp_path / "cut", RECIPE.as_json()).finish()
    resumed = run_job(data, tmp_path / "cut", RECIPE, batch_size=4)
    assert resumed.resumed == 3 and resumed.sha256 == whole.sha256
    again = run_job(data, tmp_path / "cut", RECIPE)  # nothing left: no model is loaded
    assert again.resumed == 7 and again.sha256 == whole.sha256


def test_poisoned_rows_are_reported_and_the_others_answered(tmp_path):
    long = json.dumps({"id": "long", "prompt": [5] * 200})
    poison = [(1, json.dumps(POISON)), (3, "{not json"), (4, long), (5, '{"id": 9, "prompt": 3}')]
    data = write_data(tmp_path / "x.jsonl", 8, poison)
    clean = run_job(write_data(tmp_path / "y.jsonl", 8), tmp_path / "clean", RECIPE)
    summary = run_job(data, tmp_path / "out", RECIPE, batch_size=8)
    assert (summary.rows, summary.failed) == (8, 4) and clean.failed == 0
    good, found = results(tmp_path / "clean"), results(tmp_path / "out")
    errors = {record["index"]: record["error"] for record in found if "error" in record}
    assert errors.keys() == {1, 3, 4, 5}
    assert "prompt: expected text that the tokenizer can encode" in errors[1]
    assert errors[3].startswith("line 4: expected a JSON object with a 'prompt'")
    assert "got b'{not json' (Expecting property name" in errors[3]
    assert "expected at most 128 positions" in errors[4]
    assert errors[5].endswith("text or token ids, got the prompt 3")
    assert [r for r in found if "error" not in r] == [good[index] for index in (0, 2, 6, 7)]


def test_lines_that_are_no_rows(tmp_path):
    """Blank ones are left out; NaN is not JSON; deep nesting is one row's error, not the job's."""
    lines = ["", '{"id": NaN, "prompt": "tom"}', "   ", '{"prompt": ' + "[" * 100_000, "[1]", ""]
    data = tmp_path / "x.jsonl"
    data.write_text("\n".join([*lines, json.dumps({"prompt": [5, 6], "id": "last"})]) + "\n\n")
    summary = run_job(data, tmp_path / "out", RECIPE)
    assert (summary.rows, summary.failed) == (4, 3)

    def no_constant(name):
        raise AssertionError(name)

    text = (tmp_path / "out" / "results.jsonl").read_text()
    found = [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]
    assert [record["index"] for record in found] == [1, 3, 4, 6]
    for record, got in zip(found, ("got NaN", "nested too deeply", "got list"), strict=False):
        assert record["error"].endswith(got)
        assert record["error"].startswith(f"line {record['index'] + 1}: expected a JSON object")


def test_changed_weights_are_another_job(tmp_path):
    """In place: the same folder, the same sizes; a copy elsewhere has the same fingerprint."""
    model, copy = tmp_path / "model", tmp_path / "copy"
    shutil.copytree(WEIGHTS, model)
    data = write_data(tmp_path / "x.jsonl", 2)
    recipe = replace(RECIPE, model=str(model))
    run_job(data, tmp_path / "out", recipe)
    shutil.copytree(model, copy)
    assert fingerprint(copy) == fingerprint(model) == fingerprint(WEIGHTS)
    tensors = load_file(model / "model.safetensors")
    name = min(tensors)
    save_file(tensors | {name: tensors[name] * 1.01}, model / "model.safetensors")
    with pytest.raises(PydllmError, match="another job: fingerprint of the model was"):
        run_job(data, tmp_path / "out", recipe)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    assert fingerprint(copy) != fingerprint(WEIGHTS)


def test_rows_that_failed_are_tried_again(tmp_path, monkeypatch):
    """An error that has gone, such as too little memory, is no answer."""
    data = write_data(tmp_path / "x.jsonl", 5)
    whole = run_job(data, tmp_path / "whole", RECIPE)

    def out_of_memory(model, prompts, *arguments, request_ids, **options):
        if 1 in request_ids or 3 in request_ids:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(model, prompts, *arguments, request_ids=request_ids, **options)

    monkeypatch.setattr(working, "generate", out_of_memory)
    first = run_job(data, tmp_path / "out", RECIPE, batch_size=5)
    assert (first.failed, first.resumed) == (2, 0)
    monkeypatch.undo()
    second = run_job(data, tmp_path / "out", RECIPE)
    assert (second.failed, second.resumed, second.sha256) == (0, 3, whole.sha256)


@pytest.mark.parametrize(
    "file, text",
    [
        *(("job.json", text) for text in ("", "{", "[1]", '{"no": 1}')),
        *(("parts/*.jsonl", text) for text in ("{", "[1]", '{"no": 1}\n')),
    ],
)
def test_damaged_files_are_named(tmp_path, file, text):
    data = write_data(tmp_path / "x.jsonl", 2)
    run_job(data, tmp_path / "out", RECIPE)
    (path,) = (tmp_path / "out").glob(file)
    path.write_text(text)
    with pytest.raises(PydllmError, match=f"{re.escape(str(path))}|holds another job"):
        run_job(data, tmp_path / "out", RECIPE)


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    data = write_data(tmp_path / "x.jsonl", 2)

    def full(self, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(PydllmError, match="job.json: cannot be written: No space left on device"):
        run_job(data, tmp_path / "out", RECIPE)


def test_a_job_without_an_answer_fails(tmp_path):
    data = tmp_path / "x.jsonl"
    data.write_text(json.dumps(POISON) + "\n")
    arguments = ["generate", "--data", str(data), "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(main, [*arguments, "--max-new-tokens", "16"])
    assert done.exit_code == 1 and json.loads(done.stdout)["failed"] == 1
    assert "expected an answer to at least one of 1 rows, got none" in done.stderr


def test_another_job_does_not_mix_in(tmp_path):
    data = write_data(tmp_path / "x.jsonl", 2)
    run_job(data, tmp_path / "out", RECIPE)
    with pytest.raises(PydllmError, match="holds another job: seed was 7, is 8"):
        run_job(data, tmp_path / "out", replace(RECIPE, seed=8))
    with pytest.raises(PydllmError, match="sha256 of the prompts"):
        run_job(write_data(tmp_path / "y.jsonl", 3), tmp_path / "out", RECIPE)


def test_the_longest_prompts_come_first_and_a_batch_has_one_name(tmp_path):
    data = write_data(tmp_path / "x.jsonl", 9)
    job = Job(data, tmp_path / "out", {})
    lengths = [len(row.prompt) for batch in job.batches(4) for row in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in job.batches(4)] == [4, 4, 1]


BAD = {
    "no file": ({"data": "nothing.jsonl"}, PydllmError, "--data: expected a file of prompts"),
    "empty": ({"data": "empty.jsonl"}, PydllmError, "got an empty file"),
    "engine": ({"engine": "slurm"}, ValueError, "engine: expected one of process, ray"),
    "batch": ({"batch_size": 0}, ValueError, "batch_size: expected an int of at least 1, got 0"),
    "workers": ({"workers": 2}, ValueError, "workers: expected None, or at least 1 with Ray"),
    "algorithm": ({"algorithm": "beam"}, ValueError, "expected one of static, threshold"),
    "its check": ({"settings": (("threshold", "7"),)}, ValueError, "threshold"),
    "parameter": ({"settings": (("treshold", "0.9"),)}, ValueError, "got 'treshold'"),
    "model": ({"model": "no/such/folder"}, PydllmError, "expected a directory or a hub id"),
    "verifier": (
        {"algorithm": "A_P-D", "settings": (), "verifier": "no/such/folder"},
        PydllmError,
        "no/such/folder: expected a directory or a hub id",
    ),
    "temperature": ({"temperature": -1.0}, ValueError, "temperature: expected 0 or at least"),
    "tokens": ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected an int of at least 1"),
}


@pytest.mark.parametrize("changes, error, message", BAD.values(), ids=BAD.keys())
def test_bad_jobs_are_refused_whole(tmp_path, changes, error, message):
    """No row is blamed for what is wrong with the job."""
    from dataclasses import asdict

    (tmp_path / "empty.jsonl").touch()
    write_data(tmp_path / "x.jsonl", 2)
    recipe = asdict(RECIPE)
    recipe |= {key: changes.pop(key) for key in list(changes) if key in recipe}
    data = tmp_path / changes.pop("data", "x.jsonl")
    with pytest.raises(error, match=message.replace("(", r"\(")):
        run_job(data, tmp_path / "out", Recipe(**recipe), **changes)
    assert not (tmp_path / "out").exists()  # free for the corrected command


def without_weights(folder):
    """A recipe that only loading the model refuses."""
    folder.mkdir()
    (folder / "config.json").write_text((Path(RECIPE.model) / "config.json").read_text())
    return replace(RECIPE, model=str(folder))


def test_what_an_actor_refuses_leaves_no_trace(tmp_path):
    recipe = without_weights(tmp_path / "model")
    with pytest.raises(PydllmError, match="safetensors"):
        running._Actor(recipe, tmp_path / "out", {}, 1, None)
    assert not (tmp_path / "out").exists()


def test_the_command_line_runs_a_job(tmp_path):
    data = write_data(tmp_path / "x.jsonl", 3)
    arguments = ["generate", "--data", str(data), "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(main, [*arguments, "--max-new-tokens", "16", "--batch-size", "2"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"] == 3
    done = CliRunner().invoke(main, ["generate", "--data", str(data)])
    assert done.exit_code == 2 and "--data and --out together" in done.output


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="needs ray (pip install 'pydllm[ray]')")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray
    ray.shutdown()


def test_ray_gives_the_same_file(tmp_path, cluster):
    data = write_data(tmp_path / "x.jsonl", 9, [(4, json.dumps(POISON))])
    here = run_job(data, tmp_path / "here", RECIPE, batch_size=2)
    there = run_job(data, tmp_path / "there", RECIPE, batch_size=2, engine="ray", workers=2)
    assert (there.rows, there.failed, there.sha256) == (9, 1, here.sha256)


def test_what_a_worker_of_ray_refuses_leaves_no_trace(tmp_path, cluster):
    data = write_data(tmp_path / "x.jsonl", 2)
    with pytest.raises(Exception, match="safetensors"):  # Ray wraps it
        run_job(data, tmp_path / "out", without_weights(tmp_path / "model"), engine="ray")
    assert not (tmp_path / "out").exists()


def test_a_killed_worker_loses_and_duplicates_nothing(tmp_path, cluster):
    import psutil

    data = write_data(tmp_path / "x.jsonl", 60)
    here = run_job(data, tmp_path / "here", RECIPE, batch_size=2)
    killed = []

    def kill():
        parts = tmp_path / "there" / "parts"
        while not (parts.is_dir() and any(parts.glob("*.jsonl"))):
            time.sleep(0.01)
        for process in psutil.process_iter(["name", "cmdline"]):
            if any("MapWorker" in part for part in process.info["cmdline"] or []):
                process.kill()
                killed.append(process.pid)
                return

    thread = threading.Thread(target=kill)
    thread.start()
    there = run_job(data, tmp_path / "there", RECIPE, batch_size=2, engine="ray", workers=2)
    thread.join()
    assert len(killed) == 1
    assert (there.rows, there.failed, there.sha256) == (60, 0, here.sha256)
    indices = [
        record["index"] for record in Job(data, tmp_path / "there", RECIPE.as_json()).records()
    ]
    assert sorted(indices) == list(range(60))
