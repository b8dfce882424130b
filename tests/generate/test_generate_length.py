"""How many tokens are written where nobody says: as many as usual, or as the context holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import GPT, LLAMA

import pellucid
from pellucid.cli import main
from pellucid.generate import default_length


def test_the_default_length():
    llama = replace(LLAMA, context_length=300)
    assert default_length(llama, [[1] * 20]) == 128
    assert default_length(llama, [[1], [1] * 250]) == 50
    assert default_length(llama, [[1] * 299]) == 1
    assert default_length(llama, [[1] * 400]) == 1  # and is refused with the numbers
    assert default_length(llama, [[1] * 400], slide=True) == 128
    assert default_length(GPT, [[1] * 400]) == 128


def test_a_long_prompt_leaves_fewer_tokens_in_python_and_on_the_command_line(tmp_path, capsys):
    lm = pellucid.load("demo")
    context = lm.config.context_length
    prompt = "import os\n"
    while len(lm.encode(prompt)) < context - 6:
        prompt += "x = 1\n"
    room = context - len(lm.encode(prompt))
    assert 0 < room <= 6
    text = lm.generate(prompt, temperature=0.0)
    assert text == lm.generate(prompt, temperature=0.0, max_new_tokens=room)
    assert lm.generate_batch([prompt, "a"], temperature=0.0)[0] == text
    with pytest.raises(ValueError, match="but the context is"):
        lm.generate(prompt, max_new_tokens=128)
    with pytest.raises(ValueError, match="but the context is"):
        lm.generate([5] * context)
    assert main(["generate", prompt, "--temperature", "0"]) == 0
    assert capsys.readouterr().out == f"{text}\n"
    assert main(["generate", prompt, "-n", "128"]) == 2
