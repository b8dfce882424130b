"""Calls of tools: the form is read off the template, and answers are parted by it."""

from __future__ import annotations

import json

import pytest
from serving import TEMPLATE, call, language_model, served, stream

from pellucid.serve import ServedModel, chat
from pellucid.serve.tools import CallForm, CallReader, call_form
from pellucid.serve.writing import TextPiece
from pellucid.tokenizers.chat import chat_for

TOLD = "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
LOOP = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}CALLS{% endif %}"
END = "\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
TAGS = "{% for c in m.tool_calls %}<call>\n{{ c.function | tojson }}\n</call>{% endfor %}"
LIST = "[TOOL_CALLS] [{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}]"
BARE = (
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
)
FORMS = {TAGS: ("<call>", "arguments"), LIST: ("[TOOL_CALLS] [", "arguments"),
         BARE: ("", "parameters")}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
ASKED = [{"role": "user", "content": "the cat"}]


def template(calls: str) -> str:
    return TOLD + LOOP.replace("CALLS", calls) + END


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return language_model(tmp_path_factory.mktemp("bpe"), context=512)


@pytest.fixture(scope="module")
def client(lm):
    with served(ServedModel(lm, "tiny", fast=False)) as client:
        yield client


@pytest.mark.parametrize("calls", FORMS)
def test_the_form_of_a_call_is_the_templates(lm, calls):
    form = call_form(chat_for(lm.tokenizer, template(calls), {}))
    assert form == CallForm(*FORMS[calls])


def test_a_template_without_tools_has_no_form(lm):
    assert call_form(chat_for(lm.tokenizer, TEMPLATE, {})) is None
    assert call_form(chat_for(lm.tokenizer, TOLD + TEMPLATE, {})) is None  # no calls


TEXTS = [
    ("<call>", 'So: <call>\n{"name": "a", "arguments": {"x": "{"}}\n</call>', "So: ", ["a"]),
    ("<call>", '<call>{"name": "a", "arguments": {}}</call>\n<call>{"name": "b", "arguments": {}}'
     "</call>", "", ["a", "b"]),
    ("<call>", "1 < 2 <cal", "1 < 2 <cal", []),
    ("<call>", '<call>{"name": "a", "argum', '<call>{"name": "a", "argum', []),
    ("<call>", '<call>{"name": 3, "arguments": {}}', '<call>{"name": 3, "arguments": {}}', []),
    ("[TOOL_CALLS] [", '[TOOL_CALLS] [{"name": "a", "arguments": {}}, {"name": "b", "arguments": '
     '{"x": 1}}]', "", ["a", "b"]),
    ("", ' {"name": "a", "arguments": {"x": [1, {}]}}', "", ["a"]),
    ("", 'a {"name": "a", "arguments": {}}', 'a {"name": "a", "arguments": {}}', []),
    ("", '{"a": 1}', '{"a": 1}', []),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_an_answer_is_parted_however_it_is_cut(number):
    begins, answer, text, names = TEXTS[number]
    for size in (1, 2, 3, 7, len(answer)):
        reader = CallReader(CallForm(begins, "arguments"))
        shown = "".join(reader.push(answer[i : i + size]) for i in range(0, len(answer), size))
        rest, calls = reader.finish()
        assert shown + rest == text
        assert [made["function"]["name"] for made in calls] == names
        assert all(isinstance(json.loads(made["function"]["arguments"]), dict) for made in calls)


def test_a_call_and_its_result_through_the_endpoint(client, lm, monkeypatch):
    monkeypatch.setattr(lm.tokenizer, "chat", chat_for(lm.tokenizer, template(TAGS), {}))
    text = 'I look. <call>{"name": "find", "arguments": {"what": "é"}}</call>'
    steps = [[TextPiece(0, text[i : i + 5])] for i in range(0, len(text), 5)]
    with monkeypatch.context() as patch:
        patch.setattr(chat, "write", lambda _: iter([*steps, [TextPiece(0, finish_reason="stop")]]))
        patch.setattr(chat.Chat, "_used", lambda *_: {}, raising=False)
        whole = call(client, "/v1/chat/completions", messages=ASKED, tools=[TOOL])
        chunks = stream(client, "/v1/chat/completions", messages=ASKED, tools=[TOOL])
        plain = call(client, "/v1/chat/completions", messages=ASKED, tools=[TOOL],
                     tool_choice="none")  # fmt: skip
    message = whole["choices"][0]["message"]
    assert whole["choices"][0]["finish_reason"] == "tool_calls"
    assert message["content"] == "I look. "
    (made,) = message["tool_calls"]
    assert json.loads(made["function"]["arguments"]) == {"what": "é"}
    deltas = [chunk["choices"][0] for chunk in chunks]
    assert deltas[0]["delta"] == {"role": "assistant", "content": None}
    assert deltas[-1]["delta"] == {} and deltas[-1]["finish_reason"] == "tool_calls"
    (told,) = deltas[-2]["delta"]["tool_calls"]
    assert told["index"] == 0 and told["function"] == made["function"]
    assert "".join(one["delta"].get("content") or "" for one in deltas) == "I look. "
    assert plain["choices"][0]["message"] == {"role": "assistant", "content": text}
    # The model reads the call and its result as its template writes them.
    said = {"role": "assistant", "content": None, "tool_calls": [made]}
    result = {"role": "tool", "tool_call_id": made["id"], "content": "on the mat"}
    answer = call(
        client, "/v1/chat/completions", messages=[*ASKED, said, result], max_tokens=3,
        temperature=0, tools=[TOOL],
    )  # fmt: skip
    read = {"name": "find", "arguments": {"what": "é"}}
    seen = [ASKED[0], {**said, "content": "", "tool_calls": [{**made, "function": read}]}, result]
    row = lm.tokenizer.chat.encode(seen, tools=[TOOL])
    assert answer["usage"]["prompt_tokens"] == len(row)
    assert answer["choices"][0]["message"]["content"] == lm.generate(
        row, max_new_tokens=3, temperature=0.0, fast=False
    )


WRONG = [
    ({"tools": [TOOL]}, "tools", "no place for tools"),
    ({"tools": [{**TOOL, "type": "web"}]}, "tools[0].type", "expected"),
    ({"tools": [{**TOOL, "x": 1}]}, "tools[0].x", "no such field"),
    ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "nothing else is served"),
    ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls", "expected true"),
    ({"messages": [{"role": "user", "content": "a", "tool_call_id": "x"}]},
     "messages[0].tool_call_id", "none but a tool's"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {"id": "x", "type": "function", "function": {"name": "a", "arguments": "["}}]}]},
     "messages[0].tool_calls[0].function.arguments", "a JSON object"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_cannot_be_called_is_named(client, number):
    body, param, said = WRONG[number]
    answer = client.post("/v1/chat/completions", json={"messages": ASKED, **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert said in answer.json()["error"]["message"]
