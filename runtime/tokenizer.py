"""Text to tokens and back with what the artifact carries: tokenizer.json and a chat template, no model library."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from qcompile.errors import TokenizerError
from qcompile.ir.records import Assets

Message = Mapping[str, Any]


class Tokenizer:
    """Encodes prompts and chats, decodes tokens; made from the files of an artifact."""

    def __init__(self, assets: Assets) -> None:
        """Read `tokenizer.json`, and the chat template if there is one.

        Raises:
            TokenizerError: if the model carries no tokenizer.
        """
        name = assets.name or assets.model_type or "this model"
        content = assets.files.get("tokenizer.json")
        if content is None:
            raise TokenizerError(
                f"{name}: expected tokenizer.json, got none; pass token ids, or compile from a checkpoint that has a tokenizer"
            )
        self.name = name
        self._fast = FastTokenizer.from_str(content.decode())
        self._fast.no_padding()
        self._fast.no_truncation()
        self._template = assets.files.get("chat_template.jinja", b"").decode()
        self._settings = json.loads(assets.files.get("tokenizer_config.json", b"{}"))

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """The tokens of `text`; with `special_tokens` also those that the tokenizer puts around a text."""
        return list(self._fast.encode(text, add_special_tokens=special_tokens).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens` without special tokens."""
        return str(self._fast.decode(list(tokens), skip_special_tokens=True))

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, with the beginning of the answer that is asked for.

        Raises:
            TokenizerError: if there is no chat template, or it refuses the messages.
        """
        return self.encode(self.render_chat(messages), special_tokens=False)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The conversation as text, by the model's template in a sandbox."""
        if not self._template:
            raise TokenizerError(f"{self.name}: expected a chat template, got none; pass plain text, or token ids")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
        special = {key: _token_text(value) for key, value in self._settings.items() if key.endswith("_token")}
        try:
            return environment.from_string(self._template).render(messages=list(messages), add_generation_prompt=True, **special)
        except TemplateError as error:
            raise TokenizerError(
                f"{self.name}: expected messages that the chat template takes, got an error: {error}; give each message a role "
                "and a content"
            ) from error


class TextStream:
    """Turns tokens that come one by one into text, never splitting a character: `push` returns what is certain by now."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Start empty."""
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0  # where the tokens begin whose text is not settled
        self._settled = 0  # characters of the text since `_start` that were given out

    def push(self, token: int) -> str:
        """Add a token; the text that became certain, which may be empty."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens[self._start :])
        if text.endswith("\ufffd"):  # bytes of an unfinished character
            return ""
        new = text[self._settled :]
        self._settled = len(text)
        if len(self._tokens) - self._start > 16:  # keep a few tokens for context: spaces depend on the token before
            self._start = len(self._tokens) - 4
            self._settled = len(self._tokenizer.decode(self._tokens[self._start :]))
        return new

    def finish(self) -> str:
        """What is left, incomplete characters replaced."""
        return self._tokenizer.decode(self._tokens[self._start :])[self._settled :]


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


def _token_text(value: Any) -> Any:
    return value.get("content", "") if isinstance(value, dict) else value
