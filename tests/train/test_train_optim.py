"""The schedule against numbers worked out by hand, and which parameters decay."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from pellucid.models import GPTConfig, build
from pellucid.train import Schedule, adamw, parameter_groups
from pellucid.train.optim import set_rate
from pellucid.train.prepare import train_config
from pellucid.train.settings import TrainSettings


def test_warm_up_is_linear_and_the_cosine_ends_at_the_final_rate():
    schedule = Schedule(peak=1.0, final=0.2, warmup=4, steps=9)
    rates = [schedule.rate(step) for step in range(9)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    # From step 4 to step 8 the cosine goes 0, 45, 90, 135, 180 degrees.
    half = math.sqrt(0.5)
    wanted = [0.2 + 0.4 * (1 + half), 0.6, 0.2 + 0.4 * (1 - half), 0.2]
    assert rates[5:] == pytest.approx(wanted, abs=1e-15)


def test_a_held_peak_postpones_the_cosine():
    schedule = Schedule(peak=1.0, final=0.0, warmup=2, hold=3, steps=8)
    wanted = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    assert [schedule.rate(step) for step in range(8)] == pytest.approx(wanted, abs=1e-15)


def test_the_other_ways_down():
    def rates(shape: str, hold: int = 0) -> list[float]:
        schedule = Schedule(peak=1.0, final=0.2, warmup=2, steps=7, hold=hold, shape=shape)
        return [schedule.rate(step) for step in range(7)]

    assert rates("linear") == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates("linear", hold=2) == pytest.approx([0.5, 1, 1, 1, 1, 0.6, 0.2])  # WSD
    assert rates("constant") == [0.5, 1, 1, 1, 1, 1, 1]


def test_steps_beyond_the_last_have_the_final_rate():
    for shape in ("cosine", "linear"):
        schedule = Schedule(peak=1.0, final=0.2, warmup=2, steps=7, shape=shape)
        assert schedule.rate(9) == schedule.rate(60) == pytest.approx(0.2)


def test_no_warm_up_and_a_single_step():
    assert Schedule(peak=1.0, final=0.0, warmup=0, steps=1).rate(0) == 1.0
    for shape in ("cosine", "linear"):
        two = Schedule(peak=1.0, final=0.25, warmup=0, steps=2, shape=shape)
        assert [two.rate(0), two.rate(1)] == [1.0, 0.25]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "0 training steps"),
        ({"warmup": 10}, "10 steps of warmup"),
        ({"warmup": 3, "hold": 7}, "3 steps of warmup and 7 of hold"),
        ({"final": 2.0}, "from 1 down to 2"),
        ({"peak": float("nan")}, "from nan"),
        ({"shape": "cubic"}, "schedule 'cubic': expected one of cosine, linear, constant"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Schedule(**({"peak": 1.0, "final": 0.0, "warmup": 2, "steps": 10} | change))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (20, 5), (80, 20), (320, 80), (1600, 80)])
def test_a_short_training_warms_up_for_a_quarter_of_it(steps: int, warmup: int):
    assert train_config(TrainSettings(), steps).schedule.warmup == warmup
    assert train_config(replace(TrainSettings(), warmup=0), steps).schedule.warmup == 0


def test_matrices_decay_and_biases_and_norms_do_not():
    config = GPTConfig(vocab_size=11, context_length=8, width=8, n_layers=2, n_heads=2)
    model = build(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {
        names[id(parameter)]: group["weight_decay"]
        for group in parameter_groups(model, 0.1)
        for parameter in group["params"]
    }
    assert decay == {
        name: 0.0 if name.endswith("bias") or "norm" in name else 0.1 for name in names.values()
    }


def test_a_step_decays_a_matrix_by_rate_times_decay_and_leaves_a_bias():
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer, weight_decay=0.5)
    set_rate(optimizer, 0.1)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)  # without a gradient only the decay acts
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), weight * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias.detach(), bias)


def test_betas_are_those_of_language_models():
    assert adamw(nn.Linear(2, 2)).defaults["betas"] == (0.9, 0.95)


def test_everything_decays_where_that_is_asked_for():
    groups = parameter_groups(nn.Linear(2, 2), 0.1, decay_all=True)
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(2, 0.1)]
