"""With ``last`` only the last token reaches the head, as a tensor of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, random_model, random_tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_row_does_not_carry_the_strides_of_its_text(name):
    """torch multiplies such a row in bfloat16 with a kernel that is forty times slower."""
    config = replace(CONFIGS[name], tied=False)
    model = random_model(config)
    given = []
    assert model.unembed is not None
    model.unembed.register_forward_pre_hook(lambda head, inputs: given.append(inputs[0]))
    tokens = random_tokens(config, 3, 7)
    every, last = model(tokens), model(tokens, last=True)
    assert given[-1].shape == (3, 1, config.width)
    assert given[-1].stride() == (config.width, config.width, 1)
    torch.testing.assert_close(last, every[:, -1:], rtol=1e-12, atol=1e-12)
