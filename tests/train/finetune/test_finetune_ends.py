"""What an example teaches ends with a stop token, whatever a template writes behind an answer."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from pellucid import checkpoints, tokenizers
from pellucid.train.finetune.instructions import answered, examples
from pellucid.train.finetune.records import kind_of

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}"
ENDS = {
    "behind each": "{% for m in messages %}" + TURN + "<|im_end|>\n{% endfor %}",
    "before the next": "{% for m in messages %}{{ '<|im_end|>' if not loop.first }}"
    + TURN
    + "{% endfor %}{{ '<|im_end|>' if add_generation_prompt }}",
    "and a header": "{% for m in messages %}"
    + TURN
    + "<|im_end|>\n{% endfor %}<|im_start|>assistant\n",
    "never": "{% for m in messages %}" + TURN + "\n{% endfor %}",
}
HEADER = "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture
def speaking(tmp_path):
    """The tokenizer of `stdlib` with the marks of ChatML and a chat template."""

    def made(template: str):
        folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "m"
        shutil.copytree(checkpoints.open_checkpoint("stdlib").folder, folder)
        document = json.loads((folder / "tokenizer.json").read_text())
        for number, name in enumerate(("<|im_start|>", "<|im_end|>")):
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            token = {"id": 2048 + number, "content": name, "special": True} | flags
            document["added_tokens"].append(token)
        (folder / "tokenizer.json").write_text(json.dumps(document))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= {"chat_template": template, "eos_token": "<|im_end|>", "add_bos_token": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return tokenizers.load(folder)

    return made


def learnt(found, tokenizer) -> list[str]:
    return [
        tokenizer.decode([i for i, w in zip(e.ids.tolist(), e.wanted.tolist(), strict=True) if w])
        for e in found
    ]


@pytest.mark.parametrize("end", ENDS)
def test_each_answer_is_learnt_with_one_end_and_nothing_behind_it(speaking, end):
    header = "" if end == "and a header" else HEADER
    tokenizer = speaking(ENDS[end] + header)
    found = answered(TALK, tokenizer.chat)
    texts = learnt(found, tokenizer)
    whole = "".join(texts)
    assert whole.count("two") == whole.count("four") == 1 and "<|im_start|>" not in whole
    assert all(text.endswith("<|im_end|>") for text in texts)
    assert whole.count("<|im_end|>") == 2


def test_calls_of_tools_are_learnt_where_the_template_writes_them(speaking):
    record = {
        "tools": json.dumps([{"name": "add"}]),
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("1 + ", "2")]},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]},
        ],
    }
    tokenizer = speaking(ENDS["behind each"] + HEADER)
    with pytest.raises(ValueError, match="example 1: this model's chat template writes no calls"):
        list(examples([record], tokenizer.chat, plain=False))
    writes = "{{ tools[0].name if tools }}{% for m in messages %}" + TURN
    writes += "{% if m.tool_calls %}{{ m.tool_calls[0].name }}{% endif %}<|im_end|>{% endfor %}"
    tokenizer = speaking(writes + HEADER)
    (example,) = examples([record], tokenizer.chat, plain=False)
    assert learnt([example], tokenizer) == ["add<|im_end|>"]
    assert tokenizer.decode(example.ids.tolist()).startswith("add<|im_start|>user\n1 + 2<|im_end|>")


def test_data_sets_of_other_projects_are_read(speaking):
    tokenizer = speaking(ENDS["behind each"] + HEADER)
    sharegpt = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]
    lists = {"prompt": TALK[:1], "completion": TALK[1:2]}
    for record in ({"conversations": sharegpt}, {"messages": TALK[:2]}, lists):
        assert kind_of(record) == "instructions"
        (example,) = examples([record], tokenizer.chat, plain=False)
        want = tokenizer.chat.encode(TALK[:2], add_generation_prompt=False)
        assert example.ids.tolist() == want[: len(example.ids)]
        assert learnt([example], tokenizer)[0].strip() == "two<|im_end|>"
    (text,) = examples([{"prompt": "import", "completion": " os"}], tokenizer.chat, plain=False)
    assert tokenizer.decode(text.ids.tolist()) == "import os<|im_end|>"
    assert learnt([text], tokenizer) == [" os<|im_end|>"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
        ({"conversations": [1]}, "conversations is no list of objects"),
        ({"messages": [{"role": "assistant", "content": 5}]}, "'content' is '5'; expected text"),
        ({"messages": TALK, "tools": "[1"}, "tools is '.1'; expected a list of objects"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_example(speaking, record, expected):
    tokenizer = speaking(ENDS["behind each"] + HEADER)
    with pytest.raises(ValueError, match=f"example 1.*{expected}"):
        list(examples([record], tokenizer.chat, plain=False))
