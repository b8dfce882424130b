"""Instruction data: conversations of which the model learns to write the answers, and no more.

Two forms of example are read, Alpaca's (Taori et al. 2023) and messages:

    {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"}
    {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}

Both are written in the checkpoint's own chat format. A base model has none; it learns PLAIN, which
is saved with it as its chat template, so that `pellucid chat` speaks it afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

import torch

from pellucid.tokenizers import ChatFormat, TemplateChat, Tokenizer
from pellucid.tokenizers.chat import with_marks_of_answers
from pellucid.train.finetune.records import Record, place_of, text_of
from pellucid.train.finetune.rows import Example

# ### System:      ### Instruction:     ### Response:
# text             text                 text<end>            a blank line between two of them
PLAIN = """\
{%- set titles = {'system': 'System', 'user': 'Instruction', 'assistant': 'Response'} -%}
{{ BEGIN }}
{%- for message in messages -%}
{{ '\\n\\n' if not loop.first }}### {{ titles[message.role] or raise_exception(
    'the roles are system, user and assistant') }}:
{{ message.content | trim }}
{%- if message.role == 'assistant' %}{{ END }}{% endif -%}
{%- endfor -%}
{{ '\\n\\n### Response:\\n' if add_generation_prompt }}"""
_EXPECTED = "messages, or instruction and output"
SLACK = 3  # tokens at the end of a prompt that may be cut otherwise when the answer follows


def plain_chat(tokenizer: Tokenizer) -> TemplateChat:
    """The format PLAIN for a model without one of its own.

    ValueError where the tokenizer has no token that ends a text: an answer could not end.
    """
    if tokenizer.eos_id is None:
        raise ValueError(
            "this tokenizer has no token that ends a text, so an answer could not end: "
            "fine-tune on plain text, or use a model that has one"
        )
    end = tokenizer.token_string(tokenizer.eos_id)
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    begin = "" if bos is None else tokenizer.token_string(bos)
    template = PLAIN.replace("BEGIN", json.dumps(begin)).replace("END", json.dumps(end))
    return TemplateChat(tokenizer, template)


def chat_of(tokenizer: Tokenizer) -> tuple[ChatFormat, bool]:
    """The format to write conversations in, and whether it is PLAIN, from an earlier run or new.

    ValueError as from `plain_chat`.
    """
    own = tokenizer.chat
    if own is None:
        return plain_chat(tokenizer), True
    if not isinstance(own, TemplateChat) or tokenizer.eos_id is None:
        return own, False
    return own, own.template == plain_chat(tokenizer).template


def conversation(record: Record, number: int, *, plain: bool) -> list[dict[str, str]]:
    """The messages of an example, the last of them an answer; empty where it has none.

    number  of the example, for messages of error about one that comes from no file
    plain   the input of an Alpaca example has a heading of its own; chat formats have no place
            for one
    """
    where = place_of(record, number)
    if "messages" not in record:
        if "instruction" not in record:
            raise ValueError(f"{where} has {', '.join(record)}: expected {_EXPECTED}")
        question = text_of(record, "instruction", where).strip()
        given = text_of(record, "input", where, "").strip()
        if given:
            question += f"\n\n### Input:\n{given}" if plain else f"\n\n{given}"
        answer = text_of(record, "output", where)
        system = text_of(record, "system", where, "").strip()
        before = [{"role": "system", "content": system}] if system else []
        both = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return before + both if answer.strip() else []
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(part, dict) for part in messages):
        raise ValueError(f"{where}: messages is no list of objects with role and content")
    said = [{key: text_of(part, key, where) for key in ("role", "content")} for part in messages]
    last = max((i for i, part in enumerate(said) if _is_answer(part)), default=-1)
    return said[: last + 1]


def _is_answer(message: dict[str, str]) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip())


def examples(records: Iterable[Record], chat: ChatFormat, *, plain: bool) -> Iterator[Example]:
    """Every conversation in tokens, its answers wanted; one without an answer wants nothing.

    Raises ValueError, naming the example, for one that cannot be read or written.
    """
    for number, record in enumerate(records, start=1):
        said = conversation(record, number, plain=plain)
        if not said:
            yield Example(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.bool))
            continue
        try:
            yield from answered(said, chat)
        except ValueError as error:
            raise ValueError(f"{place_of(record, number)}: {error}") from None


def answered(said: Sequence[dict[str, str]], chat: ChatFormat) -> list[Example]:
    """A conversation in tokens, every answer in it wanted, with the token that ends it.

    Where a template writes earlier turns differently once later ones follow, the conversation
    becomes several examples, each as it stands when the model has to answer.
    """
    said = _read_marks(said, chat)
    whole = torch.tensor(chat.encode(said, add_generation_prompt=False))
    wanted = torch.zeros(len(whole), dtype=torch.bool)
    apart: list[Example] = []
    for place, message in enumerate(said):
        if not _is_answer(message):
            continue
        example = last_answer(said[: place + 1], chat)
        length = len(example.ids)
        if torch.equal(whole[:length], example.ids):
            wanted[:length] |= example.wanted
        else:
            apart.append(example)
    return [Example(whole, wanted), *apart] if wanted.any() else apart


def last_answer(said: Sequence[dict[str, str]], chat: ChatFormat) -> Example:
    """A conversation in tokens, the last message wanted, with the token that ends it.

    ValueError for a format that writes the messages before it otherwise once it follows.
    """
    said = _read_marks(said, chat)
    whole = chat.encode(said, add_generation_prompt=False)
    begin = _common(chat.encode(said[:-1]), whole)
    return Example(torch.tensor(whole), torch.arange(len(whole)) >= begin)


def _read_marks(said: Sequence[dict[str, str]], chat: ChatFormat) -> list[dict[str, str]]:
    """The messages, in whose answers "<think>" and the like are the tokens of that name."""
    return [
        {**part, "content": with_marks_of_answers(chat.tokenizer, part["content"])}
        if part["role"] == "assistant"
        else part
        for part in said
    ]


def _common(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """Tokens that a prompt has in common with the same prompt and its answer."""
    pairs = enumerate(zip(prompt, whole, strict=False))
    same = next((i for i, (one, other) in pairs if one != other), min(len(prompt), len(whole)))
    if same < len(prompt) - SLACK:
        raise ValueError(
            "the chat format writes the prompt otherwise once the answer follows: its answer "
            f"cannot be told from the prompt (they part at token {same} of {len(prompt)})"
        )
    return same
