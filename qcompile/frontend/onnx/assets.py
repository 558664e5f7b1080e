"""What lies beside a language model in ONNX: its tokenizer, configuration and the ids that end a sequence."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qcompile.errors import SourceError
from qcompile.ir.records import Assets

_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "chat_template.jinja")


def beside(path: Path, vocabulary: int) -> Assets:
    """The text assets in the folder of a model with so many logits, or in the folder above one called `onnx`; often there are none.

    Raises:
        SourceError: for a file that is no JSON.
    """
    folders = [path.parent, *([path.parent.parent] if path.parent.name == "onnx" else [])]
    found = {file: folder / file for folder in reversed(folders) for file in _FILES if (folder / file).is_file()}
    files = {file: place.read_bytes() for file, place in found.items()}
    config, generation = (_parsed(found.get(name)) for name in ("config.json", "generation_config.json"))
    settings, tokenizer = _parsed(found.get("tokenizer_config.json")), _parsed(found.get("tokenizer.json"))
    ends = (*_ids(config.get("eos_token_id")), *_ids(generation.get("eos_token_id")), *_ends(tokenizer, settings))
    template = settings.get("chat_template")
    if "chat_template.jinja" not in files and isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    return Assets(
        files=files,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        max_positions=int(config.get("max_position_embeddings") or 0),
        vocab_size=vocabulary,
        model_type=str(config.get("model_type") or "onnx"),
        name=path.name,
    )


def _parsed(place: Path | None) -> dict[str, Any]:
    if place is None:
        return {}
    try:
        parsed = json.loads(place.read_bytes())
    except ValueError as error:
        raise SourceError(f"{place}: expected JSON, got {error}; download it again, or move it away") from error
    return parsed if isinstance(parsed, dict) else {}


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))


def _ends(tokenizer: dict[str, Any], settings: dict[str, Any]) -> Iterable[int]:
    """The id of the token that the tokenizer's settings call the end."""
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return _ids(next((item.get("id") for item in tokenizer.get("added_tokens", []) if item.get("content") == token), None))
