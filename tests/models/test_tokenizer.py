"""Tokenizers from vocab.json and merges.txt against transformers' class, and chat templates."""

import json
import os
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pydllm._backend.errors import CheckpointError, PydllmError
from pydllm.models import encode, load
from pydllm.models.chat import read_chat_template
from pydllm.models.tokenizer import read_tokenizer
from tests.models.plain import CONFIGS, random_plain, write_checkpoint

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
PIECES = [
    "def decode(x):\n    return x[::-1]  # reversed\n\n",
    "for (int i = 0; i < 1024; ++i) { a[i] += b[i] * 3.14e-2f; }\r\n",
    "Tom's dog doesn't know it'll rain; we're sure they'VE gone. I'd wait",
    "\u4e2d\u6587\u5206\u8bcd\u6d4b\u8bd5\uff0c\u6570\u5b57 2026 \u5e74\u3002",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8\u3068\u3072\u3089\u304c\u306a",
    "\ud55c\uad6d\uc5b4 \ud14c\uc2a4\ud2b8",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "cafe\u0301 na\u00efve \u212b \ufb01n",
    "   \t\n \n\n  ",
    "1234567890 0x1F 3,141,592.65",
    "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u0420\u0443\u0441\u0441\u043a\u0438\u0439",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea",
    '<tool_call>{"name": "f"}</tool_call>',
    *SPECIAL,
]


def texts(count=200):
    generator = random.Random(0)
    for _ in range(count):
        parts = generator.choices(PIECES, k=generator.randint(1, 5))
        glue = generator.choice(["", " ", "\n"])
        text = glue.join(parts)
        yield text[generator.randrange(3) : len(text) - generator.randrange(3)]


@pytest.fixture(scope="module")
def trained():
    """Byte-level BPE of a few hundred merges: its vocabulary and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(PIECES * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [
        pair if isinstance(pair, list) else pair.split() for pair in model["merges"]
    ]


def write_tokenizer(folder, trained, kind="Qwen2Tokenizer", decoder=True, **config):
    """The files of Dream and SDAR: no tokenizer.json."""
    vocab, merges = trained
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    added = {token: len(vocab) + i for i, token in enumerate((*SPECIAL, "<tool_call>"))}
    values = {
        "tokenizer_class": kind,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|mask|>"],
    } | config
    if decoder:
        values["added_tokens_decoder"] = {
            str(number): {
                "content": token,
                "special": token in SPECIAL,
                "normalized": False,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
            }
            for token, number in added.items()
        }
    else:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("decoder", [True, False], ids=["added_tokens_decoder", "added_tokens"])
def test_ids_are_those_of_transformers(tmp_path, trained, decoder):
    """On 4.57 that is the class in Python, on 5 the one over the tokenizers library."""
    transformers = pytest.importorskip("transformers", reason="compares with its tokenizer")
    folder = write_tokenizer(tmp_path, trained, decoder=decoder)
    oracle = transformers.Qwen2Tokenizer.from_pretrained(folder)
    tokenizer = read_tokenizer(folder)
    different = [
        text for text in texts() if tokenizer.encode(text).ids != oracle(text)["input_ids"]
    ]
    assert not different, (len(different), different[:3])
    for text in texts(40):
        ids = tokenizer.encode(text).ids
        expected = oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == expected


def test_the_pieces_are_what_they_should_be(tmp_path, trained):
    tokenizer = read_tokenizer(write_tokenizer(tmp_path, trained))
    ids = tokenizer.encode("a<|im_end|>b").ids
    assert ids == [
        *tokenizer.encode("a").ids,
        tokenizer.token_to_id("<|im_end|>"),
        *tokenizer.encode("b").ids,
    ]
    for text in texts(20):  # nothing is lost but what NFC composes
        import unicodedata

        got = tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
        assert got == unicodedata.normalize("NFC", text)


def test_gpt2_and_others(tmp_path, trained):
    tokenizer = read_tokenizer(write_tokenizer(tmp_path / "gpt2", trained, "GPT2Tokenizer"))
    assert tokenizer.decode(tokenizer.encode("it's 2026").ids) == "it's 2026"
    assert read_tokenizer(write_tokenizer(tmp_path / "other", trained, "BertTokenizer")) is None
    assert read_tokenizer(tmp_path) is None


def test_a_model_with_such_files(tmp_path, trained):
    config = {k: v for k, v in CONFIGS["dream"].items() if k != "mask_token_id"}
    folder = write_checkpoint(tmp_path, random_plain(config | {"vocab_size": 700}))
    write_tokenizer(folder, trained)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    model = load(folder, device="cpu")
    mask = model.tokenizer.token_to_id("<|mask|>")
    assert model.spec.mask_id == mask
    turn = model.tokenizer.token_to_id("<|im_end|>")  # which no configuration names
    assert model.spec.eos_ids == (59, 57, turn)
    assert load(folder, device="cpu", eos_ids=59).spec.eos_ids == (59,)
    got = encode(model.tokenizer, [{"role": "user", "content": "a<|mask|>b"}], model.chat_template)
    assert got == model.tokenizer.encode("a<|mask|>b").ids and mask in got


def test_the_mask_token_that_the_files_name(tmp_path, trained):
    config = {k: v for k, v in CONFIGS["dream"].items() if k != "mask_token_id"}
    folder = write_checkpoint(tmp_path, random_plain(config | {"vocab_size": 700}))
    write_tokenizer(folder, trained, mask_token={"content": "<|endoftext|>"})
    model = load(folder, device="cpu")
    assert model.spec.mask_id == model.tokenizer.token_to_id("<|endoftext|>")


def write_json(name, values):
    return lambda folder: (folder / name).write_text(json.dumps(values))


def growing(part, rule):
    steps = [rule] * 40
    inner = {"type": "Sequence", f"{part}s": steps}
    return write_json("tokenizer.json", {"version": "1.0", part: inner, "model": {"type": "BPE"}})


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
EVERYWHERE = {"type": "Replace", "pattern": {"Regex": ""}, "content": "aaaa"}
WRONG = {
    "ids": (write_json("vocab.json", {"a": "1"}), "vocab.json: expected a token id for each token"),
    "list": (write_json("vocab.json", ["a"]), "vocab.json: expected a JSON object, found list"),
    "three": (
        lambda folder: (folder / "merges.txt").write_text("a b c\n"),
        "merges.txt: expected two tokens on every line",
    ),
    "unknown tokens": (
        lambda folder: (folder / "merges.txt").write_text("no yes\n"),
        "merges.txt: expected merges of vocab.json, found",
    ),
    "added": (
        write_json(
            "tokenizer_config.json",
            {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {"x": "<eos>"}},
        ),
        "added_tokens_decoder: expected an id and its token, found 'x': '<eos>'",
    ),
    "grows": (growing("normalizer", DOUBLE), "normalizer: expected at most 1000 .* 1.1e.12"),
    "grows everywhere": (growing("normalizer", EVERYWHERE), "normalizer: expected at most 1000"),
    "grows back": (growing("decoder", DOUBLE), "decoder: expected at most 1000 characters for one"),
    "fifo": (
        lambda folder: os.mkfifo(folder / "tokenizer.json"),
        "tokenizer.json: expected a file",
    ),
    "nested": (
        lambda folder: (folder / "tokenizer.json").write_text("[" * 100_000),
        "tokenizer.json: expected JSON, found",
    ),
}


@pytest.mark.parametrize("damage, message", WRONG.values(), ids=WRONG)
def test_refused(tmp_path, trained, damage, message):
    damage(write_tokenizer(tmp_path, trained))
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_fifo_does_not_hang(tmp_path, name):
    folder = write_checkpoint(tmp_path, random_plain(CONFIGS["llada"]))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="expected"):
        load(folder, device="cpu")


def test_nested_too_deep(tmp_path):
    folder = write_checkpoint(tmp_path, random_plain(CONFIGS["llada"]))
    (folder / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(CheckpointError, match="config.json: expected JSON, found"):
        load(folder, device="cpu")


CHAT = (
    "{%- for message in messages %}\n"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n{{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
TEMPLATES = {
    "chat": CHAT,
    "bos": "{{ bos_token }}{{ messages[0]['content'] | trim }}{{ eos_token }}",
    "tools": "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{{ messages | tojson(indent=2) }}",
    "loops": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}",
}
MESSAGES = [
    {"role": "user", "content": " 2 < 3 & \u4e2d "},
    {"role": "assistant", "content": "yes 'so'"},
    {"role": "user", "content": "\U0001f600"},
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("place", ["file", "config"])
def test_templates_render_as_in_transformers(tmp_path, trained, name, place):
    transformers = pytest.importorskip("transformers", reason="compares with its rendering")
    source = TEMPLATES[name]
    config = {"bos_token": "<|endoftext|>"}
    if place == "config":
        config["chat_template"] = source
    folder = write_tokenizer(tmp_path, trained, **config)
    if place == "file":
        (folder / "chat_template.jinja").write_text(source)
    oracle = transformers.Qwen2Tokenizer.from_pretrained(folder)
    tools = [{"name": "f", "parameters": {"x": "<int>"}}]
    for options in ({}, {"tools": tools}, {"add_generation_prompt": False}):
        expected = oracle.apply_chat_template(
            MESSAGES, tokenize=False, **({"add_generation_prompt": True} | options)
        )
        assert read_chat_template(folder).render(MESSAGES, **options) == expected


def test_several_templates(tmp_path, trained):
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    folder = write_tokenizer(tmp_path, trained, chat_template=named)
    template = read_chat_template(folder)
    assert template.render([]) == "d" and template.render([], tools=[{}]) == "t"
    assert template.render([], tools=[{}], name="default") == "d"
    with pytest.raises(ValueError, match="expected one of default, tool_use, got 'rag'"):
        template.render([], name="rag")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("r")
    (folder / "chat_template.jinja").write_text("f")
    template = read_chat_template(folder)
    assert template.render([]) == "f" and template.render([], name="rag") == "r"


REFUSED = {
    "python": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", ValueError, "unsafe"),
    "changes": ("{{ messages.append(1) }}", ValueError, "unsafe|not safely callable"),
    "refuses": ("{{ raise_exception('roles alternate') }}", ValueError, "roles alternate"),
    "syntax": ("{% if %}", CheckpointError, "line 1"),
    "types": ("{{ messages + 1 }}", ValueError, "concatenate"),
}


@pytest.mark.parametrize("source, kind, message", REFUSED.values(), ids=REFUSED)
def test_the_sandbox(tmp_path, trained, source, kind, message):
    folder = write_tokenizer(tmp_path, trained, chat_template=source)
    with pytest.raises(kind, match=message):
        read_chat_template(folder).render(MESSAGES)


@pytest.mark.parametrize("source", [3, [{"name": "default"}], [4]])
def test_templates_of_another_kind(tmp_path, trained, source):
    folder = write_tokenizer(tmp_path, trained, chat_template=source)
    with pytest.raises(CheckpointError, match="chat_template: expected"):
        read_chat_template(folder)


def test_special_tokens_once(trained):
    """A tokenizer that adds BOS, text with and without it, and a rendered template."""
    vocab, merges = trained
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(pair) for pair in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>"])
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    bare = tokenizer.encode("Tom", add_special_tokens=False).ids
    assert encode(tokenizer, "Tom") == [bos, *bare]
    assert encode(tokenizer, "<bos>Tom") == [bos, *bare]
    assert encode(tokenizer, "<bos>") == [bos] and encode(tokenizer, "") == [bos]
    assert encode(tokenizer, "Tom<bos>") == [bos, *bare, bos]
    from pydllm.models import ChatTemplate

    template = ChatTemplate(
        {"default": "{{ bos_token }}{{ messages[0].content }}"}, {"bos_token": "<bos>"}
    )
    assert encode(tokenizer, [{"role": "user", "content": "Tom"}], template) == [bos, *bare]
    without = ChatTemplate({"default": "{{ messages[0].content }}"}, {})
    assert encode(tokenizer, [{"role": "user", "content": "Tom"}], without) == bare
    with pytest.raises(PydllmError, match="expected text or ids, since .* without a template"):
        encode(tokenizer, [{"role": "user", "content": "Tom"}])
    with pytest.raises(PydllmError, match="expected token ids, since .* without a tokenizer"):
        encode(None, "Tom")
