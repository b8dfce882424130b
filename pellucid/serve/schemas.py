"""What each endpoint accepts, as data: a table of fields, each with what it may hold.

A field that stands in no table is an error that names it. So is a value without an effect here: a
field that is known but not served (`frequency_penalty`) takes only the value that means nothing.
Nothing that is accepted is ignored. Fields and their meaning follow OpenAI's reference; `top_k`,
`min_p` and `repetition_penalty` are added, as other local servers do.
"""

from __future__ import annotations

import json
from typing import Any

from pellucid.serve.fields import (
    Field,
    Read,
    as_object,
    flag,
    list_of,
    number,
    only,
    parse,
    refuse,
    schema_of,
    takes,
    text,
    whole,
)

MOST_ROWS = 128  # choices of one request: prompts times n
MOST_STOPS = 16
MOST_TOP = 20  # alternatives of a token


@takes(
    {
        "anyOf": [
            {"type": "string", "minLength": 1},
            list_of({"type": "string", "minLength": 1}) | {"maxItems": MOST_STOPS},
        ]
    }
)
def stops(name: str, value: Any) -> list[str]:
    """One stop string or several."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or len(found) > MOST_STOPS:
        raise refuse(name, value, f"a text or a list of at most {MOST_STOPS} texts")
    if not all(isinstance(one, str) and one for one in found):
        raise refuse(name, value, "texts of one character or more")
    return found


@takes(list_of({"type": "integer"}))
def token_ids(name: str, value: Any) -> list[int]:
    """A list of token ids."""
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise refuse(name, value, "a list of token ids")
    return value


_IDS = list_of({"type": "integer"}, 1)


@takes({"anyOf": [{"type": "string"}, _IDS, list_of({"type": "string"}, 1), list_of(_IDS, 1)]})
def prompts(name: str, value: Any) -> list[str | list[int]]:
    """A prompt as text or token ids, or a list of either -> a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return value
        if all(isinstance(one, list) and one for one in value):
            return [token_ids(f"{name}[{place}]", one) for place, one in enumerate(value)]
        if all(type(one) is int for one in value):
            return [value]
    raise refuse(name, value, "text, token ids, or a list of texts or of lists of token ids")


_OPTIONS = {"include_usage": Field(flag, False)}


@takes(schema_of(_OPTIONS))
def stream_options(name: str, value: Any) -> bool:
    """Whether a stream ends with a chunk of usage."""
    return parse(as_object(name, value), _OPTIONS, f"{name}.")["include_usage"]


_PART = {
    "type": Field(only("text", "input_text", "output_text")),
    "text": Field(text, ""),
}


@takes({"anyOf": [{"type": "string"}, list_of(schema_of(_PART))]})
def content_text(name: str, value: Any) -> str:
    """The text of a message: as it is, or a list of parts of text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refuse(name, value, "text or a list of parts of text")
    parts = (parse(as_object(f"{name}[{i}]", part), _PART, f"{name}[{i}].")
             for i, part in enumerate(value))  # fmt: skip
    return "".join(part["text"] for part in parts)


_CALLED = {"name": Field(text, needed=True), "arguments": Field(text, "{}")}
_CALL = {
    "id": Field(text, needed=True),
    "type": Field(only("function")),
    "function": Field(Read(as_object, schema_of(_CALLED)), needed=True),
}


@takes(list_of(schema_of(_CALL)))
def tool_calls(name: str, value: Any) -> list[dict[str, Any]]:
    """Calls in a message of the assistant; their arguments become what their JSON says."""
    if not isinstance(value, list):
        raise refuse(name, value, "a list of calls")
    found = []
    for place, call in enumerate(value):
        where = f"{name}[{place}]"
        given = parse(as_object(where, call), _CALL, f"{where}.")
        function = parse(given["function"], _CALLED, f"{where}.function.")
        try:
            arguments = json.loads(function["arguments"])
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise refuse(f"{where}.function.arguments", function["arguments"], "a JSON object")
        function = {"name": function["name"], "arguments": arguments}
        found.append({"id": given["id"], "type": "function", "function": function})
    return found


_MESSAGE = {
    "role": Field(text, needed=True),
    "content": Field(content_text),
    "type": Field(only("message")),
    "tool_calls": Field(tool_calls),
    "tool_call_id": Field(text),
}


@takes(list_of(schema_of(_MESSAGE), 1))
def messages(name: str, value: Any) -> list[dict[str, Any]]:
    """A conversation: role and content of each message; parts of text are joined."""
    if not isinstance(value, list) or not value:
        raise refuse(name, value, "a list of one message or more")
    found = []
    for place, message in enumerate(value):
        where = f"{name}[{place}]"
        given = parse(as_object(where, message), _MESSAGE, f"{where}.")
        if given["tool_calls"] and given["role"] == "assistant":
            given["content"] = given["content"] or ""
        elif given["tool_calls"]:
            raise refuse(f"{where}.tool_calls", given["tool_calls"], "none but the assistant's")
        if given["tool_call_id"] is not None and given["role"] != "tool":
            raise refuse(f"{where}.tool_call_id", given["tool_call_id"], "none but a tool's")
        if given["content"] is None:
            raise refuse(f"{where}.content", None, "text")
        told = ("role", "content", "tool_calls", "tool_call_id")
        found.append({key: given[key] for key in told if given[key] is not None})
    return found


_FUNCTION = {
    "name": Field(text, needed=True),
    "description": Field(text),
    "parameters": Field(as_object),
    "strict": Field(only(False)),
}
_TOOL = {
    "type": Field(only("function"), needed=True),
    "function": Field(Read(as_object, schema_of(_FUNCTION)), needed=True),
}


@takes(list_of(schema_of(_TOOL)))
def tools(name: str, value: Any) -> list[dict[str, Any]]:
    """Functions that the assistant may call, as the chat template is told them."""
    if not isinstance(value, list):
        raise refuse(name, value, "a list of tools")
    for place, tool in enumerate(value):
        where = f"{name}[{place}]"
        given = parse(as_object(where, tool), _TOOL, f"{where}.")
        parse(given["function"], _FUNCTION, f"{where}.function.")
    return value


@takes({"anyOf": [{"type": "string"}, messages.schema]})
def conversation(name: str, value: Any) -> list[dict[str, Any]]:
    """The input of a response: text, which is the user's message, or messages."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else messages(name, value)


_COUNT = whole(0, 2**31)
_WRITING = {
    "model": Field(text),
    "temperature": Field(number(0), 1.0),
    "top_p": Field(number(0, 1), 1.0),
    "stream": Field(flag, False),
}
_CHOOSING = {
    "top_k": Field(_COUNT, 0),
    "min_p": Field(number(0, 1), 0.0),
    "repetition_penalty": Field(number(0), 1.0),
    "n": Field(whole(1, MOST_ROWS), 1),
    "seed": Field(whole(0, 2**63 - 1)),
    "stop": Field(stops, ()),
    "stream_options": Field(stream_options),
    "frequency_penalty": Field(only(0)),
    "presence_penalty": Field(only(0)),
    "logit_bias": Field(only({})),
}
COMPLETION = {
    **_WRITING,
    **_CHOOSING,
    "prompt": Field(prompts, needed=True),
    "max_tokens": Field(_COUNT, 16),
    "echo": Field(flag, False),
    "logprobs": Field(whole(0, MOST_TOP)),
    "best_of": Field(only(1)),
}
CHAT = {
    **_WRITING,
    **_CHOOSING,
    "messages": Field(messages, needed=True),
    "max_tokens": Field(_COUNT),
    "max_completion_tokens": Field(_COUNT),
    "logprobs": Field(flag, False),
    "top_logprobs": Field(whole(0, MOST_TOP)),
    "response_format": Field(only({"type": "text"})),
    "tools": Field(tools, []),
    "tool_choice": Field(only("none", "auto"), "auto"),
    "parallel_tool_calls": Field(only(True)),
}
RESPONSE = {
    **_WRITING,
    "input": Field(conversation, needed=True),
    "instructions": Field(text),
    "max_output_tokens": Field(whole(1, 2**31)),
    "store": Field(only(False)),
    "text": Field(only({"format": {"type": "text"}})),
    "tools": Field(only([])),
}
EMBEDDING = {
    "model": Field(text),
    "input": Field(prompts, needed=True),
    "encoding_format": Field(only("float", "base64"), "float"),
}
TOKENIZE = {
    "model": Field(text),
    "prompt": Field(text, needed=True),
    "add_special_tokens": Field(flag, True),
    "parse_special": Field(flag, True),
    "return_token_strs": Field(flag, False),
}
DETOKENIZE = {"model": Field(text), "tokens": Field(token_ids, needed=True)}
