"""The edges: gaps in a vocabulary, settings near 0, begin tokens, arguments of another kind."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import LLAMA, random_model

import pellucid
from pellucid.generate import (
    Sampling,
    encode_prompt,
    generate_tokens,
    stream_text,
)
from pellucid.generate.sample import next_tokens
from pellucid.generate.text import StopStrings
from pellucid.language_model import LanguageModel
from pellucid.tokenizers import Tokenizer
from pellucid.tokenizers.base import Tokenizer as Base
from pellucid.tokenizers.llama3 import from_ranks

TINY = (1e-29, 1e-31, 1e-38, 1e-40, 1e-45, 1e-300)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("temperature", TINY)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_temperature_near_0_takes_the_likeliest(
    temperature: float, scale: float, dtype: torch.dtype
) -> None:
    logits = (torch.randn(64, 50, generator=torch.Generator().manual_seed(1)) * scale).to(dtype)
    logits[:, 49] = -torch.inf  # ruled out
    logits[:, 7] = logits[:, 7].nextafter(torch.tensor(9e30, dtype=dtype)).clamp(max=logits.amax())
    top = logits.double().topk(2).values
    clear = (top[:, 0] > top[:, 1]).tolist()  # equals are all the likeliest
    assert sum(clear) > 30
    chosen = next_tokens(logits, Sampling(temperature=temperature), generators(64))
    expected = logits.double().argmax(-1).tolist()
    for one, other, alone in zip(chosen, expected, clear, strict=True):
        assert one == other or not alone


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e30},
        {"temperature": 1e300},
        {"temperature": 1e300, "top_p": 0.5, "min_p": 0.5},
        {"repetition_penalty": 1e-30},
        {"repetition_penalty": 1e30},
        {"repetition_penalty": 1e30, "temperature": 1e-30},
        {"repetition_penalty": 1e-30, "temperature": 1e-29, "top_p": 1e-9, "min_p": 1.0},
        {"top_k": 10**9, "top_p": 1e-300},
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e10, 1e37])
def test_extreme_settings_choose_a_token_that_is_there(
    settings: dict[str, Any], scale: float
) -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(2)).clamp(-2, 2) * scale
    logits[:, 40:] = -torch.inf
    seen = torch.rand(64, 50, generator=torch.Generator().manual_seed(3)) < 0.5
    chosen = next_tokens(logits, Sampling(**settings), generators(64), seen)
    assert all(0 <= token < 40 for token in chosen)


@pytest.mark.parametrize("penalty", [1e-31, 1e-39, 1e-300, 1e31, 1e300, 0.0, -1.0, math.inf])
def test_a_penalty_that_overflows_is_refused_by_name(penalty: float) -> None:
    with pytest.raises(ValueError, match="repetition_penalty is .*expected above 0, from 1e-30"):
        Sampling(repetition_penalty=penalty)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_refused_whatever_the_settings(wrong: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1] = wrong
    for settings in (Sampling(), Sampling(temperature=0), Sampling(temperature=1e-40)):
        with pytest.raises(ValueError, match="the logits are not numbers"):
            next_tokens(logits, settings, generators(2))


class Gaps(Base):
    """Ids 0 … 9 of which 3, 4 and 8 have no token."""

    def __init__(self) -> None:
        table = [None if id in (3, 4, 8) else bytes([97 + id]) for id in range(10)]
        super().__init__(kind="gaps", table=table, specials={}, bos_id=0, eos_id=None)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1e300}, {"top_k": 3}])
def test_ids_without_a_token_are_never_chosen(settings: dict[str, Any]) -> None:
    tokenizer = Gaps()
    assert tokenizer.unused_ids == {3, 4, 8}
    model = random_model(replace(LLAMA, vocab_size=12, context_length=200))
    likes = torch.zeros(12, dtype=torch.float64)
    likes[[3, 8, 10, 11]] = 50.0  # gaps, and what is padded beyond the tokenizer
    model.register_forward_hook(lambda _module, _inputs, logits: logits + likes)
    sampling = Sampling(repetition_penalty=1.3, **settings)
    options = {"sampling": sampling, "max_new_tokens": 40, "seed": 1}
    stream = stream_text(model, tokenizer, [[0], [1, 2]], **options).complete()
    written = {token for completion in stream for token in completion.tokens}
    assert written <= {0, 1, 2, 5, 6, 7, 9}
    assert all(len(completion.text) == 40 for completion in stream)
    free = generate_tokens(model, [[0]], **options)
    assert {token for (token,) in free} & {3, 8, 10, 11}, "else the test says nothing"


def test_a_traced_generation_chooses_tokens_that_have_a_text() -> None:
    model = random_model(replace(LLAMA, vocab_size=12))
    model.register_forward_hook(
        lambda _module, _inputs, logits: logits + 50.0 * torch.eye(12, dtype=logits.dtype)[11]
    )
    seen = LanguageModel(model, Gaps()).trace([0], only="logits", generate=3)
    assert all(token not in (3, 4, 8, 10, 11) for token in seen.meta["tokens"])


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    return from_ranks({bytes([byte]): byte for byte in range(256)})


def test_a_prompt_that_spells_the_begin_token_gets_no_second_one(llama3: Tokenizer) -> None:
    bos, name = llama3.bos_id, "<|begin_of_text|>"
    for text in ("hi", f"{name}hi"):
        for given in (None, True):
            ids = encode_prompt(llama3, text, specials=True, bos=given)
            assert ids == [bos, *llama3.encode("hi")]
    assert encode_prompt(llama3, f"{name}hi", specials=True, bos=False).count(bos) == 1
    assert encode_prompt(llama3, "hi", specials=True, bos=False).count(bos) == 0
    # without specials the name is text, and the begin token still stands before it
    assert encode_prompt(llama3, f"{name}hi") == [bos, *llama3.encode(f"{name}hi")]
    assert encode_prompt(llama3, f"{name}{name}", specials=True) == [bos, bos]  # as spelt
    assert encode_prompt(llama3, f"hi{name}", specials=True).count(bos) == 2


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return pellucid.load("demo", dtype="float32")


def test_a_stop_may_be_one_string_or_none(lm: LanguageModel) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 24}
    whole = lm.generate("import os", **options)
    stop = whole[5:8]
    cut = whole[: whole.index(stop)]
    for given in (stop, [stop], (stop,), {stop}, iter([stop])):
        assert lm.generate("import os", stop=given, **options) == cut
    assert lm.generate_batch(["import os"], stop=stop, **options) == [cut]
    for nothing in (None, [], ()):
        assert lm.generate("import os", stop=nothing, **options) == whole
    for empty in ("", [""], ["x", ""]):
        with pytest.raises(ValueError, match="a stop string is empty"):
            lm.generate("import os", stop=empty, **options)
    for wrong in ([5], [None], [b"x"]):
        with pytest.raises(ValueError, match="the stop string .* is no text"):
            lm.generate("import os", stop=wrong, **options)


def test_a_stop_of_two_letters_is_not_two_stops() -> None:
    watch = StopStrings("ab")
    assert watch.push("xbya") == "xby"
    assert watch.push("bz") == ""
    assert watch.found == "ab"


@pytest.mark.parametrize("prompts", ["import os", "", [1, 2, 3], (1,)])
def test_one_prompt_for_a_list_of_prompts_is_an_error(lm: LanguageModel, prompts: Any) -> None:
    with pytest.raises(ValueError, match="takes a list of prompts, got one: .*put it into a list"):
        lm.generate_batch(prompts, max_new_tokens=2)


@pytest.mark.parametrize("length", [2.5, 2.0, "3", [1]])
def test_a_length_is_a_whole_number(lm: LanguageModel, length: Any) -> None:
    with pytest.raises(ValueError, match="max_new_tokens is .*: expected a whole number"):
        lm.generate("import os", max_new_tokens=length)


@pytest.mark.parametrize(
    "given",
    [{"stop": 5}, {"temperature": "1"}, {"temperature": None}, {"top_k": 2.5}, {"top_p": "x"}],
)
def test_an_argument_of_another_kind_is_named_in_one_line(given):
    (name,) = given
    with pytest.raises(ValueError, match=f"{name} is .*expected") as caught:
        pellucid.load("demo").generate("import os", max_new_tokens=1, **given)
    assert "\n" not in str(caught.value)
    assert Sampling(temperature=torch.tensor(0.5).numpy()[()]).temperature == 0.5


@pytest.mark.parametrize("prompt", [None, b"ab", ["a", "b"], 5])
def test_what_is_no_prompt_is_refused_as_one(prompt):
    with pytest.raises(ValueError, match="is no prompt: expected text, or ids"):
        pellucid.load("demo").generate(prompt, max_new_tokens=1)
