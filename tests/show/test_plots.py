"""Figures: what they show, and that they leave the rest of matplotlib alone."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from tiny import CONFIGS, random_model

from pellucid.numerics import dialect
from pellucid.show import figures as plots
from pellucid.walk import walk

STRINGS = ["def", " a", "\n", "🦙", "אב"]


@pytest.fixture(scope="module", params=["gpt2", "llama-gqa"])
def steps(request: pytest.FixtureRequest):
    config = CONFIGS[request.param]
    model = random_model(config)
    return list(
        walk(
            config, dict(model.state_dict()), [5, 1, 7, 9, 2], token_strings=STRINGS,
            dialect=dialect("hf", config.rounding),
        )
    )  # fmt: skip


def test_every_step_draws_or_has_nothing_to_draw(steps, tmp_path: Path):
    before = dict(matplotlib.rcParams)
    drawn = 0
    for step in steps:
        result = plots.figure(step, STRINGS)
        if result is None:
            continue
        figure, axes = result
        assert step.address in axes.get_title(loc="left") + axes.get_title()
        plots.save(figure, tmp_path / f"{drawn}.png")
        assert (tmp_path / f"{drawn}.png").read_bytes().startswith(b"\x89PNG")
        drawn += 1
    assert drawn > 15
    assert dict(matplotlib.rcParams) == before
    assert (
        "matplotlib.pyplot" not in __import__("sys").modules or not matplotlib.pyplot.get_fignums()
    )


def test_attention_hides_the_future_and_labels_both_axes(steps):
    step = next(step for step in steps if step.name == "layers.0.attn.masked_scores")
    figure, axes = plots.figure(step, STRINGS)
    figure.canvas.draw()
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        texts = [label.get_text() for label in labels]
        assert "·a" in texts
        assert "↵" in texts
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("T: query", "S: key")
    mesh = axes.images[0].get_array() if axes.images else axes.collections[0].get_array()
    shown = np.ma.masked_invalid(mesh).reshape(5, 5)
    np.testing.assert_array_equal(np.ma.getmaskarray(shown), np.triu(np.ones((5, 5), bool), 1))


def test_colours_are_symmetric_around_zero():
    values = torch.tensor([[-1.0, 3.0], [0.5, 2.0]])
    _, axes = plots.heatmap(values)
    low, high = axes.images[0].get_clim() if axes.images else axes.collections[0].get_clim()
    assert low == -high


def test_axes_of_the_caller_are_used():
    from matplotlib.figure import Figure

    figure = Figure()
    mine = figure.add_subplot()
    result, axes = plots.heatmap(torch.eye(3), ax=mine)
    assert axes is mine
    assert result is figure
