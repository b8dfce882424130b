"""The diagram: everything is in it, once, it fits, and the picture is well-formed."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from tiny import FEATURES

from pellucid import graph
from pellucid.families.shapes import SHAPES, shape
from pellucid.models import Config
from pellucid.models.census import census
from pellucid.show import diagram_svg, diagram_text
from pellucid.show.diagram import structure

MODELS = ["gpt2", "book-gpt", "llama-2-7b", "llama-3-8b", "llama-3.2-1b", "llama-3.1-70b"]


@pytest.mark.parametrize("name", SHAPES)
def test_text_fits_a_hundred_columns(name: str):
    for ascii_only in (False, True):
        lines = diagram_text.plain(structure(shape(name).config), ascii_only=ascii_only).split("\n")
        assert max(map(len, lines)) <= 100
        assert not ascii_only or all(line.isascii() for line in lines)


@pytest.mark.parametrize("name", MODELS)
def test_every_name_of_the_vocabulary_is_in_both_renderings(name: str):
    every_name_is_drawn(shape(name).config)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_name_of_every_feature_is_in_both_renderings(feature: str):
    every_name_is_drawn(FEATURES[feature])


def every_name_is_drawn(config: Config) -> None:
    drawn = structure(config)
    text, picture = diagram_text.plain(drawn), diagram_svg.svg(drawn, "a model")
    assert max(map(len, text.split("\n"))) <= 100
    narrow = "\n".join(
        "".join(piece for piece, _ in row) for row in diagram_text.text(drawn, width=81)
    )
    assert max(map(len, narrow.split("\n"))) <= 80
    words = {*re.findall(r"[\w.]+", text)} & {*re.findall(r"[\w.]+", picture)}
    words &= {*re.findall(r"[\w.]+", narrow)}
    for name in graph.expand(config):
        leaf = graph.leaf(name)
        assert leaf in words, leaf
    for part in drawn.census.block.parts:
        assert f"{part.count:,}" in text and f"{part.count:,}" in narrow, part.path
        assert f"{part.count:,}" in picture, part.path


@pytest.mark.parametrize("name", MODELS)
def test_counts_shapes_and_folding(name: str):
    config = shape(name).config
    counted = census(config)
    for rendering in (
        diagram_text.plain(structure(config, 17)),
        diagram_svg.svg(structure(config, 17), name),
    ):
        assert f"× {config.n_layers}" in rendering
        assert f"{counted.block.each:,}" in rendering
        for part in counted.block.parts:
            assert f"{part.count:,}" in rendering
    assert f"17×{config.width}" in diagram_text.plain(structure(config, 17))


def test_what_a_reader_looks_for():
    llama = diagram_text.plain(structure(shape("llama-3-8b").config))
    for words in ("32 query heads share 8 key/value heads", "RMSNorm", "RoPE", "SwiGLU", "⊕"):
        assert words in llama
    gpt2 = diagram_text.plain(structure(shape("gpt2").config))
    for words in ("LayerNorm", "pos_embed", "GELU", "tied"):
        assert words in gpt2
    assert "RoPE" not in gpt2


@pytest.mark.parametrize("name", MODELS)
def test_svg_is_well_formed_and_stays_inside(name: str):
    root = ElementTree.fromstring(diagram_svg.svg(structure(shape(name).config), "a <b> & c"))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    space = "{http://www.w3.org/2000/svg}"
    assert root.find(f"{space}title").text == "a <b> & c"  # type: ignore[union-attr]
    for text in root.iter(f"{space}text"):
        assert 0 <= float(text.attrib.get("x", 0)) <= width
        assert -height <= float(text.attrib.get("y", 0)) <= height
    assert "http" not in ElementTree.tostring(root, "unicode").replace("http://www.w3.org", "")


def test_too_many_tokens():
    with pytest.raises(ValueError, match="2000 tokens: expected 1 to 1024"):
        structure(shape("gpt2").config, 2000)
