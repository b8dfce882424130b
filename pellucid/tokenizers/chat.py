"""How a conversation becomes tokens: Llama 3's headers, Llama 2's marks, a checkpoint's template.

A conversation is a list of {"role": "system" | "user" | "assistant" | …, "content": text}. In every
format here the text of a message stays text: it cannot spell a special token.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

    from pellucid.tokenizers.base import Tokenizer

Message = Mapping[str, Any]


class ChatFormat:
    """Turns a conversation into token ids. `name` says which format it is."""

    name = ""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of the conversation, begin token included.

        Args:
            messages: each with "role" and "content", both text.
            add_generation_prompt: end with what makes the model write the assistant's next message.

        Raises:
            ValueError: a message without role or content, or an order of roles that the format
                cannot write.
        """
        if not messages:
            raise ValueError("a conversation needs at least one message, got none")
        for number, message in enumerate(messages):
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise ValueError(
                        f"message {number}: {key!r} is {message.get(key)!r}; expected text"
                    )
        return self._encode(messages, add_generation_prompt)

    def _encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        raise NotImplementedError


class Llama3Chat(ChatFormat):
    """`<|start_header_id|>role<|end_header_id|>\\n\\ntext<|eot_id|>`, once per message.

    As in Meta's llama3 code and in the released templates, the text loses white space at both ends.
    The dated system message that the 3.1+ templates add of their own accord belongs to those
    templates, not to the format.
    """

    name = "llama3"
    needs = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

    def _encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        specials = self.tokenizer.specials
        ids = [specials["<|begin_of_text|>"]]
        for message in messages:
            ids += self._header(message["role"])
            ids += self.tokenizer.encode(message["content"].strip())
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

    def _encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
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
            if place + 1 < len(turns):
                answered = f"{question} {turns[place + 1][1].strip()} "
                ids += self.tokenizer.encode(answered, bos=True, eos=True)
            else:
                ids += self.tokenizer.encode(question, bos=True)
        return ids


class TemplateChat(ChatFormat):
    """The Jinja template that a checkpoint brings along. Untrusted input: it runs in a sandbox.

    Text of a message that spells a special token is hidden from the template behind a private-use
    character and encoded as text; without this a user could end their own turn and write the
    system's.
    """

    name = "template"

    def __init__(
        self, tokenizer: Tokenizer, template: str, values: Mapping[str, str] | None = None
    ) -> None:
        """`values`: what the template may use by name, such as bos_token."""
        super().__init__(tokenizer)
        self.template, self.values = template, dict(values or {})

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the template writes it.

        Raises:
            ValueError: the template is malformed or refuses the conversation.
        """
        try:
            return self._compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self.values
            )
        except Exception as error:  # a template is a program, and may fail in any way a program can
            raise ValueError(f"this model's chat template says: {error}") from error

    def _encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        hidden, messages = self._hide_specials(messages)
        text = self.render(messages, add_generation_prompt)
        if not hidden:
            return self.tokenizer.encode(text, specials=True)
        shown = str.maketrans(hidden)
        ids: list[int] = []
        for part in self.tokenizer.split_specials(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self.tokenizer.encode(part.translate(shown))
        return ids

    def _hide_specials(
        self, messages: Sequence[Message]
    ) -> tuple[dict[str, str], Sequence[Message]]:
        """The names that were hidden, by the character that stands for each, and the messages."""
        split = self.tokenizer.split_specials
        texts = [message[key] for message in messages for key in ("role", "content")]
        spelled = {part for text in texts for part in split(text) if isinstance(part, int)}
        taken = set().union(self.template, *texts)
        free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in taken)
        marks = dict(zip(sorted(spelled), free, strict=False))

        def hide(text: str) -> str:
            return "".join(marks[part] if isinstance(part, int) else part for part in split(text))

        names = {id: name for name, id in self.tokenizer.specials.items()}
        return {mark: names[id] for id, mark in marks.items()}, [
            {**message, "role": hide(message["role"]), "content": hide(message["content"])}
            for message in messages
        ]

    @cached_property
    def _compiled(self) -> jinja2.Template:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        # The same settings and helpers as transformers' apply_chat_template, for which templates
        # are written.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        return environment.from_string(self.template)


def chat_for(
    tokenizer: Tokenizer, template: str | None, values: Mapping[str, str]
) -> ChatFormat | None:
    """The checkpoint's own template where Jinja is there to run it, else what its specials tell."""
    if template is not None and importlib.util.find_spec("jinja2") is not None:
        return TemplateChat(tokenizer, template, values)
    if all(name in tokenizer.specials for name in Llama3Chat.needs):
        return Llama3Chat(tokenizer)
    return None


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
