"""What ``pellucid convert`` prints: what was written, and what proves or costs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pellucid.checkpoints import Conversion
    from pellucid.evaluate.quantise import Quantisation


def conversion_lines(done: Conversion) -> Iterator[str]:
    """The files of a conversion and the proof that they are the same model, a line each."""
    yield f"{done.source} → {done.destination}"
    longest = max(map(len, done.files))
    for name, size in done.files.items():
        yield f"  {name:<{longest}}  {size:>15,} bytes"
    left_out = ""
    if done.left_out:
        shown = ", ".join(done.left_out[:3]) + (" …" if len(done.left_out) > 3 else "")
        left_out = f"; {len(done.left_out)} that say nothing new left out ({shown})"
    count = done.tensors
    yield f"{'written':<15}{done.bytes:,} bytes in {len(done.files)} files"
    yield f"{'tensors':<15}{count}, {done.dtype}{left_out}"
    yield f"{'converted back':<15}{count} of {count} tensors bit-equal"
    yield f"{'sha-256':<15}{done.digest} (source and destination)"
    yield f"{'logits':<15}equal in every bit on {done.tokens} tokens"
    yield f"{'tokenizer':<15}{', '.join(done.tokenizer) or 'none'}"
    for note in done.notes:
        yield f"{'note':<15}{note}"


def quantisation_lines(done: Quantisation) -> Iterator[str]:
    """The size of a quantised model and what its predictions lost, a line each."""
    ratio = done.bytes_before / done.bytes_after
    yield f"{done.source} → {done.destination}"
    yield f"{'format':<12}{done.format}"
    yield f"{'bytes':<12}{done.bytes_before:,} → {done.bytes_after:,} ({ratio:.2f} times smaller)"
    if done.fitted_to:
        yield f"{'rounding':<12}keeps products with the inputs of {done.fitted_to:,} tokens"
    cost = done.cost
    if cost is None:
        yield f"{'cost':<12}not measured: give --text FILE"
        return
    grown = cost.perplexity_after / cost.perplexity_before - 1
    yield (
        f"{'perplexity':<12}{cost.perplexity_before:.4f} → {cost.perplexity_after:.4f} "
        f"({grown:+.2%}) on {cost.tokens:,} tokens"
    )
    yield f"{'KL':<12}{cost.kl_mean:.2e} nats a token on average, {cost.kl_max:.2e} at most"
    yield f"{'top 1':<12}{cost.top1:.2%} of tokens have the same likeliest next one"
