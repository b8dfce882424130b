"""Calls of tools in an answer, read in the form in which the model's own template writes them.

The template is asked: it renders a conversation with one call, and what stands around the call's
JSON there is what begins and ends a call in an answer. Nothing is known of any model here.

    <tool_call>\n{"name": "find", "arguments": {"what": "cat"}}\n</tool_call>
    └ begins ──┘  └ name ┘        └ arguments ┘
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pellucid.generate.text import overlap
from pellucid.serve.fields import RequestError
from pellucid.tokenizers.base import ChatFormat
from pellucid.tokenizers.chat import TemplateChat

_PROBE = "look_up_7f3a"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class CallForm:
    """How a template writes a call: what begins it ("": an answer is nothing but a call), the key
    of its arguments."""

    begins: str
    arguments: str

    def read(self, text: str) -> list[dict[str, Any]] | None:
        """The calls in `text`, which begins where a call does; None where it is no such thing."""
        found, place = [], 0
        while True:
            start = text.find("{", place)
            if start < 0 or re.search(r"\w", self._without_marks(text[place:start])):
                return found or None
            try:
                call, place = _DECODER.raw_decode(text, start)
            except (ValueError, RecursionError):
                return None
            given = call.get(self.arguments)
            if not isinstance(call.get("name"), str) or not isinstance(given, dict):
                return None
            found.append({"name": call["name"], "arguments": json.dumps(given, ensure_ascii=False)})

    def _without_marks(self, between: str) -> str:
        """What stands between two calls, without names of tokens (<tool_call>, [TOOL_CALLS])."""
        return re.sub(
            r"<[^<>]*>|\[[A-Z_]*\]|" + re.escape(self.begins.strip() or "<>"), "", between
        )


def call_form(chat: ChatFormat) -> CallForm | None:
    """How this chat format writes a call; None where it has no place for tools or their calls."""
    if not isinstance(chat, TemplateChat) or not re.search(r"\btools\b", chat.template):
        return None
    asked = [{"role": "user", "content": "a"}]
    call = {"name": _PROBE, "arguments": {"b": "c"}}
    calls = [{"id": "call00000", "type": "function", "function": call}]
    said = {"role": "assistant", "content": "", "tool_calls": calls}
    try:
        whole = chat.render([*asked, said], add_generation_prompt=False)
        before = chat.render(asked, add_generation_prompt=True)
    except ValueError:
        return None
    parts = (i for i, pair in enumerate(zip(whole, before, strict=False)) if len(set(pair)) > 1)
    turn = whole[next(parts, min(len(whole), len(before))) :]
    for place in (found.start() for found in re.finditer(r"\{", turn)):
        try:
            written, _ = _DECODER.raw_decode(turn, place)
        except (ValueError, RecursionError):
            continue
        if written.get("name") == _PROBE:
            keys = [key for key, value in written.items() if value == {"b": "c"}]
            return CallForm(turn[:place].strip(), keys[0]) if keys else None
    return None


class CallReader:
    """Parts an answer, as it comes, into text to show at once and calls, which are whole."""

    def __init__(self, form: CallForm) -> None:
        self._form, self._held = form, ""
        self._in_call = self._in_text = False

    def push(self, text: str) -> str:
        """The text that is certainly no call."""
        self._held += text
        begins, cut = self._form.begins, 0
        if self._in_call:
            return ""
        if not begins and not self._in_text:  # the whole answer is a call, or none of it
            first = self._held.lstrip()[:1]
            self._in_call, self._in_text = first == "{", first not in ("", "{")
        if not begins:
            cut = len(self._held) if self._in_text else 0
        elif (place := self._held.find(begins)) >= 0:
            cut, self._in_call = place, True
        else:
            cut = len(self._held) - overlap(self._held, begins)
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """At the end: text that was held back after all, and the calls as a message has them."""
        found = self._form.read(self._held) if self._in_call else None
        if found is None:
            return self._held, []
        return "", [
            {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
            for function in found
        ]


def check_tools(chat: ChatFormat | None, given: Mapping[str, Any]) -> CallForm | None:
    """The form of calls in the answer to a request; None where none are wanted.

    RequestError 400 where the model's template has no place for the request's tools.
    """
    told = given["tools"] or any(message.get("tool_calls") for message in given["messages"])
    if not told:
        return None
    form = call_form(chat) if chat is not None else None
    if form is None:
        said = "this model's chat template has no place for tools, or for calls in JSON"
        raise RequestError(400, f"tools: {said}", "tools")
    return form if given["tools"] and given["tool_choice"] != "none" else None
