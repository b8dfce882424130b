"""A text written token by token, each with what else could have come."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

from pellucid.explore.predictions import likeliest, text_of, wide
from pellucid.generate import Sampling, generate_tokens
from pellucid.language_model import LanguageModel, Prompt


def generation(
    lm: LanguageModel,
    prompt: Prompt,
    sampling: Sampling,
    *,
    length: int,
    seed: int | None = None,
    alternatives: int = 8,
    fast: bool | None = None,
) -> Generator[dict[str, Any], None, None]:
    """A dict per token: id, text, probability, alternatives, seconds, cached; then done.

    Probabilities are the model's own, before temperature and the like. `cached` is how many places
    the step read from the KV cache. ValueError, at once, for what cannot be generated.
    """
    ids = lm.encode(prompt)
    stop = lm.tokenizer.stop_ids
    steps = generate_tokens(
        lm.model, [ids], sampling=sampling, max_new_tokens=length, stop_ids=stop, seed=seed,
        vocab_size=lm.tokenizer.vocab_size, unused_ids=lm.tokenizer.unused_ids, fast=fast,
    )  # fmt: skip

    def events() -> Generator[dict[str, Any], None, None]:
        reason = "length"
        while True:
            began = time.perf_counter()
            (token,) = next(steps, (None,))
            if token is None:
                break
            reason = "stop" if token in stop else "length"
            logits = steps.logits[0]
            yield {
                "id": token,
                "text": text_of(lm, token),
                "probability": float(wide(logits).softmax(-1)[token]),
                "alternatives": likeliest(lm, logits, alternatives),
                "seconds": time.perf_counter() - began,
                "cached": steps.cached,
            }
        yield {"done": True, "finish_reason": reason}

    return events()
