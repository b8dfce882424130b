"""Tokens with log-probabilities from a file of JSON lines, in the forms in which they are written.

A line is one text, or several side by side (lists of lists):

    ours     {"tokens": [1, 15, 8], "logprobs": [null, -2.1, -0.3], "prompt_tokens": 1}
    TRL      {"prompt_ids": […], "completion_ids": […], "logprobs": […]}
    verl     {"prompts": […], "responses": […], "response_mask": […], "rollout_log_probs": […]}
    vLLM     a RequestOutput: {"prompt_token_ids", "prompt_logprobs", "outputs": [{"token_ids",
             "logprobs"}]}
    SGLang   {"meta_info": {"input_token_logprobs": [[ln p, id, text], …], "output_…": …}}
    OpenAI   an answer, with the "prompt" or the "messages" of its request beside it, or under
             "request" or "body"; "response" may hold the answer, as in batches
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pellucid.diff.served.answers import read_choice
from pellucid.diff.served.said import Said, as_logprob, well_formed
from pellucid.files import check_ordinary, parse_json
from pellucid.generate import encode_prompt
from pellucid.tokenizers import Tokenizer

MOST_TEXTS = 64  # of a file; spread over it
MOST_LINE = 64 << 20  # characters
# The same thing under the names that programs give it.
_WHOLE = ("tokens", "input_ids", "token_ids")
_PROMPT = ("prompt_token_ids", "prompt_ids", "prompts")
_WRITTEN = ("completion_ids", "response_ids", "responses", "output_ids", "output_token_ids")
_LOGPROBS = (
    "logprobs", "rollout_log_probs", "rollout_logprobs", "sampling_per_token_logps",
    "old_per_token_logps", "old_log_probs", "log_probs", "output_logprobs",
)  # fmt: skip
_MASK = ("response_mask", "completion_mask", "loss_mask")


def read_logs(path: str | Path, tokenizer: Tokenizer | None) -> tuple[list[Said], list[str]]:
    """The texts of a file, at most `MOST_TEXTS` of them, and what is to be said about that.

    ValueError, with the line, for what is no JSON, has no log-probabilities, or other tokens.
    """
    texts: list[Said] = []
    lines = 0
    check_ordinary(Path(path))
    with open(path, encoding="utf-8-sig", errors="strict") as file:
        try:
            for number, line in enumerate(iter(lambda: file.readline(MOST_LINE + 1), ""), 1):
                if len(line) > MOST_LINE:
                    raise ValueError(f"{path}, line {number}: longer than {MOST_LINE >> 20} MiB")
                if line.strip():
                    lines += 1
                    where = f"{path}, line {number}"
                    with well_formed(where):
                        texts += _texts(_object(line, where), tokenizer, where)
        except UnicodeDecodeError:
            raise ValueError(f"{path}: no UTF-8 text: expected JSON lines") from None
    if not texts:
        raise ValueError(f"{path}: no line holds tokens with log-probabilities")
    if len(texts) <= MOST_TEXTS:
        return texts, []
    chosen = [texts[place * len(texts) // MOST_TEXTS] for place in range(MOST_TEXTS)]
    return chosen, [f"{MOST_TEXTS} of the {len(texts):,} texts are compared, spread over the file"]


def _object(line: str, where: str) -> Mapping[str, Any]:
    try:
        read = parse_json(line, where)
    except ValueError:
        raise ValueError(f"{where}: no JSON: expected one object in each line") from None
    if not isinstance(read, Mapping):
        raise ValueError(f"{where}: a {type(read).__name__}: expected one object in each line")
    return read


def _texts(row: Mapping[str, Any], tokenizer: Tokenizer | None, where: str) -> list[Said]:
    """The texts of a line, by the first form that it has."""
    answer = _answer(row)
    if answer is not None:
        return list(_answered(row, answer, tokenizer, where))
    if isinstance(row.get("outputs"), list):
        return list(_vllm(row, tokenizer, where))
    if isinstance(row.get("meta_info"), Mapping):
        return [_sglang(row["meta_info"], where)]
    return list(_rollouts(row, where))


def _answer(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """An answer of OpenAI's API, wherever in the line it stands."""
    for held in (row, row.get("response"), _inside(row, "response", "body")):
        if isinstance(held, Mapping) and isinstance(held.get("choices"), list):
            return held
    return None


def _inside(row: Mapping[str, Any], *names: str) -> Any:
    found: Any = row
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _answered(
    row: Mapping[str, Any], answer: Mapping[str, Any], tokenizer: Tokenizer | None, where: str
) -> Iterator[Said]:
    requests = (row, row.get("request"), row.get("body"))
    asked = next((r for r in requests if isinstance(r, Mapping) and {"prompt", "messages"} & {*r}),
                 None)  # fmt: skip
    if asked is None:
        raise ValueError(
            f"{where}: an answer without its prompt: keep prompt or messages beside it"
        )
    messages = asked.get("messages")
    prompt = _prompt_ids(asked.get("prompt"), messages, tokenizer, where)
    counted = _inside(answer, "usage", "prompt_tokens")
    for choice in answer["choices"]:
        said = read_choice(
            choice,
            prompt,
            tokenizer,
            where=where,
            counted=counted if type(counted) is int else None,
            echo=bool(asked.get("echo")),
            messages=messages,
        )
        if said is None:
            raise ValueError(f"{where}: the answer has no log-probabilities: ask for logprobs")
        yield said


def _prompt_ids(prompt: Any, messages: Any, tokenizer: Tokenizer | None, where: str) -> list[int]:
    if isinstance(prompt, list) and all(type(id) is int for id in prompt):
        return prompt
    if tokenizer is None:
        raise ValueError(f"{where}: the prompt is text, and A has no tokenizer: keep token ids")
    if messages is not None:
        if tokenizer.chat is None:
            raise ValueError(f"{where}: a conversation, and A has no chat format: keep token ids")
        return tokenizer.chat.encode(messages)
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: the prompt is a {type(prompt).__name__}: expected text or ids")
    return encode_prompt(tokenizer, prompt)


def _vllm(row: Mapping[str, Any], tokenizer: Tokenizer | None, where: str) -> Iterator[Said]:
    """vLLM's offline outputs, as their fields."""
    prompt = _first(row, _PROMPT)
    if not isinstance(prompt, list):
        prompt = _prompt_ids(row.get("prompt"), None, tokenizer, where)
    shared = {name: row[name] for name in ("prompt_logprobs", "prompt_token_ids") if name in row}
    for output in row["outputs"]:
        if not isinstance(output, Mapping):
            raise ValueError(f"{where}: an output is a {type(output).__name__}: expected fields")
        said = read_choice({**shared, **output}, prompt, tokenizer, where=where)
        if said is None:
            raise ValueError(f"{where}: an output has no log-probabilities: ask for logprobs")
        yield said


def _sglang(meta: Mapping[str, Any], where: str) -> Said:
    rows = [meta.get(f"{part}_token_logprobs") or [] for part in ("input", "output")]
    flat = [item for part in rows for item in part]
    if not rows[1] or not all(isinstance(x, list) and len(x) >= 2 for x in flat):
        raise ValueError(f"{where}: meta_info has no output_token_logprobs: ask for return_logprob")
    values = [as_logprob(item[0], where) for item in flat]
    ids = _ids([item[1] for item in flat], where)
    return Said(ids=ids, logprobs=values, written=len(rows[0]))


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _rollouts(row: Mapping[str, Any], where: str) -> Iterator[Said]:
    """Our own form and those of trainers: ids and ln p side by side, one text or a batch."""
    values = _first(row, _LOGPROBS)
    whole, written = _first(row, _WHOLE), _first(row, _WRITTEN)
    if not isinstance(values, list) or not isinstance(written or whole, list):
        raise ValueError(
            f"{where}: fields {', '.join(list(row)[:8])}: expected token ids and log-probabilities "
            '("tokens" and "logprobs"; docs/diff-served.md lists the forms)'
        )
    prompt, mask = _first(row, _PROMPT), _first(row, _MASK)
    if values and isinstance(values[0], list):
        for place, some in enumerate(values):
            given = [None if x is None else x[place] for x in (prompt, written, whole, mask)]
            at = f"{where}, row {place}"
            yield _rollout(given[0], given[1], given[2], given[3], some, row, at)
    else:
        yield _rollout(prompt, written, whole, mask, values, row, where)


def _rollout(
    prompt: Any, written: Any, whole: Any, mask: Any, values: list[Any], row: Mapping[str, Any],
    where: str,
) -> Said:  # fmt: skip
    """ln p may be given for the whole text, or for what was sampled."""
    if written is not None:
        before = _ids(prompt or [], where)
        ids, begin = [*before, *_ids(written, where)], len(before)
    else:
        ids = _ids(whole, where)
        begin = row.get("prompt_tokens", len(_ids(prompt or [], where)))
        begin = begin if type(begin) is int and 0 <= begin <= len(ids) else 0
    kept = [as_logprob(value, where) for value in values]
    missing = len(ids) - len(kept)
    if missing not in (0, begin, 1):
        raise ValueError(
            f"{where}: {len(ids)} tokens and {len(kept)} log-probabilities: expected one for each "
            "token, or for each that was sampled"
        )
    kept = [None] * missing + kept
    if mask is not None:
        marks = [None] * (len(ids) - len(mask)) + list(mask)
        if len(marks) != len(ids):
            raise ValueError(f"{where}: a mask of {len(mask)} for {len(ids)} tokens")
        kept = [x if mark or mark is None else None for x, mark in zip(kept, marks, strict=True)]
    return Said(ids=ids, logprobs=kept, written=begin)


def _ids(given: Any, where: str) -> list[int]:
    if not isinstance(given, list) or not all(type(id) is int and id >= 0 for id in given):
        raise ValueError(f"{where}: token ids are {str(given)[:60]}, expected whole numbers")
    return given
