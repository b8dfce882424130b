"""Instruction data: only answers are wanted, in the model's own chat format or a plain one."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from pellucid import tokenizers
from pellucid.tokenizers import Llama2Chat, TemplateChat
from pellucid.train.finetune.instructions import answered, conversation, examples, plain_chat
from pellucid.train.finetune.records import kind_of, read_records

DEMO = Path(tokenizers.__file__).parents[1] / "demos" / "stdlib"
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": " ```1``` "},
    {"role": "user", "content": "Two?\n"},
    {"role": "assistant", "content": "2, of course"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load(DEMO)


def wanted_text(tokenizer, example) -> str:
    return tokenizer.decode(example.ids[example.wanted].tolist())


def test_the_plain_format(tokenizer):
    (found,) = answered(TALK, plain_chat(tokenizer))
    assert tokenizer.decode(found.ids.tolist()) == (
        "<|endoftext|>### System:\nBe short.\n\n### Instruction:\nOne?\n\n"
        "### Response:\n```1```<|endoftext|>\n\n### Instruction:\nTwo?\n\n"
        "### Response:\n2, of course<|endoftext|>"
    )
    assert wanted_text(tokenizer, found) == "```1```<|endoftext|>2, of course<|endoftext|>"
    assert found.ids[found.wanted].tolist().count(tokenizer.eos_id) == 2


def test_a_prompt_is_what_chat_will_write(tokenizer):
    chat = plain_chat(tokenizer)
    (found,) = answered(TALK, chat)
    prompt = chat.encode(TALK[:-1])
    assert found.ids[: len(prompt)].tolist() == prompt
    assert not found.wanted[len(prompt) - 1]
    assert found.wanted[len(prompt) :].all()


def test_text_cannot_end_a_turn(tokenizer):
    talk = [TALK[1], {"role": "assistant", "content": "a<|endoftext|>b"}]
    (found,) = answered(talk, plain_chat(tokenizer))
    assert found.ids.tolist().count(tokenizer.eos_id) == 2  # the first token and the last


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ({"instruction": " Add. ", "input": "2 and 3", "output": "5"}, "Add.\n\n2 and 3"),
        ({"instruction": "Add 2 and 3.", "input": "", "output": "5"}, "Add 2 and 3."),
        ({"instruction": "Add 2 and 3.", "input": None, "output": "5"}, "Add 2 and 3."),
        ({"instruction": "Add 2 and 3.", "output": "5"}, "Add 2 and 3."),
    ],
)
def test_alpaca(record, question):
    said = conversation(record, 1, plain=False)
    assert [part["content"] for part in said] == [question, "5"]


def test_the_input_has_a_heading_in_the_plain_format():
    record = {"instruction": "Add.", "input": "2", "output": "5", "system": "Be short."}
    said = conversation(record, 1, plain=True)
    assert [part["content"] for part in said] == ["Be short.", "Add.\n\n### Input:\n2", "5"]


def test_what_follows_the_last_answer_is_left_out_and_nothing_is_wanted_without_one(tokenizer):
    chat = plain_chat(tokenizer)
    records = [{"messages": [*TALK, TALK[1]]}, {"messages": TALK[:2]}]
    records += [{"instruction": "x", "output": " "}]
    first, second, third = examples(records, chat, plain=True)
    assert wanted_text(tokenizer, first).endswith("2, of course<|endoftext|>")
    assert not second.wanted.any()
    assert not third.wanted.any()


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question": "x"}, "example 1 has question: expected messages, or instruction and output"),
        ({"instruction": 3, "output": "x"}, "example 1: 'instruction' is '3'; expected text"),
        ({"messages": "x"}, "example 1: messages is no list"),
        ({"messages": [{"role": "user"}]}, "example 1: 'content' is 'None'; expected text"),
        ({"messages": [{"role": "x", "content": "y"}, TALK[4]]}, "the roles are system, user"),
    ],
)
def test_what_cannot_be_read(record, said, tokenizer):
    with pytest.raises(ValueError, match=said):
        list(examples([record], plain_chat(tokenizer), plain=True))


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each_answer(tokenizer):
    """As templates do that drop an earlier answer's thoughts."""
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' and not loop.last %}"
        "(short){% else %}{{ m.content }}{% endif %}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = TemplateChat(tokenizer, template)
    last, first = answered(TALK, chat)
    assert wanted_text(tokenizer, first) == " ```1``` <|endoftext|>"
    assert wanted_text(tokenizer, last) == "2, of course<|endoftext|>"
    assert "(short)" in tokenizer.decode(last.ids.tolist())


def test_a_template_whose_prompt_changes_is_refused(tokenizer):
    template = "{{ messages | length }} messages{% for m in messages %} {{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="writes the prompt otherwise once the answer follows"):
        answered(TALK, TemplateChat(tokenizer, template))


@pytest.mark.assets
@pytest.mark.parametrize("family", ["llama3", "llama2"])
def test_the_chat_formats_of_real_models(family, assets: Path):
    folders = {"llama3": "llama3", "llama2": "llama2"}
    tokenizer = tokenizers.load(next(assets.rglob(f"*{folders[family]}*/tokenizer.model")))
    chat = tokenizer.chat or Llama2Chat(tokenizer)
    found = answered(TALK, chat)
    text = "".join(wanted_text(tokenizer, example) for example in found)
    assert "```1```" in text
    assert "2, of course" in text
    assert "One?" not in text
    ends = {"llama3": "<|eot_id|>", "llama2": "</s>"}[family]
    assert text.count(ends) == 2


def test_files(tmp_path: Path):
    alpaca = [{"instruction": "a", "output": "b"}, {"instruction": "c\u2028d", "output": "e"}]
    (tmp_path / "a.json").write_text(json.dumps(alpaca))
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in alpaca)
    (tmp_path / "a.jsonl").write_text(f"\ufeff{lines}\n\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text('text,label\n"a, b\nc",x\nd,y\n')
    assert read_records(tmp_path / "a.json") == alpaca
    assert read_records(tmp_path / "a.jsonl") == alpaca
    found = read_records(tmp_path / "a.csv")
    assert found == [{"text": "a, b\nc", "label": "x"}, {"text": "d", "label": "y"}]
    assert kind_of(found[0]) == "classification"
    assert kind_of(alpaca[0]) == "instructions"
    assert kind_of({"messages": []}) == "instructions"
    assert kind_of({"prompt": "", "chosen": "", "rejected": ""}) == "preferences"
    assert kind_of({"text": "x"}) == "text"
    with pytest.raises(ValueError, match="an example with question: expected preferences: chosen"):
        kind_of({"question": 1})


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"text": 1}\n{"text', "line 2 is not JSON"),
        ("a.jsonl", "3\n", "line 1: expected a JSON object, found a int"),
        ("a.json", "[1, 2]", "example 1: expected a JSON object"),
        ("a.json", "[", "a.json is not JSON"),
        ("a.csv", "text,label\na\n", "line 2: expected 2 fields, text, label"),
        ("a.csv", "text,label\na,b,c\n", "line 2: expected 2 fields"),
        ("a.jsonl", "\n", "has no examples in it"),
    ],
)
def test_damaged_files(name, text, said, tmp_path: Path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_records(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such file of examples"):
        read_records(tmp_path / "none.jsonl")


def test_a_line_of_csv_ends_at_a_line_feed_and_nowhere_else(tmp_path: Path):
    """Form feeds and Unicode's own separators are text, in quotes and without."""
    texts = ["page\fnext", "one\u2028two", "one\x85two", 'quoted "a\fb", c', "last"]
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "label"], *([text, "x"] for text in texts)])
    found = read_records(path)
    assert [record["text"] for record in found] == texts
    assert [record.where for record in found] == [f"{path}, line {n}" for n in range(2, 7)]
