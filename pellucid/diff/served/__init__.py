"""A served model against the weights: log-probabilities of tokens, another engine's and A's own.

said.py      what an engine says: texts in token ids with ln p
spelling.py  tokens that are given as text, as ids of A's tokenizer
answers.py   OpenAI's answers and what vLLM, SGLang and llama.cpp add to them
ask.py       a server, over HTTP
logs.py      a file of JSON lines
scores.py    A's own ln p, and how far rounding moves each
variants.py, settings.py, places.py
             what may be different there: model, sampling, tokens
judge.py     within rounding, or where it begins and what fits
"""

from __future__ import annotations

from pellucid.diff.served.judge import ServedReport, diff_served, is_served

__all__ = ["ServedReport", "diff_served", "is_served"]
