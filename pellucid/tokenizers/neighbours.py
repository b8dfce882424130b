"""What the files beside a tokenizer say: begin and end tokens, where to stop, the chat template.

tokenizer.json holds the vocabulary but not the roles of its tokens; those stand in up to five
smaller files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pellucid import files
from pellucid.tokenizers.base import is_ordinary

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
    """The JSON object in `path`, ValueError where it is none; {} where there is no such file."""
    return files.read_json(path, missing={})


def find_roles(
    folder: Path,
    ids: dict[str, int],
    *,
    bos: Iterable[str] = _USUAL_BOS,
    eos: Iterable[str] = _USUAL_EOS,
) -> Roles:
    """Roles from the files in `folder`, for the tokens in `ids` (name -> id).

    bos, eos: the names of these tokens where no file says, the first that there is.
    """
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
        bos_id=_role("bos_token", (config, names), numbers, ids, bos),
        eos_id=_role("eos_token", (config, names), numbers, ids, eos),
        stop_ids=frozenset(stops & set(ids.values())),
        adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
        chat_template=_chat_template(folder, config),
        template_values=values,
    )


def added_tokens(folder: Path) -> dict[str, tuple[int, bool]]:
    """Tokens added beside a vocabulary: name -> id, and whether a file calls it special.

    Out of added_tokens.json, which says nothing about that (words are not), and of
    "added_tokens_decoder" in tokenizer_config.json.
    Raises ValueError where one is no name with an id, or has two.
    """
    found: dict[str, tuple[int, bool]] = {}
    listed = read_json(folder / "added_tokens.json")
    decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    entries: list[tuple[Any, Any, Any]] = [
        (name, id, not is_ordinary(name)) for name, id in listed.items()
    ]
    try:
        entries += [(_name(token), int(id), token.get("special")) for id, token in decoder.items()]
    except (AttributeError, ValueError, TypeError):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: expected an id and a token with its content for "
            "each of added_tokens_decoder"
        ) from None
    for name, id, special in entries:
        if not isinstance(name, str) or not isinstance(id, int) or found.get(name, (id,))[0] != id:
            raise ValueError(f"{folder}: the added token {name!r} has the id {id!r}: expected one")
        found[name] = id, bool(special)
    return found


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
        return files.read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):
        # Several by name ("default", "tool_use" …).
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    return template if isinstance(template, str) else None
