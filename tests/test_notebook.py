"""What notebooks show of traces and steps: complete without JavaScript, and small."""

from __future__ import annotations

import base64
import io
import re

import torch
from exploring import language_model
from matplotlib.image import imread
from tiny import GPT, LLAMA

from pellucid.notebook import ROWS, picture
from pellucid.show import figures


def test_a_trace_is_a_table_of_its_names():
    seen = language_model(GPT).trace([5, 7, 9])
    html = seen._repr_html_()
    assert html.count("<tr>") == len(seen) + 1 <= ROWS
    assert "layers.1.attn.pattern" in html
    assert f"{float(seen['layers.1.mlp_out'].max()):.4g}" in html
    assert "inf" not in html  # masked cells have no say
    assert not re.search(r"<script|https?:|<link", html)
    seen.update({f"other.{i}": torch.zeros(1) for i in range(100)})
    assert f"and {len(seen) - ROWS} more" in seen._repr_html_()


def test_every_step_of_a_walk_shows_itself():
    lm = language_model(LLAMA)
    pictures = 0
    for step in lm.walk([5, 7, 9]):
        html = step._repr_html_()
        assert len(html) < 60_000
        assert "<script" not in html
        pictures += "<img" in html
    assert pictures > 10


def test_a_whole_walk_shows_itself_and_loses_no_step():
    walked = language_model(LLAMA).walk([5, 7, 9])
    first = next(walked)
    html = walked._repr_html_()
    rest = list(walked)
    assert html.count("<details>") == 1 + len(rest)
    assert first.address in html and rest[-1].address in html and "<script" not in html


def test_a_figure_of_all_heads_is_a_picture_with_its_tokens():
    pattern = language_model(LLAMA).trace([5, 7, 9])["layers.0.attn.pattern"][0]
    drawn = figures.attention(pattern, ["one", "two", "three"])
    assert drawn._repr_png_().startswith(b"\x89PNG")
    labels = [label.get_text() for label in drawn.axes.get_yticklabels()]
    assert labels[:3] == ["one", "two", "three"] and len(labels) % 4 == 3
    assert labels[:3] == [label.get_text() for label in drawn.axes.get_xticklabels()][:3]


def test_a_pixel_is_a_number():
    values = torch.tensor([[1.0, -1.0, 0.0], [0.5, float("-inf"), -0.5]])
    html = picture(values, "<x>")
    data = base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])
    pixels = (imread(io.BytesIO(data), format="png")[..., :3] * 255).round().astype(int).tolist()
    assert pixels[0] == [[173, 74, 23], [28, 82, 143], [247, 245, 239]]
    assert pixels[1][1] == [160, 160, 160]
    assert pixels[1][0] == [210, 160, 131]
    assert "&lt;x&gt;: blue below 0, ochre above, strongest 1" in html
