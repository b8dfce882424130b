"""A served model against the weights, told in lines: what B says, how far it is off, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

Json = Mapping[str, Any]
Told = tuple[
    str, str, Literal["good", "bad", "none", ""], tuple[str, ...]
]  # label, text, mark, what belongs to it

MEANING = {
    "identical": "every log-probability is A's, to the bit",
    "within-rounding": "B's log-probabilities are as close to A's as A's own in 16 bits are",
    "diverged": "B's log-probabilities are not those of these weights and this text",
}


def tokens(report: Json) -> Told:
    """How many tokens of how many texts, and whose."""
    served = report["served"]
    texts = "1 text" if served["texts"] == 1 else f"{served['texts']:,} texts"
    said = f"{served['tokens']:,} with a log-probability in {texts}, {served['sampled']:,} sampled"
    found = [row for row in report["static"] if row["stage"] == "tokens"]
    if found:
        return "tokens", f"{found[0]['cause']} ({found[0]['finding']})", "bad", (said,)
    return "tokens", said, "good" if report["encoded"] else "none", ()


def logprobs(report: Json) -> Told:
    """The gap, beside what A's own rounding makes."""
    served = report["served"]
    most = "∞" if served["most"] is None else f"{served['most']:.2g}"
    rms = "∞" if served["rms"] is None else f"{served['rms']:.2g}"
    text = (
        f"gap {rms} nats a token (RMS), {most} at most; A's own, bfloat16 against float32: "
        f"{served['unit']:.2g}"
    )
    return "logprobs", text, "bad" if report["first"] else "good", ()


def first(report: Json) -> Iterator[Told]:
    """Where it begins, with the tokens around."""
    if report["first"] is None:
        for row in report["static"]:
            yield "FIRST", row["name"], "bad", (row["finding"],)
            yield "cause", row["cause"], "bad", ()
            return
        return
    where = report["first"]["where"]
    rows = report["served"]["rows"]
    begun = [row for row in rows if f"token {row['place']}," in where]
    begun = [row for row in begun if not where.startswith("text ")
             or where.startswith(f"text {row['text']},")]  # fmt: skip
    said = tuple(
        f"{row['token_text']!r} ({row['token']}): ln p {_number(row['logprob_b'])} there, "
        f"{_number(row['logprob_a'])} by A, rounding moves it by {row['unit']:.1g}"
        for row in begun[:1]
    )
    yield "FIRST", where, "bad", said
    cause = report["cause"]
    if cause is not None:
        yield "cause", cause["name"], "bad", (cause["evidence"],)
        return
    tried = sorted(
        (row for row in report["served"]["tried"] if row["error"] is not None),
        key=lambda row: row["error"],
    )
    close = tuple(
        f"closest: {row['cause']} ({row['evidence']}), {row['error']:.2g} nats left"
        for row in tried[:1]
    )
    yield "cause", f"nothing known fits; {len(tried)} were tried", "none", close


def effect(report: Json) -> Told:
    """What the gap means where samples of the server train this model."""
    served = report["served"]
    if served["kl"] is None or served["ratios"] is None:
        return "effect", "too few sampled tokens to estimate a divergence", "none", ()
    low, high = served["ratios"]
    text = (
        f"KL(B ‖ A) about {served['kl']:.2g} nats a token; the ratio p_A / p_B of a sampled token "
        f"is {low:.2g} to {high:.2g}"
    )
    return "effect", text, "", ()


def _number(value: float | None) -> str:
    return "−∞" if value is None else f"{value:.3g}"
