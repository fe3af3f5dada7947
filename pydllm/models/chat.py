"""Chat templates, and prompts as token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pydllm._backend.errors import CheckpointError, PydllmError
from pydllm.models.checkpoint import read_json, read_text
from pydllm.models.tokenizer import special_tokens

Message = Mapping[str, Any]
_FILE, _MORE = "chat_template.jinja", "additional_chat_templates"


class ChatTemplate:
    """The templates of a checkpoint, rendered in jinja2's sandbox: no code of it reaches Python.

    Attributes:
        sources: template text by name; the usual one is ``"default"``.
        special: texts of ``bos_token``, ``eos_token`` and the like, as templates use them.
    """

    def __init__(self, sources: Mapping[str, str], special: Mapping[str, str]) -> None:
        self.sources, self.special = dict(sources), dict(special)

    def render(
        self,
        messages: Sequence[Message],
        *,
        name: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, special tokens included.

        Args:
            messages: each with ``role`` and ``content``.
            name: of the template; None: ``"tool_use"`` with tools where there is one, else
                ``"default"``.
            add_generation_prompt: end with the beginning of the assistant's turn.
            variables: others that the template knows, as ``enable_thinking``.

        Raises:
            ValueError: no such template, or the template refuses the messages.
            CheckpointError: the template is not valid.
        """
        import jinja2

        if name is None:
            name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise ValueError(
                f"chat template: expected one of {', '.join(sorted(self.sources))}, got {name!r}"
            )
        try:
            template = _environment().from_string(self.sources[name])
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"chat template {name!r}: line {error.lineno}: {error}"
            ) from error
        values: dict[str, Any] = {**self.special, **variables, "messages": list(messages)}
        values |= {"add_generation_prompt": add_generation_prompt, "tools": tools}
        try:
            return template.render(**values)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"chat template {name!r}: {error}") from error


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The templates of a checkpoint: chat_template.jinja and additional_chat_templates/*.jinja,
    as transformers writes them since 4.52, else the one or several of tokenizer_config.json.
    """
    sources: dict[str, str] = {}
    config = read_json(folder, "tokenizer_config.json", required=False)
    listed = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(listed, str):
        sources["default"] = listed
    elif isinstance(listed, list):
        for entry in listed:
            fields = entry if isinstance(entry, dict) else {}
            name, template = fields.get("name"), fields.get("template")
            if not isinstance(name, str) or not isinstance(template, str):
                raise CheckpointError(
                    "tokenizer_config.json: chat_template: expected names and templates, "
                    f"found {entry!r:.80}"
                )
            sources[name] = template
    elif listed is not None:
        raise CheckpointError(
            f"tokenizer_config.json: chat_template: expected text, found {type(listed).__name__}"
        )
    if (folder / _FILE).exists():
        sources["default"] = read_text(folder, _FILE)
    for path in sorted((folder / _MORE).glob("*.jinja")):
        sources[path.stem] = read_text(folder / _MORE, path.name)
    return ChatTemplate(sources, special_tokens(folder)) if sources else None


def _environment() -> Any:
    """As transformers renders templates."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's words for training and prints its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        import jinja2

        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def encode(
    tokenizer: Tokenizer | None,
    prompt: str | Sequence[Message],
    template: ChatTemplate | None = None,
    **options: Any,
) -> list[int]:
    """The ids of a text or of a conversation, special tokens once.

    Args:
        prompt: a text, which gets the special tokens that the tokenizer adds unless it begins with
            them, as a rendered template does; or messages, rendered with the generation prompt.
        options: of ``ChatTemplate.render``.

    Raises:
        PydllmError: no tokenizer; or messages, and no chat template.
        ValueError: the template refuses the messages, or the tokenizer has no token for a word.
    """
    if tokenizer is None:
        raise PydllmError("prompts: expected token ids, since the model came without a tokenizer")
    if isinstance(prompt, str):
        encoding, bare = (_encoded(tokenizer, prompt, special) for special in (True, False))
        mask = encoding.special_tokens_mask  # 1: added by the post-processor
        before = mask.index(0) if 0 in mask else 0
        ids = encoding.ids
        return ids[before:] if bare.ids[:before] == ids[:before] else ids
    if template is None:
        raise PydllmError("prompts: expected text or ids, since the model came without a template")
    return _encoded(tokenizer, template.render(prompt, **options), False).ids


def _encoded(tokenizer: Tokenizer, text: str, special: bool) -> Any:
    try:
        return tokenizer.encode(text, add_special_tokens=special)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"prompts: {text[:80]!r} cannot be encoded: {error}") from error
