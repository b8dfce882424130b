"""The arithmetic of the limits: bytes of a decoding step, FLOPs of a prefill, percent of each."""

from __future__ import annotations

from collections.abc import Mapping

from pellucid.models import Config
from pellucid.models.census import census

_LOOKED_UP = ("pos_embed.",)  # one row of these is read per token, not the whole table


def decode_bytes(sizes: Mapping[str, int]) -> int:
    """Bytes of weights that one decoding step reads, from the bytes of each named weight.

    The embedding counts only where it is the head as well, that is where no `unembed` is.
    """
    untied = any(name.startswith("unembed.") for name in sizes)
    looked_up = (*_LOOKED_UP, "embed.") if untied else _LOOKED_UP
    return sum(size for name, size in sizes.items() if not name.startswith(looked_up))


def prefill_flops(config: Config, tokens: int) -> int:
    """Floating-point operations of a causal pass over `tokens` tokens, logits of the last only.

    A multiplication and an addition for every weight of a matrix and every token, and the same for
    q·k and pattern·v: token t looks at t tokens. What lies above the causal diagonal is not
    counted, whether or not an engine computes it.
    """
    counted = census(config).flops(1)
    head = config.vocab_size * config.width
    per_token = 2 * (counted.matmul_parameters - head)
    looks = tokens * (tokens + 1) // 2
    return per_token * tokens + 2 * head + counted.attention_per_token_in_view * looks


def percent_of_bandwidth(steps_per_second: float, bytes_per_step: int, bandwidth: float) -> float:
    """How much of the bandwidth (bytes/s) a decoding loop turns into weights read, in percent."""
    return 100 * steps_per_second * bytes_per_step / bandwidth


def percent_of_peak(passes_per_second: float, flops: int, peak: float) -> float:
    """How much of the matrix product's peak (FLOP/s) a pass reaches, in percent."""
    return 100 * passes_per_second * flops / peak
