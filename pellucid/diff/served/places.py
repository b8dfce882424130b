"""Other tokens than A has: the begin token, another chat format, a context that was cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pellucid.diff.served.said import Messages, Said
from pellucid.tokenizers import ChatFormat, Llama2Chat, Llama3Chat, TemplateChat, Tokenizer

# Formats in which models are commonly served, written as templates: name -> (a message, the end).
_FORMATS = {
    "ChatML": ("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n"),
    "Zephyr": ("<|{role}|>\n{content}</s>\n", "<|assistant|>\n"),
    "Vicuna": ("{ROLE}: {content} ", "ASSISTANT:"),
    "Alpaca": ("### {Role}:\n{content}\n\n", "### Assistant:\n"),
    "role: content": ("{role}: {content}\n", "assistant:"),
    "the bare text": ("{content}", ""),
}
_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Each text in other token ids: which, and how far its places have moved in them.

    begin  places before it (of the prompt) are not the same tokens, and are not compared
    """

    cause: str
    evidence: str
    ids: list[list[int]]
    shifts: list[int]
    begin: list[int]


def begin_tokens(texts: Sequence[Said], bos: int | None) -> Iterator[Moved]:
    """Without the begin token, with one, with two."""
    if bos is None:
        return
    first = [said.ids[:1] == [bos] for said in texts]
    if all(first):
        yield _shifted("BOS missing", f"the text begins without {bos}", texts, [], drop=1)
        yield _shifted("BOS doubled", f"{bos} stands twice", texts, [bos])
    elif not any(first):
        yield _shifted("BOS added", f"{bos} stands before the text", texts, [bos])


def _shifted(
    cause: str, evidence: str, texts: Sequence[Said], before: list[int], drop: int = 0
) -> Moved:
    moved = len(before) - drop
    return Moved(
        cause=cause,
        evidence=evidence,
        ids=[[*before, *said.ids[drop:]] for said in texts],
        shifts=[moved] * len(texts),
        begin=[0] * len(texts),
    )


def other_prompts(texts: Sequence[Said], tokenizer: Tokenizer | None) -> Iterator[Moved]:
    """The same conversation in other formats, where a conversation is known."""
    if tokenizer is None or not all(said.messages for said in texts):
        return
    for evidence, chat, changed in _chats(tokenizer):
        ids, shifts, begin = [], [], []
        try:
            for said in texts:
                encoded = changed(chat, said.messages or [])
                ids.append([*encoded, *said.ids[said.written :]])
                shifts.append(len(encoded) - said.written)
                begin.append(said.written)
        except ValueError:  # a format that cannot write this conversation
            continue
        yield Moved(cause="chat template", evidence=evidence, ids=ids, shifts=shifts, begin=begin)


def _chats(tokenizer: Tokenizer) -> Iterator[tuple[str, ChatFormat, _Written]]:
    own, bos = tokenizer.chat, tokenizer.bos_id
    if own is not None:
        yield "no mark that the assistant begins", own, _Written(prompt=False)
        yield "without the system message", own, _Written(system=None)
        yield f"with the system message {_SYSTEM!r}", own, _Written(system=_SYSTEM)
    formats: list[tuple[str, ChatFormat]] = []
    if all(name in tokenizer.specials for name in Llama3Chat.needs):
        formats.append(("Llama 3's format", Llama3Chat(tokenizer)))
    formats.append(("Llama 2's format", Llama2Chat(tokenizer)))
    for name, (message, end) in _FORMATS.items():
        formats.append((f"{name}'s format" if name[0].isupper() else name,
                        TemplateChat(tokenizer, _template(message, end))))  # fmt: skip
    for evidence, chat in formats:
        yield evidence, chat, _Written()
        if bos is not None and isinstance(chat, TemplateChat):
            yield f"{evidence}, after {bos}", chat, _Written(before=(bos,))


@dataclass(frozen=True, kw_only=True)
class _Written:
    """How a conversation is written: with which system message, whose turn follows."""

    prompt: bool = True
    system: str | None = ""  # "": as it is
    before: tuple[int, ...] = ()

    def __call__(self, chat: ChatFormat, messages: Messages) -> list[int]:
        kept = list(messages)
        if self.system != "":
            rest = [m for m in kept if m.get("role") != "system"]
            if (self.system is None) == (len(rest) == len(kept)):
                raise ValueError("nothing to change")
            kept = (
                rest if self.system is None else [{"role": "system", "content": self.system}, *rest]
            )
        return [*self.before, *chat.encode(kept, add_generation_prompt=self.prompt)]


def _template(message: str, end: str) -> str:
    text = message
    for name, value in (
        ("{role}", "{{ m.role }}"),
        ("{Role}", "{{ m.role | capitalize }}"),
        ("{ROLE}", "{{ m.role | upper }}"),
        ("{content}", "{{ m.content }}"),
    ):
        text = text.replace(name, value)
    return (
        "{% for m in messages %}" + text + "{% endfor %}"
        "{% if add_generation_prompt %}" + end + "{% endif %}"
    )


def cut_prompts(texts: Sequence[Said], bos: int | None) -> Iterator[Moved]:
    """Only the last tokens of the prompt were read: as many as were counted, or a round number."""
    longest = max((said.written for said in texts), default=0)
    counted = {said.counted for said in texts if said.counted is not None}
    rounds = [1 << n for n in range(4, 18)] + [3 << n for n in range(4, 16)]
    for keep in sorted({*(n for n in counted if n < longest), *(n for n in rounds if n < longest)}):
        for begun in (False, True):
            if begun and (bos is None or texts[0].ids[:1] != [bos]):
                continue
            ids, shifts = [], []
            for said in texts:
                drop = max(0, said.written - keep)
                begin = [bos] if begun and drop and bos is not None else []
                ids.append([*begin, *said.ids[drop + len(begin) :]])
                shifts.append(-drop)
            kept = "its begin token and the last" if begun else "the last"
            yield Moved(
                cause="context truncated",
                evidence=f"of the prompt {kept} {keep - begun} of {longest} tokens are read",
                ids=ids,
                shifts=shifts,
                begin=[said.written for said in texts],
            )
