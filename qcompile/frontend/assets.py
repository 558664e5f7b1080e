"""What a model carries beside its weights: tokenizer, chat template, generation settings, and every id that ends a sequence."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from qcompile.ir.records import Assets

_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
_OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
# Tokens that end a turn, in the vocabularies of chat models whose metadata name another end of sequence only.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eom_id|>")


def as_ids(value: Any) -> tuple[int, ...]:
    """Token ids from what configurations hold: a number, several, or nothing."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))


def configured(config: PreTrainedConfig, name: str) -> Assets:
    """What the configuration alone says."""
    text = config.get_text_config()
    return Assets(
        files={"config.json": config.to_json_string(use_diff=False).encode()},
        eos_token_ids=as_ids(getattr(text, "eos_token_id", None)),
        max_positions=int(getattr(text, "max_position_embeddings", 0) or 0),
        vocab_size=int(getattr(text, "vocab_size", 0) or 0),
        model_type=config.model_type,
        name=name,
    )


def from_directory(directory: Path, config: PreTrainedConfig, name: str) -> Assets:
    """The files of a model directory; another form of tokenizer becomes tokenizer.json, a template chat_template.jinja."""
    assets = configured(config, name)
    files = {file: (directory / file).read_bytes() for file in _COPIED if (directory / file).is_file()}
    if "tokenizer.json" not in files and any((directory / file).is_file() for file in _OTHER_TOKENIZERS):
        files |= _converted(directory)
    settings = _parsed(files.get("tokenizer_config.json"))
    template = _template(directory, settings)
    if template:
        files["chat_template.jinja"] = template.encode()
    assets.files |= files
    generation = _parsed(files.get("generation_config.json"))
    ids = (*assets.eos_token_ids, *as_ids(generation.get("eos_token_id")), *_tokenizer_eos(files.get("tokenizer.json"), settings))
    assets.eos_token_ids = tuple(dict.fromkeys(ids))
    return assets


def _parsed(content: bytes | None) -> dict[str, Any]:
    parsed = json.loads(content) if content else {}
    return parsed if isinstance(parsed, dict) else {}


def _converted(directory: Path) -> dict[str, bytes]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        return {"tokenizer.json": tokenizer.backend_tokenizer.to_str().encode()}
    # A tokenizer is optional, and its conversion fails in as many ways as there are formats.
    except Exception as error:
        warnings.warn(f"{directory}: the tokenizer could not be converted to tokenizer.json: {error}", stacklevel=2)
        return {}


def _template(directory: Path, settings: dict[str, Any]) -> str:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((item["template"] for item in template if item.get("name") == "default"), None)
    return template if isinstance(template, str) else ""


def _tokenizer_eos(tokenizer: bytes | None, settings: dict[str, Any]) -> Iterable[int]:
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    parsed = _parsed(tokenizer)
    added = {item["content"]: item["id"] for item in parsed.get("added_tokens", [])}
    vocabulary = parsed.get("model", {}).get("vocab", {})
    found = added.get(token, vocabulary.get(token) if isinstance(vocabulary, dict) else None)
    return as_ids(found)
