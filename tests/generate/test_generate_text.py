"""Text as it comes: whole characters, stop strings across tokens, the same text as at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import LLAMA, random_model

from pellucid.generate import Sampling, TextStream, encode_prompt, generate_plain, stream_text
from pellucid.generate.text import StopStrings
from pellucid.models import Model
from pellucid.tokenizers import Tokenizer, load
from pellucid.tokenizers.llama3 import from_ranks

GREEDY = Sampling(temperature=0.0)
LETTERS = range(ord("a"), ord("z") + 1)
SHORT_TEXT = st.text("ab", max_size=12)


def byte_tokenizer() -> Tokenizer:
    """256 bytes and Llama 3's 256 special tokens: every byte is a token."""
    return from_ranks({bytes([byte]): byte for byte in range(256)})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> Model:
    """Writes any byte and any special token."""
    return random_model(replace(LLAMA, vocab_size=520, context_length=200))


@pytest.fixture(scope="module")
def spelling_model() -> Model:
    """Writes small letters only."""
    model = random_model(replace(LLAMA, vocab_size=520, context_length=200), seed=1)
    only = torch.full((520,), -1e9, dtype=torch.float64)
    only[list(LETTERS)] = 0
    model.register_forward_hook(lambda _module, _inputs, logits: logits + only)
    return model


def first_complete(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: read on, one character at a time, until the text ends with a stop string."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    pieces=st.lists(SHORT_TEXT, max_size=6),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_do_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    expected, found = first_complete("".join(pieces), stops)
    watch, shown = StopStrings(stops), ""
    for place, piece in enumerate(pieces):
        shown += watch.push(piece)
        so_far = "".join(pieces[: place + 1])
        assert expected.startswith(shown), "nothing of a stop string was let out"
        if watch.found is None:
            # Only what can still become a stop string waits.
            waiting = so_far[len(shown) :]
            assert not waiting or any(stop.startswith(waiting) for stop in stops)
    shown += watch.flush()
    assert (shown, watch.found) == (expected, found)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop string is empty"):
        StopStrings(["", "x"])


def test_stop_strings_across_tokens(spelling_model: Model, tokenizer: Tokenizer) -> None:
    prompt = [tokenizer.encode("once")]
    options = {"sampling": Sampling(temperature=2.0), "max_new_tokens": 60, "seed": 3}
    (whole,) = stream_text(spelling_model, tokenizer, prompt, **options).complete()
    assert len(whole.text) == 60 and whole.finish_reason == "length"
    for begin, length in ((0, 1), (0, 4), (20, 3), (30, 7), (57, 3)):
        stop = whole.text[begin : begin + length]
        stream = stream_text(spelling_model, tokenizer, prompt, stop=[stop, "0"], **options)
        pieces = [piece for (piece,) in stream]
        (completion,) = stream.completions
        assert "".join(pieces) == completion.text == whole.text[: whole.text.find(stop)]
        assert completion.finish_reason == "stop"
        assert len(completion.tokens) == len(completion.text) + length


def test_a_held_back_tail_comes_out_at_the_end(spelling_model: Model, tokenizer: Tokenizer) -> None:
    options = {"sampling": GREEDY, "max_new_tokens": 8}
    prompt = [tokenizer.encode("once")]
    (whole,) = stream_text(spelling_model, tokenizer, prompt, **options).complete()
    never = whole.text[-3:] + "0"
    stream = stream_text(spelling_model, tokenizer, prompt, stop=[never], **options)
    pieces = [piece for (piece,) in stream]
    assert "".join(pieces) == whole.text and pieces[-2] == "" and len(pieces[-1]) >= 3
    assert stream.completions[0].finish_reason == "length"


def test_a_stop_token_is_not_text_and_lets_the_tail_go(
    spelling_model: Model, tokenizer: Tokenizer
) -> None:
    options = {"sampling": GREEDY, "max_new_tokens": 8}
    prompt = [tokenizer.encode("one")]
    (whole,) = stream_text(spelling_model, tokenizer, prompt, **options).complete()
    last = whole.tokens[-1]
    before = whole.tokens.index(last)
    (ended,) = stream_text(
        spelling_model,
        tokenizer,
        prompt,
        stop=[whole.text[: before + 1] + "0"],
        stop_ids=[last],
        **options,
    ).complete()
    assert ended.tokens == whole.tokens[: before + 1]
    assert ended.text == whole.text[:before] and ended.finish_reason == "stop"


def pieces_of(stream: TextStream) -> list[list[str]]:
    return [list(row) for row in zip(*stream, strict=True)]


def test_pieces_hold_whole_characters_and_join_to_the_decoded_text(
    model: Model, tokenizer: Tokenizer
) -> None:
    prompts = [tokenizer.encode(text) for text in ("Hé", "ab", "日本")]
    prompts[0].pop()  # the first half of é
    for new in range(20, 30):  # some end inside a character
        stream = stream_text(
            model,
            tokenizer,
            prompts,
            sampling=Sampling(temperature=1.0),
            max_new_tokens=new,
            stop_ids=(),
            seed=new,
        )
        rows = pieces_of(stream)
        for prompt, pieces, completion in zip(prompts, rows, stream.completions, strict=True):
            assert len(pieces) == len(completion.tokens) == new
            assert "".join(pieces) == completion.text
            whole = tokenizer.decode_bytes([*prompt, *completion.tokens])
            begin = tokenizer.decode_bytes(prompt).decode("utf-8", "ignore")
            assert whole.decode("utf-8", "replace") == begin + completion.text
            assert completion.finish_reason == "length"


def test_the_tokens_are_the_engines(model: Model, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("hello", bos=True)
    (completion,) = stream_text(
        model, tokenizer, [prompt], sampling=GREEDY, max_new_tokens=20, stop_ids=()
    ).complete()
    plain = generate_plain(model, prompt, sampling=GREEDY, max_new_tokens=20)
    assert max(plain) < tokenizer.vocab_size, "else the comparison says nothing"
    assert completion.tokens == plain and completion.prompt == prompt


def test_nothing_to_write(model: Model, tokenizer: Tokenizer) -> None:
    stream = stream_text(model, tokenizer, [[1]], sampling=GREEDY, max_new_tokens=0)
    assert stream.complete()[0].finish_reason == "length"
    assert stream.completions[0].text == "" and stream.completions[0].tokens == []


def test_prompts_begin_as_the_model_expects(tokenizer: Tokenizer) -> None:
    bos = tokenizer.bos_id
    assert encode_prompt(tokenizer, "a") == [bos, ord("a")]
    assert encode_prompt(tokenizer, "a", bos=False) == [ord("a")]
    assert encode_prompt(tokenizer, "<|eot_id|>", specials=True) == [
        bos,
        tokenizer.specials["<|eot_id|>"],
    ]
    assert len(encode_prompt(tokenizer, "<|eot_id|>")) == 1 + len("<|eot_id|>")
    unused = byte_tokenizer()
    unused.adds_bos = False  # GPT-2: there is one, but prompts do without
    assert encode_prompt(unused, "a") == [ord("a")]
    assert encode_prompt(unused, "") == [bos]


@pytest.mark.assets
def test_a_trained_model_tells_its_story(assets: Path) -> None:
    from pellucid import checkpoints

    folder = assets / "stories260K" / "hf"
    tokenizer = load(folder)
    model = checkpoints.load_model(checkpoints.open_checkpoint(str(folder)))
    prompt = encode_prompt(tokenizer, "")
    stream = stream_text(model, tokenizer, [prompt], sampling=GREEDY, max_new_tokens=60)
    pieces = [piece for (piece,) in stream]
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside"
    assert "".join(pieces).startswith(text)
    assert stream.completions[0].tokens == generate_plain(
        model, prompt, sampling=GREEDY, max_new_tokens=60
    )
    stopped = stream_text(
        model, tokenizer, [prompt], sampling=GREEDY, max_new_tokens=60, stop=["girl named Lily"]
    )
    assert stopped.complete()[0].text == "Once upon a time, there was a little "


@pytest.mark.assets
@pytest.mark.peers
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_trained_model_writes_what_transformers_writes(assets: Path, penalty: float) -> None:
    transformers = pytest.importorskip("transformers")
    from pellucid import checkpoints

    folder = assets / "stories260K" / "hf"
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = checkpoints.load_model(checkpoints.open_checkpoint(str(folder)), dtype=torch.float32)
    tokenizer = load(folder)
    prompts = [encode_prompt(tokenizer, text) for text in ("Once upon", "The big red cat", "")]
    stream = stream_text(
        model,
        tokenizer,
        prompts,
        sampling=Sampling(temperature=0.0, repetition_penalty=penalty),
        max_new_tokens=50,
    )
    for prompt, completion in zip(prompts, stream.complete(), strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            repetition_penalty=penalty,
            max_new_tokens=50,
            eos_token_id=sorted(tokenizer.stop_ids),
            pad_token_id=0,
        )[0, len(prompt) :]
        assert completion.tokens == expected.tolist()
