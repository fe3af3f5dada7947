"""Two decoding functions side by side: what they may return, what is counted, what goes wrong."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F

import pydllm
from pydllm.cli import main
from pydllm.demo import MODELS
from pydllm.demo.task import held_out_problems
from pydllm.integrations.compare import compare, load_callable
from pydllm.integrations.entrypoint import find_function, read_sequences

CODE = '''
"""A published-style loop, and pydllm in its place."""
import copy
import dataclasses

import torch
from torch.nn import functional as F

import pydllm


@torch.no_grad()
def published(model, prompt, gen_length=24, block_length=24, per_step=1):
    x = F.pad(prompt, (0, gen_length), value=0)
    for _ in range(gen_length // per_step):
        logits = model(x).logits
        token = logits.argmax(-1)
        score = F.softmax(logits.double(), -1).gather(-1, token[..., None])[..., 0]
        chosen = torch.where(x == 0, score, -torch.inf).topk(per_step).indices
        x.scatter_(1, chosen, token.gather(1, chosen))
    return x


def ours(model, prompt, gen_length=24, block_length=24, per_step=1):
    model = copy.copy(model)
    model.spec = dataclasses.replace(model.spec, eos_ids=())
    algorithm = pydllm.Static(block_length=block_length, tokens_per_step=per_step)
    return pydllm.generate(model, list(prompt), algorithm, max_new_tokens=gen_length)


class Bound:
    @staticmethod
    def wrong(model, prompt, gen_length=24):
        return torch.full((len(prompt), gen_length), 7), 3


def words(model, prompt):
    return "no tokens"


def few(model, prompt):
    return prompt[:1]


def load(folder):
    from pydllm.integrations.compare import load_callable
    return load_callable(folder, "cpu")


def plain_load(folder):
    return pydllm.load(folder, device="cpu")


def without_device(folder):
    return object()


NUMBER = 3
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "their_code.py"
    path.write_text(CODE)
    return path


@pytest.fixture(scope="module")
def model():
    return load_callable(str(MODELS["llada-tiny"]), "cpu")


@pytest.fixture(scope="module")
def prompts(model):
    return [model.tokenizer.encode(p.prompt).ids for p in held_out_problems(3)]


def _pair(file, *names):
    return {name: find_function(f"{file}:{name}") for name in names}


def test_the_same_decoding_is_the_same(file, model, prompts):
    seen = []
    result = compare(
        model,
        prompts,
        _pair(file, "published", "ours"),
        settings=({"per_step": 2}, {"per_step": 2}),
        repeat=1,
        on_call=lambda: seen.append(1),
    )
    assert result.equal_tokens == 1 and result.equal_prompts == 3
    assert result.first_difference is None
    assert result.original.forwards == result.patched.forwards == 3 * 12
    assert all(len(answer) == 24 for answer in result.original.answers)
    assert len(seen) == 2 * 2 * 3
    original, patched = result.rows()
    assert original["speedup"] == original["equal_tokens"] == patched["equal_tokens"] == 1
    assert patched["speedup"] == pytest.approx(result.speedup, rel=1e-2)
    per_forward = 1e3 * result.patched.seconds / 36
    assert patched["ms_per_forward"] == pytest.approx(per_forward, abs=1e-3)


def test_differences_are_found(file, model, prompts):
    settings = ({"per_step": 1}, {"per_step": 24})
    result = compare(model, prompts, _pair(file, "published", "ours"), settings=settings, repeat=1)
    one, other = result.original.answers, result.patched.answers
    pairs = [
        (i, j) for i in range(3) for j in range(24) if one[i][j] != other[i][j]
    ]  # all tokens in one step cannot all be right
    assert pairs and result.first_difference == pairs[0]
    assert result.equal_tokens == pytest.approx(1 - len(pairs) / 72)
    assert result.patched.forwards == 3


def test_prompts_of_one_length_share_a_call(file, model, prompts):
    same = [prompts[0], prompts[1], prompts[0], prompts[0]]
    seen = []

    def spy(model, ids):
        seen.append(tuple(ids.shape))
        return ids

    result = compare(model, same, {"a": spy, "b": spy}, batch_size=2, repeat=1)
    length, other = len(prompts[0]), len(prompts[1])
    assert sorted(seen[:3]) == sorted([(2, length), (1, length), (1, other)])
    assert result.original.answers == [[], [], [], []]
    assert result.original.forwards is None and result.rows()[0]["forwards"] == ""


def test_a_modules_own_forwards_are_counted_whoever_makes_them(prompts):
    """A module beside a verifier, and ours on the module's weights: one embedding is theirs."""

    class Module(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.wte = torch.nn.Embedding(200, 4)

        def forward(self, ids):
            return self.wte(ids)

    module, verifier = Module(), torch.nn.Embedding(200, 4)

    def theirs(model, ids):
        verifier(ids)
        model(ids), model(ids)
        return ids

    def ours(model, ids):
        F.embedding(ids, model.wte.weight.detach())
        return ids

    result = compare(module, prompts, {"theirs": theirs, "ours": ours}, repeat=1)
    assert (result.original.forwards, result.patched.forwards) == (6, 3)


def test_prepare_is_undone(file, model, prompts):
    events = []

    def prepare(model):
        events.append("patch")
        return SimpleNamespace(restore=lambda: events.append("restore"))

    def look(model, ids):
        events.append("call")
        return ids

    compare(model, prompts[:1], {"a": look, "b": look}, repeat=1, prepare=prepare)
    assert events == ["call", "patch", "call", "restore"] * 2


ROWS = [[3, 4], [5, 6]]
RETURNED = {
    "tensor": (torch.tensor(ROWS), ROWS, None),
    "one sequence": (torch.tensor(ROWS[0]), ROWS[:1], None),
    "with forwards": ((torch.tensor(ROWS), 7), ROWS, 7),
    "with a tensor of forwards": ((torch.tensor(ROWS), torch.tensor([7])), ROWS, 7),
    "output": (SimpleNamespace(sequences=torch.tensor(ROWS)), ROWS, None),
    "output with forwards": ((SimpleNamespace(sequences=torch.tensor(ROWS)), 9), ROWS, 9),
    "ours": (
        SimpleNamespace(sequences=[torch.tensor(ROWS[0])], nfe=torch.tensor([4])),
        ROWS[:1],
        4,
    ),
    "tensors": ([torch.tensor([3]), torch.tensor([5, 6])], [[3], [5, 6]], None),
    "two tensors": ((torch.tensor([3, 4]), torch.tensor([5, 6])), ROWS, None),
    "lists": (ROWS, ROWS, None),
    "ids": ([3, 4], [[3, 4]], None),
    "by index": ({1: torch.tensor([5]), 0: torch.tensor([3])}, [[3], [5]], None),
}


@pytest.mark.parametrize(("value", "rows", "forwards"), RETURNED.values(), ids=RETURNED.keys())
def test_what_may_be_returned(value, rows, forwards):
    assert read_sequences(value, "f") == (rows, forwards)


@pytest.mark.parametrize("value", [None, "text", 3, [], [["a"]], (torch.tensor([1]), "x")])
def test_what_may_not_be_returned(value):
    with pytest.raises(pydllm.PydllmError, match="f: expected a tensor of token ids, .tensor, for"):
        read_sequences(value, "f")
    with pytest.raises(pydllm.PydllmError, match=r"expected token ids \(B, L\), got \(2, 3\)"):
        read_sequences(torch.zeros(2, 3), "f")


def _run(*arguments):
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def test_the_command(file, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    text = held_out_problems(1)[0].prompt
    prompts.write_text(f"{text}\n{json.dumps({'prompt': text})}\n[20, 21, 22]\n\n")
    options = ("--original", f"{file}:published", "--patched", f"{file}:ours", "--strict")
    options += ("--set", "per_step=3", "--prompts", prompts, "--repeat", 1, "--batch", 2)
    result = _run(*options, "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    original, patched = json.loads(result.stdout.splitlines()[-1])
    assert original["prompts"] == 3 and original["forwards"] == patched["forwards"] == 16
    assert patched["equal_tokens"] == 1.0
    rows = list(csv.DictReader((tmp_path / "side-by-side.csv").open()))
    assert [row["function"] for row in rows] == [f"{file}:published", f"{file}:ours"]
    folder = str(MODELS["llada-tiny"])
    again = _run(*options, "--out", tmp_path, "--model", folder, "--loader", f"{file}:load")
    assert again.exit_code == 0, again.output
    assert "written:" in again.output and "equal_tokens" in again.output
    same = _run(
        *(
            "--original",
            f"{file}:ours",
            "--patched",
            f"{file}:ours",
            "--set-patched",
            "per_step=24",
        ),
        *("--problems", 2, "--repeat", 1, "--out", tmp_path, "--strict"),
    )
    assert same.exit_code == 1 and "first difference: prompt 0, token" in same.output
    assert "Error: expected equal tokens" in same.output


@pytest.mark.parametrize(
    ("original", "more", "code", "message"),
    [
        (
            "no_such_module:generate",
            (),
            1,
            "no_such_module: cannot be imported: ModuleNotFoundError",
        ),
        ("/no/such/file.py:f", (), 1, "cannot be imported: FileNotFoundError: no such file"),
        ("{}:missing", (), 1, "expected a function of {} (there are Bound, few, load, ours,"),
        ("{}:NUMBER", (), 1, "expected a function, got int"),
        ("published", (), 1, "published: expected module:function or file.py:function"),
        ("{}:words", (), 1, "{}:words: expected a tensor of token ids"),
        ("{}:few", ("--batch", 2, "--prompts", "{twice}"), 1, "expected 2 sequences, got 1"),
        ("{}:ours", ("--set", "per_step"), 2, "expected NAME=VALUE, got 'per_step'"),
        ("{}:ours", ("--prompts", "/no/prompts"), 1, "/no/prompts: expected a text file"),
        ("{}:ours", ("--prompts", "{bad}"), 1, ":2: expected text or token ids, got '[1, 2.5]'"),
        ("{}:ours", ("--model", "/no/model"), 2, "expected --prompts with --model /no/model"),
        (
            "{}:published",
            ("--loader", "{file}:plain_load"),
            1,
            "{}:published: expected a callable model from --loader, since this function calls it, "
            "got NativeModel",
        ),
        (
            "{}:ours",
            ("--loader", "{file}:without_device"),
            1,
            "expected a model with a `device`, got",
        ),
        ("{}:ours", ("--sweep", "static"), 2, "expected --sweep, or --original and --patched"),
    ],
)
def test_what_goes_wrong_is_said(file, tmp_path, original, more, code, message):
    twice, bad = tmp_path / "twice.txt", tmp_path / "bad.txt"
    twice.write_text("[20, 21]\n[20, 22]\n")
    bad.write_text("[20, 21]\n[1, 2.5]\n")
    more = [str(part).format(twice=twice, bad=bad, file=file) for part in more]
    patched = f"{file}:Bound.wrong"
    result = _run(
        *("--original", original.format(file), "--patched", patched, "--problems", 1),
        *("--repeat", 1, "--out", tmp_path, *more),
    )
    assert result.exit_code == code, result.output
    shown = " ".join(result.output.replace("│", " ").split())
    assert " ".join(message.format(file).split()) in shown
    assert "Traceback" not in result.output


def test_the_sweep_needs_a_bundled_model():
    result = _run("--sweep", "static", "--model", "/somewhere")
    assert result.exit_code == 2 and "expected one of llada-tiny" in result.output
    assert _run().exit_code == 2
