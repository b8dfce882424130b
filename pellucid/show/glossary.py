"""The field's words in a sentence each, for those who read a walk as their first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

GLOSSARY = {
    "token": "A piece of text, from a letter to a word, that the model knows by a number, its id.",
    "vocabulary": "All tokens that a model knows; its logits are one number for each of them.",
    "embedding": "A table with a row of numbers for each token; the rows are learned in training.",
    "residual stream": "The row of numbers that stands for one token on its way through the model. "
    "Each block reads it and adds something to it.",
    "layer": "One block of the model: attention, then an MLP. All layers are built alike.",
    "norm": "Brings a row of numbers to a common size, so that what follows meets no extremes.",
    "RMSNorm": "A norm that divides a row by its root mean square and multiplies it by weights.",
    "LayerNorm": "A norm that first takes a row's mean away, then divides by its spread.",
    "attention": "The part in which tokens read from earlier tokens; everything else in the model "
    "treats each token by itself.",
    "head": "One of several attentions beside each other, each with a share of the width.",
    "query": "What a token looks for: a row of numbers that is multiplied with every key.",
    "key": "What a token offers to be found by; the better it fits a query, the higher the score.",
    "value": "What a token hands over to those that look at it.",
    "score": "Query times key: how well the two fit, before the softmax.",
    "mask": "Takes away what a token may not look at: the tokens after it.",
    "softmax": "Turns numbers into positive shares that add up to 1; larger ones get more.",
    "pattern": "For each token, the shares in which it reads the tokens before it.",
    "RoPE": "Rotary position embedding: queries and keys are turned, pair by pair, by an angle "
    "that grows with their position, so that a score depends on how far apart two tokens are.",
    "MLP": "Two or three matrix products with a bend between them, for each token by itself.",
    "activation": "The bend in an MLP, such as SiLU or GELU; without it all layers were one.",
    "SiLU": "x times a smooth step from 0 to 1: small for negative numbers, x for large ones.",
    "GELU": "Like SiLU, with another smooth step.",
    "gate": "A second product in the MLP whose activation multiplies the first, number by number.",
    "logit": "One number for each token of the vocabulary; the softmax of all is the probability "
    "of each to come next.",
    "weight": "A number that training has found; the same for every prompt.",
    "bias": "Weights that are added after a product, whatever came in.",
    "dtype": "How numbers are stored: float32 has about 7 digits, bfloat16 between 2 and 3.",
}  # fmt: skip
_FORMS = {word.lower(): word for word in GLOSSARY} | {
    "embeddings": "embedding", "tokens": "token", "layers": "layer", "norms": "norm",
    "heads": "head", "queries": "query", "keys": "key", "values": "value", "scores": "score",
    "logits": "logit", "weights": "weight", "normalised": "norm",
}  # fmt: skip
_WORDS = re.compile(
    r"(?<![\w./])(" + "|".join(sorted(_FORMS, key=len, reverse=True)) + r")(?![\w./])", re.I
)


def anchor(word: str) -> str:
    """The id of a word's entry."""
    return f"word-{word.lower().replace(' ', '-')}"


def linked(text: str, used: set[str]) -> str:
    """`text` as HTML in which each of the words not yet `used` leads to its entry, once."""
    return "".join(_pieces(text, used))


def _pieces(text: str, used: set[str]) -> Iterator[str]:
    end = 0
    for found in _WORDS.finditer(text):
        word = _FORMS[found[0].lower()]
        if word in used:
            continue
        used.add(word)
        yield escape(text[end : found.start()])
        end = found.end()
        meaning = escape(GLOSSARY[word])
        yield f'<a class="word" href="#{anchor(word)}" title="{meaning}">{escape(found[0])}</a>'
    yield escape(text[end:])


def entries() -> str:
    """All of it as a list of HTML."""
    rows = "".join(
        f'<div id="{anchor(word)}"><dt>{escape(word)}</dt><dd>{escape(meaning)}</dd></div>'
        for word, meaning in sorted(GLOSSARY.items(), key=lambda entry: entry[0].lower())
    )
    return f'<section class="words" id="words"><h2>Words</h2><dl>{rows}</dl></section>'
