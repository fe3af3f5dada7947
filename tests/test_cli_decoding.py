"""``pydllm generate`` and ``pydllm chat`` as a user types them."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

import pydllm
from pydllm.cli import main
from pydllm.cli.watch import Watch
from pydllm.demo import WEIGHTS

PROMPT = "sam has 7 coins . he finds 5 . they double . he loses 3 . how many coins ? in order"
TEMPLATE = "{% for m in messages if m.role != 'system' %}{{ m.content }} {% endfor %}"


def run(*arguments, stdin=None):
    return CliRunner().invoke(main, arguments, input=stdin)


@pytest.fixture(scope="module")
def answer():
    model = pydllm.load("llada-tiny", device="cpu")
    return pydllm.generate(model, [PROMPT], pydllm.Threshold(), max_new_tokens=48).text[0]


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    return str(path)


def test_stream_prints_the_answer(answer):
    result = run("generate", "--prompt", PROMPT, "--stream", "--set", "block_length=8")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r".*answer 21\n", result.stdout)
    assert re.search(r"\[\d+ forwards, \d\.\d\d tokens per forward\]", result.stderr)
    two = run("generate", "--prompt", PROMPT, "--prompt", PROMPT, "--stream")
    for row in "01":
        pieces = re.findall(rf"^\[{row}\] (.*)$", two.stdout, re.MULTILINE)
        assert "".join(pieces) == answer


def test_watch_shows_each_forward(answer):
    result = run("generate", "--prompt", PROMPT, "--watch")
    assert result.stdout == f"{answer}\n"
    lines = [line for line in result.stderr.splitlines() if re.match(r" *\d+ ", line)]
    assert [int(line.split()[0]) for line in lines] == list(range(1, len(lines) + 1))
    masks = [line.count("\N{LIGHT SHADE}") for line in lines]
    assert masks[0] > 0 and masks[-1] == 0 and masks == sorted(masks, reverse=True)
    assert lines[-1].split(maxsplit=1)[1].strip() == answer


def test_a_chat(answer, template):
    lines = [
        PROMPT,
        "/algorithm freedave draft_steps=4",
        "/speed",
        "/reset",
        "",
        PROMPT,
        "/history",
    ]
    lines += ["/system be brief", "/history", "/quit", "never read"]
    options = ("--model", "llada-tiny", "--template", template, "--max-new-tokens", "48")
    result = run("chat", *options, stdin="\n".join(lines))
    assert result.exit_code == 0, result.output
    shown = result.stdout
    assert shown.count(f"\n{answer}\n[") == 2
    cost = r"\[21 tokens, [\d.]+ per second, \d+\.\d\d per forward, \d+ forwards, eos\]"
    assert len(re.findall(cost, shown)) == 2
    assert "[FreeDave(draft_steps=4, " in shown
    assert "[expected a command of /help, got /speed]" in shown
    assert f"user: {PROMPT}\nassistant: {answer}\n> /system be brief\n" in shown
    assert shown.endswith("> /history\nsystem: be brief\n> /quit\n")


def test_a_conversation_has_the_models_blocks(template):
    options = ("--model", "sdar-tiny", "--template", template, "--max-new-tokens", "8")
    result = run("chat", *options, stdin=f"{PROMPT}\n/algorithm static\n{PROMPT}\n")
    assert "[Static(block_length=8, " in result.stdout
    assert result.stdout.count("per second") == 2


def test_a_conversation_has_its_history(template):
    """The second question follows the first and its answer; one that does not fit is taken back."""
    options = ("--model", "llada-tiny", "--template", template, "--max-new-tokens", "8")
    result = run("chat", *options, stdin=f"tom\n{f'{PROMPT} ' * 20}\nunknown words\n/history\n")
    assert result.exit_code == 0, result.output
    history = result.stdout.split("> /history\n")[1].splitlines()
    assert [line.split(":")[0] for line in history] == ["user", "assistant"]
    assert "[prompts: expected at most" in result.stdout
    assert "expected text that the tokenizer can encode" in result.stdout


def test_messages_of_a_user(answer, template):
    result = run("generate", "--chat", "--template", template, "--prompt", PROMPT)
    assert result.stdout == f"{answer}\n"


def test_stops_sampling_and_logprobs(answer):
    options = ("--stop", "ann 1", "--stop", "zebra", "--max-new-tokens", "48")
    result = run("generate", "--prompt", PROMPT, "--json", "--logprobs", *options)
    record = json.loads(result.stdout)
    assert record["text"] == answer[: answer.index("ann 1")]
    assert record["finish_reason"] == "stop"
    assert len(record["logprobs"]) == len(record["ids"])
    assert all(value <= 0 for value in record["logprobs"])
    left = ("generate", "--prompt", PROMPT, "--algorithm", "static", "--set", "score=left_to_right")
    sampled = run(*left, "--temperature", "0.8", "--top-k", "1", "--top-p", "0.9")
    assert sampled.stdout == run(*left).stdout
    suppressed = run(*left, "--suppress-id", str(record["ids"][0]), "--guidance", "0.5")
    assert answer.split()[0] not in suppressed.stdout.split()


def test_gaps(answer):
    result = run("generate", "--infill", "--prompt", f"{PROMPT} {answer[:-2]}<mask:1>")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{PROMPT} {answer[:-2]}")


@pytest.mark.parametrize("flags", [(), ("--stream",)])
def test_an_interrupt_prints_what_was_decoded(flags, monkeypatch):
    def interrupt(self, step):
        if step.index == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "__call__", interrupt)
    watched = () if flags else ("--watch",)
    if flags:
        from pydllm.decoding.driver import Drive

        plain = Drive.steps

        def steps(self):
            for count, step in enumerate(plain(self), 1):
                yield step
                if count == 3:
                    raise KeyboardInterrupt

        monkeypatch.setattr(Drive, "steps", steps)
    algorithm = ("--algorithm", "lefttoright", "--set", "tokens_per_step=2")
    result = run("generate", "--prompt", PROMPT, *algorithm, *flags, *watched)
    assert result.exit_code == 130
    assert len(result.stdout.split()) == 6
    assert "Interrupted." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stream", "--watch"), "expected --stream or --watch, got both"),
        (("--stream", "--json"), "expected --stream or --json, got both"),
        (("--logprobs",), "expected --json with --logprobs, got none"),
        (("--system", "x"), "expected --chat with --system or --template, got none"),
        (("--data", "x", "--out", "y", "--chat"), "expected no --chat with --data, got it"),
        (("--top-p", "2"), r"top_p: expected a number in \(0, 1\] or None, got 2.0"),
        (("--chat",), "without a template"),
        (("--infill",), r"texts\[0\]: expected a gap such as <mask:8>"),
    ],
)
def test_what_is_refused(arguments, message):
    result = run("generate", "--prompt", PROMPT, *arguments)
    assert result.exit_code in (1, 2)
    assert re.search(message, result.output), result.output


def test_a_chat_needs_a_template():
    folder = str(WEIGHTS)
    result = run("chat", "--model", folder)
    assert result.exit_code == 1
    assert (
        f"expected a checkpoint with a chat template, or --template, got {folder}" in result.output
    )


def test_a_chat_with_a_bundled_model(answer):
    """The prompt of each answer is the line itself, and --max-new-tokens fits."""
    result = run("chat", stdin=f"{PROMPT}\n{PROMPT}\n{f'{PROMPT} ' * 5}\n{f'{PROMPT} ' * 9}\n")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    greeting = "[llada-tiny has no chat template: the prompt is your last line, without history]"
    assert lines[0] == greeting
    assert lines.count(answer) == 2
    words = len(PROMPT.split())
    assert words * 5 + 48 > 128 > words * 5  # more than 48 do not fit after the third
    assert len(re.findall(r"^\[\d+ tokens, ", result.stdout, re.MULTILINE)) == 3
    refused = f"expected at most 128 positions, got {words * 9} of the prompt and 1 of the answer"
    assert f"[prompts: {refused}: shorten the line, or /reset]" in lines
    asked = run("chat", "--model", "sdar-tiny", "--max-new-tokens", "120", stdin=PROMPT)
    assert "120 of the answer: lower --max-new-tokens]" in asked.stdout
