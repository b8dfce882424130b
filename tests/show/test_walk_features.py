"""Every step of a model with many features can be shown: chapter, page, terminal, figure, JSON."""

from __future__ import annotations

import html
import io
import json
import re

import pytest
from rich.console import Console
from tiny import FEATURES, random_model

from pellucid.numerics import dialect
from pellucid.show import figures
from pellucid.show.digest import digest
from pellucid.show.walk_page import page
from pellucid.show.walk_terminal import WalkPrinter
from pellucid.walk import Step, walk
from pellucid.walk.chapters import Chapters

STRINGS = ["def", " add", "(", "a", ",", " b", "):"]
TOKENS = [5, 1, 7, 9, 2, 3, 11]
ALIKE = [name for name in FEATURES if name.startswith("like ")]


def walked(feature: str, **more) -> list[Step]:
    config = FEATURES[feature]
    return list(
        walk(
            config, random_model(config).state_dict(), TOKENS, token_strings=STRINGS,
            dialect=dialect("hf", config.rounding), **{"layer": 1, "head": 3, **more},
        )
    )  # fmt: skip


def told(steps: list[Step]) -> dict:
    return {
        "model": "a model",
        "prompt": "".join(STRINGS),
        "tokens": TOKENS,
        "token_strings": STRINGS,
        "next_token": int(steps[-1].value),
        "next_text": "x",
        "top": [{"token": 4, "text": "x", "probability": 0.75}],
    }


@pytest.mark.parametrize("feature", ALIKE)
def test_a_page_tells_every_step(feature: str):
    steps = walked(feature)
    text = re.sub(r"<script.*?</script>", "", page(told(steps), list(map(digest, steps))))
    for step in steps:
        assert f'<article id="{step.address}">' in text
        assert html.escape(step.formula) in text, step.address
        assert html.escape(step.title) in text, step.address
        assert "{" not in step.title + step.formula, step.address


@pytest.mark.parametrize("feature", ALIKE)
def test_a_terminal_tells_every_step(feature: str):
    written = io.StringIO()
    printer = WalkPrinter(Console(file=written, width=100), TOKENS, STRINGS)
    steps = walked(feature)
    for step in steps:
        printer.print_step(step)
    printer.print_result(told(steps))
    text = written.getvalue()
    for step in steps:
        assert f"{step.title}  {step.address}" in text
        assert step.formula in text


@pytest.mark.parametrize("feature", ALIKE)
def test_figures_and_json_of_every_step(feature: str):
    for step in walked(feature):
        json.dumps(step.to_json(), allow_nan=False)
        drawn = figures.figure(step, STRINGS)
        assert drawn is not None or step.picture in (None, "text"), step.address


@pytest.mark.parametrize("feature", FEATURES)
def test_chapters_go_from_the_text_through_the_layers_to_the_token(feature: str):
    chapters = Chapters()
    steps = walked(feature, everything=True)
    begun = [title for title in map(chapters.begins, steps) if title]
    assert begun[0] == "From text to tokens" and begun[-1] == "The next token"
    layers = [int(title.split()[1]) for title in begun if title.startswith("Layer ")]
    assert sorted(layers) == layers and set(layers) == {0, 1, 2}
    for layer in range(3):
        parts = [title for title in begun if title.startswith(f"Layer {layer} · ")]
        assert parts[0].endswith("into attention") or FEATURES[feature].norm_places == "after"
        assert len(set(parts)) == len(parts) and parts[-1] == f"Layer {layer} · the MLP"


def test_what_a_learner_reads_of_new_steps():
    formulas: dict[str, str] = {}
    for feature in ("like gemma2", "like gpt-oss", "like olmo2", "like granite", "like cohere"):
        formulas |= {f"{feature}: {step.address}": step.formula for step in walked(feature, head=0)}
    expected = {
        "like gemma2: embed_scaled": "embed[7,36] × 6 → [7,36]",
        "like gemma2: layers.1.attn_norm": (
            "resid_pre[7,36] / √(mean square + 1e-05) × (1 + attn_norm_weight[36]) → [7,36]"
        ),
        "like gemma2: layers.1.attn.scores[0]": (
            "q_rotated[7,10] · k_rotated[7,10]ᵀ × 0.3 → [7,7]"
        ),
        "like gemma2: layers.1.attn.capped_scores[0]": "5 × tanh(scores[7,7] / 5) → [7,7]",
        "like gemma2: layers.1.mlp.act": "½ × gate[7,56] × (1 + tanh inner[7,56]) → [7,56]",
        "like gemma2: logits[6]": "3 × tanh(raw_logits[97] / 3) → [97]",
        "like gpt-oss: layers.1.attn.q[0]": (
            "attn_norm[7,36] · wq_head[10,36]ᵀ + bq_head[10] → [7,10]"
        ),
        "like gpt-oss: layers.1.attn.masked_scores[0]": (
            "scores[7,7] where mask[7,7], else -∞ → [7,7]"
        ),
        "like gpt-oss: layers.1.attn.scores_and_sink[0]": (
            "masked_scores[7,7], beside them number 0 of sinks[4] → [7,8]"
        ),
        "like olmo2: layers.1.attn.q_normed[0]": (
            "q[7,10] / √(q_mean_square[7,1] + 1e-05) × q_norm_weight_head[10] → [7,10]"
        ),
        "like olmo2: layers.1.attn_out": (
            "attn_product[7,36] / √(mean square + 1e-05) × attn_out_norm_weight[36] → [7,36]"
        ),
        "like olmo2: layers.1.mlp.up": "resid_mid[7,36] · w3[56,36]ᵀ → [7,56]",
        "like granite: layers.1.mlp_out": "mlp_product[7,36] × 0.22 → [7,36]",
        "like granite: logits[6]": "raw_logits[97] × 0.125 → [97]",
        "like cohere: layers.1.attn.scores[0]": "q_normed[7,10] · k_normed[7,10]ᵀ / √10 → [7,7]",
        "like cohere: layers.1.mlp.up": "attn_norm[7,36] · w3[56,36]ᵀ → [7,56]",
        "like cohere: layers.1.resid_post": (
            "resid_pre[7,36] + attn_out[7,36] + mlp_out[7,36] → [7,36]"
        ),
    }
    assert {address: formulas[address] for address in expected} == expected
