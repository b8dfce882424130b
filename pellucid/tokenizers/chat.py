"""How a conversation becomes tokens: Llama 3's headers, Llama 2's marks, a checkpoint's template.

A conversation is a list of {"role": "system" | "user" | "assistant" | …, "content": text}. In every
format here the text of a message stays text: it cannot spell a special token.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pellucid.tokenizers.base import ChatFormat, Message, Tokenizer
from pellucid.tokenizers.marked import Marked, Written, is_written, joined, marked_inside

if TYPE_CHECKING:
    import jinja2

    from pellucid.tokenizers.templates import ChatEnvironment

_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython", "model"}
_WORD = re.compile(r"[\w-]+")
_MOST_SAID = 400  # characters of a template's error


class Llama3Chat(ChatFormat):
    """`<|start_header_id|>role<|end_header_id|>\\n\\ntext<|eot_id|>`, once per message.

    As in Meta's llama3 code and in the released templates, the text loses white space at both ends.
    The dated system message that the 3.1+ templates add of their own accord belongs to those
    templates, not to the format.
    """

    name = "llama3"
    needs = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

    def _encode(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Any
    ) -> list[int]:
        specials = self.tokenizer.specials
        ids = [specials["<|begin_of_text|>"]]
        for message in messages:
            ids += self._header(message["role"])
            ids += self._ids(message["content"].strip())
            ids.append(specials["<|eot_id|>"])
        return ids + (self._header("assistant") if add_generation_prompt else [])

    def _header(self, role: str) -> list[int]:
        tokenizer = self.tokenizer
        # The result of a tool call comes back under the name of the interpreter that Llama 3 was
        # trained with.
        role = "ipython" if role == "tool" else role
        return [
            tokenizer.specials["<|start_header_id|>"],
            *tokenizer.encode(role),
            tokenizer.specials["<|end_header_id|>"],
            *tokenizer.encode("\n\n"),
        ]


class Llama2Chat(ChatFormat):
    """`<s>[INST] <<SYS>>\\nsystem\\n<</SYS>>\\n\\nuser [/INST] assistant </s>`, as Meta writes it.

    The marks are ordinary text to this tokenizer, so a message can contain them; the format has no
    remedy.
    """

    name = "llama2"

    def _encode(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Any
    ) -> list[int]:
        turns = [(message["role"], message["content"]) for message in messages]
        if turns[0][0] == "system" and len(turns) > 1:
            (_, system), (role, first), *rest = turns
            turns = [(role, f"<<SYS>>\n{system}\n<</SYS>>\n\n{first}"), *rest]
        roles = [role for role, _ in turns]
        expected = [("user", "assistant")[place % 2] for place in range(len(roles))]
        if roles != expected:
            raise ValueError(
                f"Llama 2 writes user and assistant in turn, after at most one system message; "
                f"got {roles}"
            )
        if add_generation_prompt and roles[-1] != "user":
            raise ValueError(
                "the last message is the assistant's, and Llama 2 has no mark that starts another; "
                "end with a user message, or pass add_generation_prompt=False"
            )
        ids: list[int] = []
        for place in range(0, len(turns), 2):
            question = f"[INST] {turns[place][1].strip()} [/INST]"
            if place + 1 < len(turns) and is_written(turns[place + 1][1]):
                # An answer of this conversation: its tokens, as the model wrote them.
                ids += self.tokenizer.encode(question, bos=True)
                ids += self._ids(turns[place + 1][1].strip())
                ids += self.tokenizer.encode("", eos=True)
            elif place + 1 < len(turns):
                answered = f"{question} {turns[place + 1][1].strip()} "
                ids += self.tokenizer.encode(answered, bos=True, eos=True)
            else:
                ids += self.tokenizer.encode(question, bos=True)
        return ids


class TemplateChat(ChatFormat):
    """The Jinja template that a checkpoint brings along. Untrusted input: it runs in a sandbox with
    a budget (`templates.py`).

    It sees messages as they are. Only what the template itself writes can become a control token;
    without this a user could end their own turn and write the system's. A role counts as the
    template's own word where templates build a token's name of it ("<|user|>"): a usual one, or one
    that the template knows by name.
    """

    name = "template"
    tells_tools = True

    def __init__(
        self, tokenizer: Tokenizer, template: str, values: Mapping[str, str] | None = None
    ) -> None:
        """`values`: what the template may use by name, such as bos_token."""
        super().__init__(tokenizer)
        self.template, self.values = template, dict(values or {})

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the template writes it.

        Raises:
            ValueError: the template is malformed, refuses the conversation, or takes too much time
                or memory.
        """
        return str.__str__(self._render(messages, add_generation_prompt))

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Any = None
    ) -> Marked:
        values: dict[str, Any] = {
            # transformers says None where there are none, and templates ask for that
            "tools": marked_inside(tools) if tools else None,
            "documents": None,
            **{key: Marked.own(text) for key, text in self.values.items()},
            "messages": [self._marked(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            environment, template = self._compiled
            return environment.write(template, values, len(repr(messages)))
        except Exception as error:  # a template is a program, and may fail in any way a program can
            said = " ".join(str(error).split())[:_MOST_SAID] or type(error).__name__
            said = "".join(part if part.isprintable() else "?" for part in said)
            raise ValueError(f"this model's chat template says: {said}") from error

    def _marked(self, message: Message) -> dict[str, Any]:
        marked: dict[str, Any] = marked_inside(message)
        if message["role"] in self._known_roles:
            marked["role"] = Marked.own(message["role"])
        return marked

    def _encode(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Any
    ) -> list[int]:
        return self._ids(self._render(messages, add_generation_prompt, tools))

    @cached_property
    def _known_roles(self) -> set[str]:
        from pellucid.tokenizers.templates import constants

        names = {text for text in constants(self.template) if _WORD.fullmatch(text)}
        return names | _ROLES

    @cached_property
    def _compiled(self) -> tuple[ChatEnvironment, jinja2.Template]:
        from pellucid.tokenizers.templates import ChatEnvironment

        environment = ChatEnvironment()
        return environment, environment.from_string(self.template)


def chat_for(
    tokenizer: Tokenizer, template: str | None, values: Mapping[str, str]
) -> ChatFormat | None:
    """The checkpoint's own template where Jinja is there to run it, else what its specials tell."""
    if template is not None and importlib.util.find_spec("jinja2") is not None:
        return TemplateChat(tokenizer, template, values)
    if all(name in tokenizer.specials for name in Llama3Chat.needs):
        return Llama3Chat(tokenizer)
    return None


def as_written(
    tokenizer: Tokenizer, text: str, tokens: Iterable[int], after: Iterable[int]
) -> Marked:
    """An answer's text that encodes to the tokens the model wrote, wherever a chat format keeps it.

    tokens  of the answer; those that `text` does not hold (a stop token, what follows a stop
            string) are left out
    after   the prompt, which decides whether a leading space is kept
    """
    stream = tokenizer.stream(after=after)
    found: list[Marked] = []
    ids: list[int] = []
    length = 0
    for token in tokens:
        ids.append(token)
        piece = stream.push(token)
        if not piece:
            continue
        if not text.startswith(piece, length):
            break
        mark = Written(tuple(ids), piece)
        found.append(Marked(piece, [mark] * len(piece)))
        length, ids = length + len(piece), []
    return joined([*found, text[length:]])


def with_marks_of_answers(tokenizer: Tokenizer, text: str) -> Marked:
    """An answer out of training data, in which marks that an answer holds are those tokens.

    Such are added tokens that are not called special and end nothing: "<think>", "<tool_call>".
    """
    if isinstance(text, Marked):
        return text
    inside = {id for name, id in tokenizer.controls.items() if name not in tokenizer.specials}
    names = {id: name for name, id in tokenizer.controls.items()}
    pieces = [
        part
        if isinstance(part, str)
        else Marked.own(names[part])
        if part in inside - tokenizer.stop_ids
        else names[part]
        for part in tokenizer.split_specials(text)
    ]
    return joined(pieces)
