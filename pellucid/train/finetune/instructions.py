"""Instruction data: conversations of which the model learns to write the answers, and no more.

Four forms of example are read: Alpaca's (Taori et al. 2023), messages, ShareGPT's, and TRL's:

    {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"}
    {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}
    {"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]}
    {"prompt": "2 + 3 = ", "completion": "5"}

All but a prompt and a completion that are plain texts are written in the checkpoint's own chat
format. A base model has none; it learns PLAIN, which is saved with it as its chat template, so that
`pellucid chat` speaks it afterwards.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from pellucid.files import parse_json
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
Message = dict[str, Any]
_EXPECTED = "messages, or instruction and output, or prompt and completion"
# ShareGPT's names of roles -> those of chat formats
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
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


def conversation(record: Record, number: int, *, plain: bool) -> list[Message]:
    """The messages of an example, the last of them an answer; empty where it has none.

    number  of the example, for messages of error about one that comes from no file
    plain   the input of an Alpaca example has a heading of its own; chat formats have no place
            for one
    """
    where = place_of(record, number)
    for key in ("messages", "conversations"):
        if key in record:
            return up_to_answer(messages_of(record[key], f"{where}: {key}", where))
    if isinstance(record.get("completion"), list):
        prompt = messages_of(record.get("prompt") or [], f"{where}: prompt", where)
        return up_to_answer(
            [*prompt, *messages_of(record["completion"], f"{where}: completion", where)]
        )
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


def messages_of(given: Any, what: str, where: str) -> list[Message]:
    """Messages as data sets hold them, with role and content.

    ShareGPT's ``from`` and ``value`` count as well, content as a list of parts that are text, and
    none beside the calls of tools. `what` and `where` begin a ValueError about anything else.
    """
    if not isinstance(given, list) or not all(isinstance(part, dict) for part in given):
        raise ValueError(f"{what} is no list of objects with role and content")
    found: list[Message] = []
    for part in given:
        if "from" in part and "role" not in part:
            said = text_of(part, "from", where)
            value = {"role": _SHAREGPT.get(said, said), "content": text_of(part, "value", where)}
            part = {**part, **value}
        content = part.get("content")
        if isinstance(content, list):
            if any(not isinstance(one, dict) or one.get("type") != "text" for one in content):
                raise ValueError(f"{where}: 'content' has parts that are not text")
            content = "".join(text_of(one, "text", where) for one in content)
        if content is None and part.get("tool_calls"):
            content = ""
        message = {**part, "content": content}
        found.append(
            {**message, **{key: text_of(message, key, where) for key in ("role", "content")}}
        )
    return found


def up_to_answer(said: list[Message]) -> list[Message]:
    """A conversation without what follows the last answer."""
    last = max((i for i, part in enumerate(said) if _is_answer(part)), default=-1)
    return said[: last + 1]


def _is_answer(message: Message) -> bool:
    wrote = bool(message["content"].strip() or message.get("tool_calls"))
    return message["role"] == "assistant" and wrote


def examples(records: Iterable[Record], chat: ChatFormat, *, plain: bool) -> Iterator[Example]:
    """Every conversation in tokens, its answers marked as what the model learns to write.

    A prompt and a completion that are texts are one text, marked from the end of the prompt.
    Raises ValueError, naming the example, for one that cannot be read or written.
    """
    for number, record in enumerate(records, start=1):
        where = place_of(record, number)
        if isinstance(record.get("completion"), str) and "messages" not in record:
            prompt = text_of(record, "prompt", where)
            yield continued(prompt, record["completion"], chat.tokenizer)
            continue
        said = conversation(record, number, plain=plain)
        if not said:
            yield Example(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.bool))
            continue
        try:
            yield from answered(said, chat, tools_of(record))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def tools_of(record: Record) -> list[dict[str, Any]] | None:
    """The tools that an example states, as objects or as their JSON; ValueError for others."""
    tools = record.get("tools") or None
    if isinstance(tools, str):
        with contextlib.suppress(ValueError):
            tools = parse_json(tools, "tools")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise ValueError(f"tools is {str(tools)[:60]!r}; expected a list of objects")
    return tools


def continued(prompt: str, answer: str, tokenizer: Tokenizer) -> Example:
    """A text; the loss counts its part after the prompt, with the end token."""
    bos = tokenizer.adds_bos or (prompt == "" and tokenizer.bos_id is not None)
    before = tokenizer.encode(prompt, bos=bos)
    whole = tokenizer.encode(prompt + answer, bos=bos, eos=tokenizer.eos_id is not None)
    same = zip(before, whole, strict=False)
    begin = next((i for i, (one, other) in enumerate(same) if one != other), len(before))
    return Example(torch.tensor(whole), torch.arange(len(whole)) >= begin)


def answered(
    said: Sequence[Message], chat: ChatFormat, tools: Sequence[Mapping[str, Any]] | None = None
) -> list[Example]:
    """A conversation in tokens; the loss counts every answer, with the token that ends it.

    Where a template writes earlier turns differently once later ones follow, the conversation
    becomes several examples, each as it stands when the model has to answer.
    """
    said = _read_marks(said, chat)
    places = [place for place, message in enumerate(said) if _is_answer(message)]
    found = [last_answer(said[: place + 1], chat, tools) for place in places]
    whole = found[-1].ids if found else torch.tensor([], dtype=torch.long)
    wanted = torch.zeros(len(whole), dtype=torch.bool)
    apart: list[Example] = []
    for example in found:
        length = len(example.ids)
        if torch.equal(whole[:length], example.ids):
            wanted[:length] |= example.wanted
        else:
            apart.append(example)
    return [Example(whole, wanted), *apart] if wanted.any() else apart


def last_answer(
    said: Sequence[Message], chat: ChatFormat, tools: Sequence[Mapping[str, Any]] | None = None
) -> Example:
    """A conversation in tokens; the loss counts the last message, with the token that ends it.

    Nothing follows that token, whatever the format writes there: a line break, the next header.
    A format that ends a turn only where another begins gets the token it would write then.
    ValueError for a format that writes the messages before it otherwise once it follows, that ends
    no turn, or that does not write the calls of tools.
    """
    said = _read_marks(said, chat)
    whole = chat.encode(said, add_generation_prompt=False, tools=tools)
    _check_calls(said, whole, chat, tools)
    begin = _common(chat.encode(said[:-1], tools=tools), whole)
    stops = chat.tokenizer.stop_ids
    end = next((i for i in range(begin, len(whole)) if whole[i] in stops), None)
    if end is None:
        whole.append(_end_of_turn(said, whole, chat, tools))
    else:
        whole = whole[: end + 1]
    return Example(torch.tensor(whole), torch.arange(len(whole)) >= begin)


def _check_calls(said: Sequence[Message], whole: list[int], chat: ChatFormat, tools: Any) -> None:
    if not said[-1].get("tool_calls"):
        return
    without = {key: value for key, value in said[-1].items() if key != "tool_calls"}
    if chat.encode([*said[:-1], without], add_generation_prompt=False, tools=tools) == whole:
        raise ValueError("this model's chat template writes no calls of tools")


def _end_of_turn(said: Sequence[Message], whole: list[int], chat: ChatFormat, tools: Any) -> int:
    """The stop token that a format writes once a message follows, else the one that ends a text."""
    follows = [*said, {"role": "user", "content": "."}]
    with contextlib.suppress(ValueError):  # not every format allows a user's message here
        longer = chat.encode(follows, add_generation_prompt=False, tools=tools)
        if len(longer) > len(whole) and longer[: len(whole)] == whole:
            following = longer[len(whole)]
            if following in chat.tokenizer.stop_ids:
                return following
    if chat.tokenizer.eos_id is None:
        raise ValueError("the chat format ends no answer, and the tokenizer has no end token")
    return chat.tokenizer.eos_id


def _read_marks(said: Sequence[Message], chat: ChatFormat) -> list[Message]:
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
