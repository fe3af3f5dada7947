"""lm-evaluation-harness itself, offline, on tasks made of the demo's problems."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

import pydllm
from pydllm.cli import main
from pydllm.demo import MODELS, VERIFIER
from pydllm.metrics import read_points
from tests.integrations import harness_tasks

ROOT = Path(__file__).parents[2]
HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="lm-eval is not installed ([eval])")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    harness_tasks.write(folder, 8)
    return folder


def _run(tasks, out, names, *arguments, command=("-m", "pydllm", "lm-eval")):
    """The harness in a process of its own, without a network; its results, and the process."""
    settings = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "hub")}
    settings |= {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    options = ("--tasks", names, "--include_path", tasks, "--output_path", out, "--log_samples")
    done = subprocess.run(
        [sys.executable, *command, *map(str, options), *map(str, arguments)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    files = list(out.rglob("results_*.json"))
    return (json.loads(files[0].read_text()), files[0]) if files else None, done


@needs_harness
def test_two_processes_share_the_requests(tasks, tmp_path):
    """Answers at a temperature and what they cost are those of one process."""
    arguments = ("--model_args", "pretrained=llada-tiny,block_length=24,max_length=96")
    sampling = ("--gen_kwargs", "temperature=0.7,top_p=0.9,do_sample=True")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    found = []
    for number, start in enumerate(((), launch)):
        out = tmp_path / str(number)
        command = (*start, "-m", "pydllm", "lm-eval")
        values, done = _run(tasks, out, "word_problems", *arguments, *sampling, command=command)
        assert values is not None, done.stdout[-2000:] + done.stderr[-4000:]
        row = values[0]["config"]["pydllm"]["tasks"]["word_problems"]
        logged = next(out.rglob("samples_word_problems_20*.jsonl")).read_text().splitlines()
        answers = {record["doc_id"]: record["resps"] for record in map(json.loads, logged)}
        costs = {name: row[name] for name in ("requests", "tokens", "forwards")}
        found.append((values[0]["results"]["word_problems"]["exact_match,last"], answers, costs))
    assert len(found[0][1]) == 8
    assert found[0] == found[1]


@needs_harness
def test_the_harness_runs_every_kind_of_task(tasks, tmp_path):
    arguments = f"pretrained={MODELS['llada-tiny']},algorithm=freedave,draft_steps=8"
    names = "word_problems,word_problems_choice,word_problems_text"
    found, done = _run(
        tasks,
        tmp_path,
        names,
        *("--model_args", f"{arguments},block_length=24,mc_num=4,max_length=96"),
        *("--batch_size", "3"),
    )
    assert found is not None, done.stdout[-2000:] + done.stderr[-4000:]
    values, file = found
    assert values["results"]["word_problems"]["exact_match,last"] >= 0.75
    assert values["results"]["word_problems_choice"]["acc,none"] >= 0.75
    assert values["results"]["word_problems_text"]["word_perplexity,none"] > 1
    facts = values["config"]["pydllm"]
    assert facts["algorithm"] == "freedave" and facts["settings"]["draft_steps"] == "8"

    model = pydllm.load(MODELS["llada-tiny"], device="cpu")
    prompts = [document["prompt"] for document in harness_tasks.documents(8)]
    want = pydllm.generate(
        model, prompts, pydllm.FreeDave(draft_steps=8, block_length=24), max_new_tokens=48
    )
    row = facts["tasks"]["word_problems"]
    assert row["requests"] == 8 and row["forwards"] == want.nfe.sum()
    rate = want.tokens_per_forward.mean().item()
    assert abs(row["tokens_per_forward"] - rate) < 1e-3
    logged = next(tmp_path.rglob("samples_word_problems_20*.jsonl")).read_text().splitlines()
    answers = {record["doc_id"]: record["resps"][0][0] for record in map(json.loads, logged)}
    assert [answers[i] for i in range(8)] == [text.partition("sam")[0] for text in want.text]

    points = read_points(file)
    accuracy = 100 * values["results"]["word_problems"]["exact_match,last"]
    assert points == {
        "llada-tiny freedave": {"word_problems": [(row["tokens_per_forward"], accuracy)]}
    }
    scored = CliRunner().invoke(main, ["aup", str(file), "--out", str(tmp_path / "aup"), "--json"])
    assert scored.exit_code == 0, scored.output


@needs_harness
def test_its_own_command_line_finds_the_model_when_the_module_is_imported(tasks, tmp_path):
    """What ``lm_eval`` does in releases that read entry points: import, look up, construct."""
    from lm_eval.api.registry import get_model

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    target = declared["lm_eval.models"]["pydllm"]
    entry = importlib.metadata.EntryPoint("pydllm", target, "lm_eval.models")
    kind = entry.load()
    assert get_model("pydllm") is kind
    arguments = f"pretrained={MODELS['llada-tiny']},algorithm=apd,verifier={VERIFIER},window=none"
    model = kind.create_from_arg_string(arguments, {"device": "cpu", "batch_size": 2})
    assert model.algorithm == "apd" and model.evaluator.algorithm.window is None
    with pytest.raises(ValueError, match="apd takes mixture, window, .*; got 'speed'"):
        kind.create_from_arg_string(f"{arguments},speed=3")
    with pytest.raises(ValueError, match="batch_size: expected a number, got 'auto'"):
        kind.create_from_arg_string(arguments, {"batch_size": "auto"})


@needs_harness
def test_a_chat_template_is_the_checkpoints_own(tmp_path):
    from pydllm.integrations.harness import PydllmLM

    for file in MODELS["llada-tiny"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    model = PydllmLM(str(tmp_path), device="cpu")
    with pytest.raises(pydllm.CheckpointError, match="tokenizer_config.json"):
        model.chat_template(True)
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}answer{% endif %}"
    )
    config = {"chat_template": template, "bos_token": {"content": "<eos>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert model.chat_template(False) is None
    assert model.chat_template(True) == template
    history = [{"role": "tom", "content": "how many coins ?"}]
    assert model.apply_chat_template(history) == "<eos>tom : how many coins ? answer"
    assert model.apply_chat_template(history, False) == "<eos>tom : how many coins ? "


@pytest.mark.skipif(HAS_HARNESS, reason="lm-eval is installed")
def test_without_the_harness_the_command_says_what_to_install():
    result = CliRunner().invoke(main, ["lm-eval", "--tasks", "gsm8k"])
    assert result.exit_code == 1
    assert "pip install 'pydllm[eval]'" in result.output and "Traceback" not in result.output
