"""Marked text: everything that strings can do, and who wrote each character."""

from __future__ import annotations

import copy
import json
import pickle
import random
from typing import Any

import pytest

from pellucid.tokenizers import Tokenizer
from pellucid.tokenizers.chat import as_written, with_marks_of_answers
from pellucid.tokenizers.marked import (
    OWN,
    SAID,
    Marked,
    joined,
    marks_of,
    parts,
)

# Text in which a letter says who wrote it: capitals are the template's.
OPERATIONS = {
    "strip": lambda text: [text.strip(), text.lstrip("aA "), text.rstrip(" Bb")],
    "split": lambda text: [*text.split(), *text.split(" "), *text.split("aB", 1), *text.split("b")],
    "rsplit": lambda text: [*text.rsplit(None, 1), *text.rsplit("A", 2), *text.rsplit(" ", 1)],
    "lines": lambda text: [*text.splitlines(), *text.splitlines(True)],
    "partition": lambda text: [*text.partition("B"), *text.rpartition(" "), *text.partition("zz")],
    "fixes": lambda text: [text.removeprefix("a"), text.removesuffix("B"), text.removesuffix("")],
    "replace": lambda text: [text.replace("a", "xY"), text.replace(" ", "", 1)],
    "slices": lambda text: [text[1:], text[::-2], text[:3], text[-1:]],
    "sums": lambda text: [text + "b", "b" + text, text + text, text * 2, 2 * text, text * 0],
    "join": lambda text: [text.join(["a", "bb", text]), text.join([]), text.join(["a"])],
    "percent": lambda text: [(text.replace("a", "%s") % tuple("b" * text.count("a")))],
}


def marked(text: str) -> Marked:
    return Marked(text, [OWN if letter.isupper() else SAID for letter in text])


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_strings_and_keep_the_marks(name: str) -> None:
    draw = random.Random(name)
    for _ in range(200):
        text = "".join(draw.choices("aAbB \n", k=draw.randint(0, 9)))
        plain, found = OPERATIONS[name](text), OPERATIONS[name](marked(text))
        assert found == plain
        for piece in found:
            inserted = [OWN if letter in "AB" else SAID for letter in piece]
            assert list(marks_of(piece)) == inserted, (text, piece)


def test_what_is_not_tracked_counts_as_said() -> None:
    own = Marked.own("<E>é")
    for text in (
        own.center(9),
        own.swapcase(),
        f"{own}.",
        "".join(own),
        json.loads(json.dumps(own)),
    ):
        assert set(marks_of(text)) == {SAID}
    assert set(marks_of(own.upper())) == {OWN}
    assert set(marks_of(Marked.own("ß").upper())) == {SAID}  # SS has other places


def test_marked_text_is_a_string_to_everybody_else() -> None:
    own = Marked.own("abc")
    assert own == "abc" and hash(own) == hash("abc") and {own: 1}["abc"] == 1
    assert json.dumps({"x": own}) == '{"x": "abc"}'
    assert pickle.loads(pickle.dumps("abc")) == copy.deepcopy(own) == "abc"
    assert str(own) is own and marks_of(str(own)) == (OWN,) * 3
    with pytest.raises(TypeError):
        _ = own + 1


def test_control_tokens_are_looked_for_in_the_own_words_only() -> None:
    def split(text: str) -> list[int | str]:
        return [
            7 if part == "E" else part for part in text.replace("E", "\0E\0").split("\0") if part
        ]

    text = joined([Marked.own("aEb"), "E", Marked.own("E"), "xE"])
    assert parts(text, split) == ["a", 7, "bE", 7, "xE"]
    assert parts("E", split) == ["E"]
    assert parts(Marked(), split) == []


def answer(tokenizer: Tokenizer, tokens: list[int], text: str | None = None) -> Marked:
    whole = tokenizer.decode(tokens)
    return as_written(tokenizer, whole if text is None else text, tokens, after=[])


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_parts(parts(text, tokenizer.split_specials))


def test_an_answer_keeps_its_tokens(small: Tokenizer) -> None:
    """Also those that encoding would never choose, control tokens, and half characters."""
    letters = [small.encode(letter)[-1] for letter in "other"]
    control = next(iter(small.specials.values()))
    camel = small.encode("🐪")[-4:]
    tokens = [*letters, control, *camel, *letters]
    text = answer(small, tokens)
    assert text == small.decode(tokens)
    assert ids_of(small, text) == tokens
    assert small.encode(str.__str__(text)) != tokens
    assert ids_of(small, text[: len(text)]) == tokens
    cut = ids_of(small, text[:-2])  # as after a stop string
    assert cut[: len(tokens) - 2] == tokens[:-2]
    assert ids_of(small, answer(small, tokens, text[:-1]))[: len(tokens) - 1] == tokens[:-1]


def test_an_answer_that_a_template_takes_apart_keeps_whole_tokens(trained: Tokenizer) -> None:
    tokens = [*trained.encode(" the"), *trained.encode(" fox")]
    text = answer(trained, tokens).strip()  # the first token loses its space
    assert text == "the fox"
    assert trained.decode(ids_of(trained, text)) == "the fox"
    assert ids_of(trained, text)[-len(trained.encode(" fox")) :] == trained.encode(" fox")


def test_marks_in_answers_of_training_data(small: Tokenizer) -> None:
    name = next(iter(small.specials))
    small.controls["<think>"] = 5  # added, and not called special
    small.__dict__.pop("_special_pattern", None)
    try:
        text = with_marks_of_answers(small, f"<think>{name}")
        assert parts(text, small.split_specials) == [5, name]
    finally:
        del small.controls["<think>"]
        small.__dict__.pop("_special_pattern", None)


Pair = tuple[str, Any]
EXPENSIVE: list[Pair] = [
    ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "steps"),
    ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "characters"),
    ("{{ 'a' * 10000000000 }}", "characters"),
    ("{{ [0] * 10000000000 }}", "characters"),
    (
        "{% set n = namespace(t='ab') %}"
        "{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}"
        "{{ n.t }}",
        "characters",
    ),
    (
        "{% set n = namespace(t='ab') %}"
        "{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}"
        "{{ n.t }}",
        "characters",
    ),
    (
        "{% set n = namespace(t=[1]) %}"
        "{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}"
        "{{ n.t | length }}",
        "characters",
    ),
    (
        "{% set n = namespace(t=9) %}{% for i in range(60) %}{% set n.t = n.t * n.t %}{% endfor %}",
        "bits",
    ),
    ("{{ 9 ** 99999 }}", "bits"),
    ("{{ 9 ** -99999 }}", "bits"),
    ("{{ '%1000000000d' % 1 }}", "width"),
    ("{{ '%*d' % (1000000000, 1) }}", "width"),
    ("{{ '%.1000000000f' | format(1.5) }}", "width"),
    ("{{ '{:1000000000d}'.format(1) }}", "width"),
    ("{{ '{0:{1}}'.format(1, 10**9) }}", "width"),
    ("{{ 'x' | center(1000000000) }}", "given"),
    ("{{ 'x'.center(1000000000) }}", "pads"),
    ("{{ 'x'.ljust(1000000000) }}", "pads"),
    ("{{ 'x'.zfill(1000000000) }}", "pads"),
    ("{{ '\t'.expandtabs(1000000000) }}", "pads"),
    ("{{ ('a' * 9999).replace('a', 'b' * 9999) }}", "characters"),
    ("{{ ('a' * 9999) | replace('a', 'b' * 9999) }}", "characters"),
    ("{{ ('b' * 9999).join('a' * 9999) | length }}", "characters"),
    ("{{ range(9999) | join('b' * 9999) }}", "characters"),
    ("{{ messages | tojson(indent=1000000000) }}", "given"),
    ("{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(90) }}", "."),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "."),
    ("{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}", "longer than|steps"),
    ("{{ range(1000000000) }}", "Range"),
    ("{{ lipsum(n=100000000) }}", "undefined"),
]


@pytest.mark.parametrize(("template", "message"), EXPENSIVE, ids=[t[:40] for t, _ in EXPENSIVE])
def test_an_expensive_template_is_refused_in_time_and_in_one_line(
    trained: Tokenizer, monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    from pellucid.tokenizers import TemplateChat, templates

    monkeypatch.setattr(templates, "MOST_SECONDS", 1.0)
    chat = TemplateChat(trained, template)
    with pytest.raises(ValueError, match=f"chat template says: .*({message}|longer)") as raised:
        chat.encode([{"role": "user", "content": "x"}])
    assert str(raised.value).isprintable() and len(str(raised.value)) < 500


def test_a_long_conversation_is_within_the_budget(trained: Tokenizer) -> None:
    from pellucid.tokenizers import TemplateChat

    template = (
        "{% for m in messages %}{{ '<|endoftext|>' + m.role + ': ' }}"
        "{{ m.content.replace('a', 'bb') }}"
        "{% if 'x' in m.content %}{{ m.content | trim }}{% endif %}{% endfor %}"
    )
    talk = [{"role": "user", "content": "a x " * 500}] * 200
    text = TemplateChat(trained, template).render(talk)
    assert text.count("user: ") == 200
    assert len(text) > 800_000


def test_what_a_template_complains_of_is_one_line(trained: Tokenizer) -> None:
    from pellucid.tokenizers import TemplateChat

    template = "{{ raise_exception('first\n\nsecond \x1b[31m' + messages[0].content * 1000) }}"
    with pytest.raises(ValueError, match="says: first second ..31mx") as raised:
        TemplateChat(trained, template).encode([{"role": "user", "content": "x"}])
    assert str(raised.value).isprintable() and len(str(raised.value)) < 500
