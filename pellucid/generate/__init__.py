"""Text from a model: sampling, decoding with a KV cache, streaming, conversations."""

from __future__ import annotations

from pellucid.generate.chat import Conversation
from pellucid.generate.draft import check_same_tokens
from pellucid.generate.engine import (
    Generation,
    generate_tokens,
)
from pellucid.generate.fast import decodes_in_c
from pellucid.generate.limits import check_lengths, context_limit, default_length
from pellucid.generate.plain import generate_plain
from pellucid.generate.prefixes import KeptCache
from pellucid.generate.sample import Sampling, row_seed, row_seeds
from pellucid.generate.scores import Scored, TextScores, score_logits
from pellucid.generate.text import (
    Completion,
    TextStream,
    encode_prompt,
    stream_text,
)
from pellucid.generate.together import AT_ONCE, Together, generate_rows, score_texts

__all__ = [
    "AT_ONCE",
    "Completion",
    "Conversation",
    "Generation",
    "KeptCache",
    "Sampling",
    "Scored",
    "TextScores",
    "TextStream",
    "Together",
    "check_lengths",
    "check_same_tokens",
    "context_limit",
    "decodes_in_c",
    "default_length",
    "encode_prompt",
    "generate_plain",
    "generate_rows",
    "generate_tokens",
    "row_seed",
    "row_seeds",
    "score_logits",
    "score_texts",
    "stream_text",
]
