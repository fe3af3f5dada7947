"""The page that plays an unmasking, in a headless browser where there is one."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from torch.nn import functional as F

import pydllm
from pydllm.demo import MODELS
from pydllm.demo.player import Scene, write_page
from pydllm.demo.replay import Run, replay
from pydllm.demo.task import held_out_problems
from tests.models.plain import RECENT, random_plain, write_checkpoint

BROWSER = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)
RUNS = [
    Run("slow", ["tom", "</script>", "\u21b5"], [2, 0, 1], 3, [], [0.25, 1, 1], [1.386, 0, 0]),
    Run("fast", ["tom", "tom"], [0, 0], 1, [1], None, None),
]
SCENES = [Scene("one", "a <b> & c", RUNS), Scene("one", "next", RUNS[1:]), Scene("two", "x", RUNS)]
DRIVER = """
<script>
const seen = [];
const all = name => [...document.querySelectorAll(name)];
const press = key =>
  document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const look = () => seen.push([document.getElementById("clock").textContent,
  all(".word").map(word => word.classList.contains("hidden") ? "_" : word.textContent),
  all(".state").map(state => state.textContent)]);
press("Home"); look();
press("ArrowRight"); look();
press("End"); look();
document.querySelector(".word").dispatchEvent(new MouseEvent("mouseenter"));
seen.push(document.getElementById("tip").textContent);
press("n"); seen.push(document.getElementById("prompt").textContent);
press("p"); seen.push(document.getElementById("prompt").textContent);
document.getElementById("group").value = "two";
document.getElementById("group").dispatchEvent(new Event("change"));
seen.push(document.getElementById("prompt").textContent);
document.body.replaceChildren(Object.assign(document.createElement("pre"),
  {id: "seen", textContent: JSON.stringify(seen)}));
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "deep/page.html"
    write_page(SCENES, "Title & <more>", path)
    return path


def test_the_page_stands_alone(page):
    """Nothing is fetched: no address in it, and a policy that forbids what there might be."""
    text = page.read_text()
    assert not re.search(r"https?:|\bsrc=|\bhref=|@import|url\(|fetch\(|XMLHttp", text)
    assert "default-src 'none'" in text and "{{" not in text
    assert "<title>Title &amp; &lt;more&gt;</title>" in text
    data = re.search(r'id="data">(.*?)</script>', text).group(1)
    assert json.loads(data)["scenes"][0]["runs"][0]["words"] == RUNS[0].words
    for needed in ("prefers-reduced-motion", "prefers-color-scheme", "aria-label", "keydown"):
        assert needed in text


def _browse(path, *options):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += ["--dump-dom", *options, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_it_plays_in_a_browser(page, tmp_path):
    driven = tmp_path / "driven.html"
    driven.write_text(page.read_text() + DRIVER)
    done = _browse(driven)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    text = found.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    start, one, end, tip, *prompts = json.loads(text)
    assert start == [
        "after 0 of 3 forwards",
        ["_"] * 5,
        ["forward 0 of 3, 0 tokens", "forward 0 of 1, 0 tokens"],
    ]
    assert one[1] == ["_", "</script>", "_", "tom", "tom"]
    assert one[2][1] == "finished after 1, 2.00 tokens per forward, wrong"
    assert end[0] == "after 3 of 3 forwards" and end[1][:3] == RUNS[0].words
    assert tip == "tom\nforward 3 of 3\nprobability 0.250\nentropy 1.386 nats"
    assert prompts == ["next", "a <b> & c", "x"]


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_nothing_moves_where_motion_is_unwanted(page):
    still = _browse(page, "--force-prefers-reduced-motion").stdout
    assert "after 3 of 3 forwards" in still and ">Play</button>" in still
    assert ">Pause</button>" in _browse(page).stdout


def test_ten_problems_and_six_methods_are_small(tmp_path):
    words = ["answer"] * 48
    run = Run(
        "FreeDave, 8 drafts", words, [47] * 48, 48, list(range(48)), [0.123] * 48, [1.234] * 48
    )
    write_page([Scene("llada-tiny", "a " * 60, [run] * 6)] * 10, "t", tmp_path / "p.html")
    assert (tmp_path / "p.html").stat().st_size < 2**20 / 5  # five models on a page


def test_nothing_to_play(tmp_path):
    with pytest.raises(ValueError, match="scenes: expected at least one answer with a token"):
        write_page([Scene("m", "p", [])], "t", tmp_path / "p.html")


@pytest.mark.parametrize("name", ["llada-tiny", "dream-tiny", "sdar-tiny", "llada2-tiny"])
def test_a_replay_is_what_the_decoder_saw(name):
    """Without a cache, the probability of a token is the threshold rule's confidence in it; the
    canvases are built anew here, one at a time, and go through the model's own logits.
    """
    from pydllm.integrations.compare import load_callable

    model = pydllm.load(MODELS[name], device="cpu")
    problem = held_out_problems(1)[0]
    rule = pydllm.Threshold(threshold=0.9, block_length=8)
    got = pydllm.generate(model, ["sam", problem.prompt], rule, max_new_tokens=48)
    run = replay(model, got, 1, "Threshold", rule, problem=problem)
    assert run.forwards == got.nfe[1] and " ".join(run.words[:-1]) == got.text[1].strip()
    assert run.words[-1] == "<eos>" and run.steps == got.step_map[1][: len(run.words)].tolist()
    per_forward = {step: [] for step in run.steps}
    for step, probability in zip(run.steps, run.probability, strict=True):
        per_forward[step].append(probability)
    assert all(min(p) > 0.9 - 1e-4 for p in per_forward.values() if len(p) > 1)
    callable_model = load_callable(str(MODELS[name]), "cpu")
    prompt = torch.tensor(model.tokenizer.encode(problem.prompt).ids)
    for place in (0, len(run.words) // 2, len(run.words) - 1):
        answer = torch.full((48,), model.spec.mask_id)
        for other, token in enumerate(got.new_tokens[1].tolist()):
            if run.steps[other] < run.steps[place]:
                answer[other] = token
        with torch.no_grad():
            logits = callable_model(torch.cat((prompt, answer))[None]).logits[0].double()
        row = logits[len(prompt) + place - int(model.spec.shift_logits)]
        row[model.spec.mask_id] = -torch.inf
        law = F.softmax(row, 0)
        token = int(got.new_tokens[1][place])
        assert run.probability[place] == pytest.approx(law[token].item(), abs=1e-4)
        entropy = torch.special.entr(law).sum().item()
        assert run.entropy[place] == pytest.approx(entropy, abs=1e-3)


def _law(logits, mask):
    logits = logits.clone()
    logits[mask] = -torch.inf
    return F.softmax(logits, 0)


def test_a_causal_model_is_replayed_by_its_own_forward():
    model = pydllm.load("verifier-tiny", device="cpu")
    got = pydllm.generate(
        model, ["sam has 7"], pydllm.Autoregressive(), max_new_tokens=3, logprobs=True
    )
    run = replay(model, got, 0, "Autoregressive", pydllm.Autoregressive())
    assert run.wrong is None and run.forwards == 3
    torch.testing.assert_close(torch.tensor(run.probability).log(), got.logprobs[0])
    assert len(run.entropy) == 3 and min(run.entropy) >= 0


ALGORITHMS = {
    "static": pydllm.Static(block_length=4),
    "threshold": pydllm.Threshold(threshold=0.2, block_length=4),
    "autoregressive": pydllm.Autoregressive(),
    "self-speculative": pydllm.SelfSpeculative(drafts=3),
    "self-speculative in one": pydllm.SelfSpeculative(drafts=3, forwards=1),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_causal_context_is_replayed_as_it_was_decoded(tmp_path, algorithm):
    """A model trained both ways: blocks see a causal context, whose last row predicts the first
    token of a block; what an autoregressive answer shows is what its causal forward gave.
    """
    plain = random_plain(RECENT["nemotron"], seed=3)
    folder = write_checkpoint(tmp_path, plain)
    model = pydllm.load(folder, device="cpu", dtype=torch.float64, eos_ids=())
    prompt, mask, size = [4, 9, 21, 33, 5], model.spec.mask_id, model.spec.block_size
    got = pydllm.generate(model, [prompt], algorithm, max_new_tokens=8)
    run = replay(model, got, 0, "name", algorithm)
    answer = got.new_tokens[0].tolist()
    assert len(run.probability) == len(answer) > size
    for place, token in enumerate(answer):
        start = place // size * size
        known = [t if run.steps[n] < run.steps[place] else mask for n, t in enumerate(answer)]
        known += [mask] * (8 - len(known))
        is_causal = isinstance(algorithm, pydllm.Autoregressive | pydllm.SelfSpeculative)
        if is_causal or place == start:
            law = _law(plain(torch.tensor(prompt + answer[:place]), causal=True)[1][-1], mask)
        else:
            kept = plain(torch.tensor(prompt + known[:start]), causal=True)[2]
            block = torch.tensor(known[start : start + size])
            law = _law(plain(block, len(prompt) + start, kept)[1][place - start], mask)
        assert run.probability[place] == pytest.approx(law[token].item(), abs=1e-5)
        assert run.entropy[place] == pytest.approx(torch.special.entr(law).sum().item(), abs=1e-5)
