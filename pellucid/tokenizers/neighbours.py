"""What the files beside a tokenizer say: begin and end tokens, where to stop, the chat template.

tokenizer.json holds the vocabulary but not the roles of its tokens; those stand in up to five
smaller files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Where no file names them.
_USUAL_BOS = ("<|begin_of_text|>", "<s>", "<|endoftext|>")
_USUAL_EOS = ("<|end_of_text|>", "</s>", "<|endoftext|>")


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The tokens with a role, and the chat template. `adds_bos` is None where no file says."""

    bos_id: int | None
    eos_id: int | None
    stop_ids: frozenset[int]
    adds_bos: bool | None
    chat_template: str | None
    # Values a chat template may use by name: bos_token, eos_token …
    template_values: dict[str, str] = field(default_factory=dict)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; {} where there is no such file.

    Raises:
        ValueError: the file is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); fetch the file again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(found).__name__}")
    return found


def find_roles(folder: Path, ids: dict[str, int]) -> Roles:
    """Roles from the files in `folder`, for the tokens in `ids` (name -> id)."""
    config = read_json(folder / "tokenizer_config.json")
    names = read_json(folder / "special_tokens_map.json")
    numbers = [read_json(folder / "generation_config.json"), read_json(folder / "config.json")]
    adds_bos = config.get("add_bos_token")
    values = {
        key: name
        for source in (names, config)
        for key, value in source.items()
        if key.endswith("_token") and (name := _name(value)) is not None
    }
    stops = {
        id
        for source in numbers
        for id in _as_list(source.get("eos_token_id"))
        if isinstance(id, int)
    }
    return Roles(
        bos_id=_role("bos_token", (config, names), numbers, ids, _USUAL_BOS),
        eos_id=_role("eos_token", (config, names), numbers, ids, _USUAL_EOS),
        stop_ids=frozenset(stops & set(ids.values())),
        adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
        chat_template=_chat_template(folder, config),
        template_values=values,
    )


def _role(
    key: str,
    named: Iterable[dict[str, Any]],
    numbered: Iterable[dict[str, Any]],
    ids: dict[str, int],
    usual: Iterable[str],
) -> int | None:
    for source in named:
        if key in source:
            # null is an answer too: this tokenizer has no such token (Qwen's bos).
            name = _name(source[key])
            return None if name is None else ids.get(name)
    for source in numbered:
        for id in _as_list(source.get(f"{key}_id")):
            if id in ids.values():
                return id
    return next((ids[name] for name in usual if name in ids), None)


def _name(value: Any) -> str | None:
    """A token is written as its text, or as an object that has the text as "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        # Several by name ("default", "tool_use" …).
        by_name = {entry.get("name"): entry.get("template") for entry in template}
        template = by_name.get("default")
    return template if isinstance(template, str) else None
