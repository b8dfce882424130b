"""lm-evaluation-harness drives our models: its three requests, answered.

    model = harness_model(pellucid.load())
    results = lm_eval.simple_evaluate(model=model, tasks=["lambada_openai"])

`Answers` is what the requests come down to and needs nothing of the harness; `harness_model` wraps
it in the harness's own class (``pip install 'pellucid[lm-eval]'``). Special tokens and the begin
token are treated as the harness treats a transformers model, so that both give the same numbers
(Gao et al., "The Language Model Evaluation Harness"). One thing differs: where a tokenizer adds the
begin token, the harness puts a second one before a whole text and scores the first; here it is
context only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

from pellucid.evaluate.scoring import score_rows
from pellucid.evaluate.text import check
from pellucid.evaluate.windows import Window, batch_windows, sliding_windows
from pellucid.generate import score_texts
from pellucid.models import Model, evaluating
from pellucid.tokenizers import Tokenizer

NEW_TOKENS = 256  # where a task does not say
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")


class Writer(Protocol):
    """What is needed of a ``pellucid.LanguageModel``."""

    @property
    def model(self) -> Model: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def name(self) -> str: ...

    @property
    def generate_batch(self) -> Callable[..., list[str]]: ...


class Answers:
    """The harness's requests, answered with a language model.

    context  tokens in view, the model's own if None
    batch    texts that are read or written at a time

    Raises ValueError for a context that is longer than the model's.
    """

    def __init__(self, lm: Writer, *, context: int | None = None, batch: int = 8) -> None:
        self.model, self.tokenizer, self.lm = lm.model, lm.tokenizer, lm
        self.context = context or self.model.config.context_length
        self.batch = batch
        check(self.model, [], self.context)

    @property
    def begin(self) -> int:
        """The token that stands before a text: the begin token, else the one that ends texts."""
        for token in (self.tokenizer.bos_id, self.tokenizer.eos_id):
            if token is not None:
                return token
        raise ValueError("this tokenizer has no token that begins or ends a text")

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Token ids of text in which special tokens may stand by name.

        bos  put the begin token first; None: where this tokenizer's models expect it and the text
             does not begin with it already
        """
        ids = self.tokenizer.encode(text, specials=True)
        if bos is None:
            bos = self.tokenizer.adds_bos and ids[:1] != [self.tokenizer.bos_id]
        return [self.begin, *ids] if bos else ids

    def continuations(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """Of (context, continuation) in token ids: ln p(continuation | context), is it greedy.

        Of a context that is too long for the model's the last tokens are read.
        Raises ValueError for an empty side, or a continuation longer than the model's context.
        """
        texts = []
        for before, after in pairs:
            if not before or not 1 <= len(after) <= self.context:
                raise ValueError(
                    f"{len(before)} tokens of context and {len(after)} of continuation: expected "
                    f"one or more of both, and at most {self.context} of continuation"
                )
            ids = [*before, *after][-self.context - 1 :]
            texts.append((ids, len(ids) - len(after)))
        check(self.model, [ids for ids, _ in texts], self.context)
        return self._scores(texts)

    def whole_texts(self, texts: Sequence[str]) -> list[float]:
        """ln p of each whole text, in windows side by side, the last one with a full context."""
        ids = [[self.begin, *self.encode(text, bos=False)] for text in texts]
        check(self.model, ids, self.context)
        windows = list(sliding_windows([len(text) for text in ids], self.context, self.context))
        rows = [
            (ids[window.text][window.start : window.stop + 1], window.first - window.start + 1)
            for window in windows
        ]
        found = [0.0] * len(texts)
        for window, (score, _) in zip(windows, self._scores(rows), strict=True):
            found[window.text] += score
        return found

    def _scores(self, texts: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Of each (ids, first): ln p of ids[first:], and whether each of them was the likeliest.

        On a GPU, where a pass of one row costs as much as one of several, rows are padded, so that
        the last bits follow the batch.
        """
        with evaluating(self.model):
            if self.batch > 1 and self.model.device.type != "cpu":
                return self._padded_scores(texts)
            found = score_texts(self.model, texts, top=1, at_once=self.batch)
        return [
            (sum(one.logprob for one in scored), all(one.top[0][0] == one.id for one in scored))
            for scored in found
        ]

    def _padded_scores(self, texts: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        ids = [row for row, _ in texts]
        windows = [Window(n, 0, len(row) - 1, first - 1) for n, (row, first) in enumerate(texts)]
        found = [(0.0, True)] * len(texts)
        for rows in batch_windows(ids, windows, self.batch):
            losses, hits = score_rows(self.model, rows)
            scored = zip(rows.places, losses.tolist(), hits.tolist(), strict=True)
            for (number, _), loss, hit in scored:
                total, greedy = found[number]
                found[number] = total - loss, greedy and hit
        return found

    def writing(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What follows each (prompt, options) up to one of the strings ``options["until"]``.

        Greedy unless the options ask for a temperature. A prompt is never cut to make room for
        the answer: the answer gets what the context leaves, and a warning says how often. A prompt
        longer than the context is cut to its begin token and its last tokens.
        Raises ValueError for an option that is not known.
        """
        groups: dict[str, list[int]] = {}
        for number, (_, options) in enumerate(requests):
            groups.setdefault(repr(sorted(options.items())), []).append(number)
        found: dict[int, str] = {}
        for numbers in groups.values():
            chosen = generation_options(requests[numbers[0]][1])
            prompts = {number: self._prompt(requests[number][0]) for number in numbers}
            asked = chosen["max_new_tokens"]
            left = {number: min(asked, self.context - len(prompts[number])) for number in numbers}
            numbers = sorted(numbers, key=lambda number: -len(prompts[number]))
            lengths = [left[number] for number in numbers]
            rows = [prompts[number] for number in numbers]
            options = chosen | {"max_new_tokens": lengths, "at_once": self.batch}
            found |= zip(numbers, self.lm.generate_batch(rows, **options), strict=True)
            if short := [number for number in numbers if left[number] < asked]:
                warnings.warn(
                    f"{len(short):,} of {len(numbers):,} prompts leave less of the context of "
                    f"{self.context:,} tokens than the task's {asked:,} (max_gen_toks): their "
                    f"answers get {min(left[n] for n in short):,} tokens or more",
                    stacklevel=2,
                )
        return [found[number] for number in range(len(requests))]

    def _prompt(self, text: str) -> list[int]:
        """Tokens of a prompt, one less than the context at most: its beginning and its end."""
        ids = self.encode(text) or [self.begin]
        if len(ids) < self.context:
            return ids
        begins = ids[:1] if ids[0] == self.tokenizer.bos_id and self.context > 2 else []
        return [*begins, *ids[len(ids) - max(1, self.context - 1 - len(begins)) :]]

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """A conversation as the model was trained to see it; ValueError without a chat format."""
        if self.tokenizer.chat is None:
            raise ValueError(f"{self.lm.name} has no chat format: leave out the chat template")
        turns = [dict(message) for message in messages]
        return self.tokenizer.decode(self.tokenizer.chat.encode(turns, add_generation_prompt))


def generation_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A task's ``generation_kwargs`` as options of ``LanguageModel.generate_batch``."""
    known = {"until", "do_sample", "temperature", *_LENGTHS, *_SAMPLING}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"generation option {unknown[0]!r}: expected one of {', '.join(known)}")
    until = options.get("until") or []
    lengths = [int(options[name]) for name in _LENGTHS if options.get(name) is not None]
    sampled = options.get("do_sample", True)
    return {
        "max_new_tokens": lengths[0] if lengths else NEW_TOKENS,
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
        "temperature": float(options.get("temperature") or 0.0) if sampled else 0.0,
        **{name: options[name] for name in _SAMPLING if name in options},
    }


def harness_model(lm: Writer, *, context: int | None = None, batch: int = 8) -> Any:
    """`lm` as a model of lm-evaluation-harness, for ``lm_eval.simple_evaluate(model=…)``.

    Raises ValueError where the harness is not installed.
    """
    base: Any = _harness("api.model").TemplateLM
    answers = Answers(lm, context=context, batch=batch)

    class PellucidLM(base):
        """The harness's interface; `answers` does the work."""

        @property
        def eot_token_id(self) -> int:
            return answers.begin if lm.tokenizer.eos_id is None else lm.tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            return answers.begin

        @property
        def tokenizer_name(self) -> str:
            return lm.name

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            return answers.encode(string, bos=add_special_tokens)

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            return answers.continuations([(before, after) for _, before, after in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return answers.whole_texts([request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return answers.writing([request.args for request in requests])

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return answers.chat(chat_history, add_generation_prompt)

    return PellucidLM()


def run_tasks(
    lm: Writer,
    tasks: Sequence[str],
    *,
    context: int | None = None,
    batch: int = 8,
    limit: int | None = None,
    task_path: str | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness, its results.

    limit      the first so many examples of each task
    task_path  a folder of task files beside the harness's own

    Raises ValueError where the harness is not installed.
    """
    manager = _harness("tasks").TaskManager(include_path=task_path)
    results = _harness("evaluator").simple_evaluate(
        model=harness_model(lm, context=context, batch=batch),
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
    )
    assert results is not None, "only ranks other than the first have no results"
    return results


def results_table(results: Mapping[str, Any]) -> str:
    """The harness's own table of its results, in Markdown."""
    return _harness("utils").make_table(results)


def _harness(module: str) -> Any:
    """A module of the harness, which is optional and not on every machine."""
    try:
        return import_module(f"lm_eval.{module}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"this needs lm-evaluation-harness ({error}): pip install 'pellucid[lm-eval]'"
        ) from None
