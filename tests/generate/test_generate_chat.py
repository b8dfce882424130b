"""A conversation: what the model is given, what stays after an interruption, and the cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import LLAMA, random_model

from pellucid.generate import Conversation, Sampling
from pellucid.models import Model
from pellucid.tokenizers import Tokenizer
from pellucid.tokenizers.llama3 import from_ranks
from pellucid.trace import trace

SAMPLING = Sampling(temperature=1.0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return from_ranks({bytes([byte]): byte for byte in range(256)})


@pytest.fixture(scope="module")
def model() -> Model:
    """Writes small letters only, so that an answer encodes to the tokens that it was written in."""
    model = random_model(replace(LLAMA, vocab_size=512, context_length=160))
    only = torch.full((512,), -1e9, dtype=torch.float64)
    only[ord("a") : ord("z") + 1] = 0
    model.register_forward_hook(lambda _module, _inputs, logits: logits + only)
    return model


def ask(conversation: Conversation, question: str, **options: object) -> str:
    answer = conversation.answer(
        question, **{"sampling": SAMPLING, "max_new_tokens": 6, "seed": 1, **options}
    )
    return "".join(answer)


def test_turns_build_the_conversation(model: Model, tokenizer: Tokenizer) -> None:
    conversation = Conversation(model, tokenizer, "be brief")
    first, second = ask(conversation, "hi"), ask(conversation, "and?")
    assert first and second and first != second
    assert conversation.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": second},
    ]
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "be brief"}]
    assert ask(conversation, "hi") == first


def test_the_cache_changes_nothing_but_the_work(model: Model, tokenizer: Tokenizer) -> None:
    with_cache = Conversation(model, tokenizer)
    without = Conversation(model, tokenizer, reuse=False)
    for turn, question in enumerate(("hi", "who", "why")):
        given = len(tokenizer.chat.encode([*with_cache.messages, user(question)]))
        with trace(model, "tokens") as seen:
            answer = ask(with_cache, question)
        assert answer == ask(without, question)
        if turn:  # the last letter, <|eot_id|>, two headers of "user"/"assistant" and the question
            new = 2 + len("user") + len("assistant") + 2 * 4 + len(question) + 1
            assert seen["tokens"].shape[1] == new < given
        else:
            assert seen["tokens"].shape[1] == given
    with_cache.system = without.system = "changed"
    assert ask(with_cache, "hi") == ask(without, "hi")


def test_every_turn_draws_other_numbers(tokenizer: Tokenizer) -> None:
    indifferent = random_model(replace(LLAMA, vocab_size=512))
    indifferent.register_forward_hook(lambda _module, _inputs, logits: 0 * logits)
    conversation = Conversation(indifferent, tokenizer)
    assert ask(conversation, "a", slide=True) != ask(conversation, "a", slide=True)


def user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def test_an_answer_that_is_broken_off_stays_as_far_as_it_came(
    model: Model, tokenizer: Tokenizer
) -> None:
    conversation = Conversation(model, tokenizer)
    pieces = conversation.answer("hi", sampling=SAMPLING, seed=1)
    begun = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.turns == [user("hi"), {"role": "assistant", "content": begun}]
    other = Conversation(model, tokenizer)
    other.turns = list(conversation.turns)
    assert ask(conversation, "go on") == ask(other, "go on")


def test_ctrl_c_inside_the_model_keeps_the_conversation_whole(
    model: Model, tokenizer: Tokenizer
) -> None:
    conversation, passes = Conversation(model, tokenizer), []

    def interrupt(*_: object) -> None:
        passes.append(0)
        if len(passes) == 3:
            raise KeyboardInterrupt

    hook = model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        ask(conversation, "hi")
    hook.remove()
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]
    assert len(conversation.turns[1]["content"]) == 2
    other = Conversation(model, tokenizer)
    other.turns = list(conversation.turns)
    assert ask(conversation, "go on") == ask(other, "go on")


def test_a_question_that_does_not_fit_is_not_kept(model: Model, tokenizer: Tokenizer) -> None:
    conversation = Conversation(model, tokenizer)
    first = ask(conversation, "hi")
    with pytest.raises(ValueError, match="context of 160|context is 160"):
        ask(conversation, "x" * 200)
    assert [turn["content"] for turn in conversation.turns] == ["hi", first]
    assert ask(conversation, "x" * 200, slide=True)


def test_a_full_context_forgets_the_oldest_turns(model: Model, tokenizer: Tokenizer) -> None:
    conversation = Conversation(model, tokenizer, "be brief")
    forgotten = []
    for turn in range(8):
        ask(conversation, f"question {turn}", max_new_tokens=10)
        forgotten.append(conversation.forgotten)
    assert forgotten[0] == 0 and sum(forgotten) > 0
    assert conversation.messages[0]["content"] == "be brief"
    assert conversation.turns[-2]["content"] == "question 7"
    assert conversation.turns[0]["role"] == "user"
    # What is left is asked as in a conversation that never had more.
    greedy = {"sampling": Sampling(temperature=0.0), "max_new_tokens": 10}
    last = ask(conversation, "and?", **greedy)
    fresh = Conversation(model, tokenizer, "be brief")
    fresh.turns = conversation.turns[:-2]
    assert ask(fresh, "and?", **greedy) == last
    # Each turn goes on drawing other numbers.
    assert len({ask(conversation, "more?", max_new_tokens=10) for _ in range(4)}) > 1


def test_an_answer_that_the_context_cuts_says_so(model: Model, tokenizer: Tokenizer) -> None:
    conversation = Conversation(model, tokenizer)
    ask(conversation, "hi", max_new_tokens=5)
    assert conversation.cut == ""
    ask(conversation, "hi", max_new_tokens=None)
    assert conversation.cut == "the context of 160 tokens is full"


def test_an_answer_is_as_long_as_the_context_allows(model: Model, tokenizer: Tokenizer) -> None:
    """More tokens than fit after a long question: a cut answer, no error about the numbers."""
    conversation = Conversation(model, tokenizer)
    assert ask(conversation, "x" * 120, max_new_tokens=100)
    assert conversation.cut == "the context of 160 tokens is full"


def test_a_tokenizer_without_a_format_is_refused(model: Model, tokenizer: Tokenizer) -> None:
    plain = from_ranks({bytes([byte]): byte for byte in range(256)})
    plain.chat = None
    with pytest.raises(ValueError, match="no chat format.*pellucid generate"):
        Conversation(model, plain)


def test_the_next_prompt_holds_the_tokens_that_the_model_wrote(tokenizer: Tokenizer) -> None:
    """A control token in an answer stays one, and tokens stay as they were cut."""
    ids = dict(tokenizer.specials)
    written = [ord("a"), ids["<|python_tag|>"], ord("b"), 0xF0, 0x9F, 0x90, 0xAA, ids["<|eot_id|>"]]
    model = random_model(replace(LLAMA, vocab_size=512, context_length=160))
    steps = iter(written)

    def write(_module: object, _inputs: object, logits: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(logits, -1e9)
        chosen[..., next(steps)] = 0
        return chosen

    model.register_forward_hook(write)
    conversation = Conversation(model, tokenizer)
    assert ask(conversation, "hi", max_new_tokens=20) == "a<|python_tag|>b🐪"
    assert tokenizer.chat is not None
    before = tokenizer.chat.encode([user("hi")])
    after = tokenizer.chat.encode([*conversation.messages, user("and?")])
    assert after[: len(before) + len(written)] == before + written
    # the same words from somebody else are text
    copied = [user("hi"), {"role": "assistant", "content": "a<|python_tag|>b🐪"}]
    assert ids["<|python_tag|>"] not in tokenizer.chat.encode(copied)
