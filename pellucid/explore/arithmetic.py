"""How one number of a named tensor comes about, for every row of `graph`: one function a kind.

Operands are the run's own values, exactly as it has them; the sums are taken in float64. A function
reads operands from an `Element`, the number's place, and returns the `Sum` that they make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pellucid import graph, names
from pellucid.models.parts import activation, growth
from pellucid.models.rope import frequencies
from pellucid.numerics import Dialect

if TYPE_CHECKING:
    from pellucid.explore.runs import ExploredRun

Label = Callable[[int], str]
_EXACT = Dialect(name="reference")


@dataclass(kw_only=True)
class Sum:
    """Terms a · b (or what `products` says), what is made of their sum, and Python for both.

    label   i -> the name of term i        then   (what is done next, value after it), in order
    how     what joins the two factors     facts  other numbers worth showing
    """

    formula: str
    exact: float
    a: np.ndarray = field(default_factory=lambda: np.zeros(0))
    b: np.ndarray = field(default_factory=lambda: np.zeros(0))
    products: np.ndarray | None = None
    label: Label = str
    how: str = "a × b"
    then: Sequence[tuple[str, float]] = ()
    facts: Mapping[str, float] = field(default_factory=dict)
    python: str = ""

    @property
    def terms(self) -> np.ndarray:
        """What is added up."""
        return self.a * self.b if self.products is None else self.products


class Element:
    """One element: its tensor, its index by letters, and what it is computed from.

    `inputs` and `weights` fill up with what is read; `lines` with the Python that reads it.
    """

    def __init__(self, run: ExploredRun, name: str, index: Sequence[int]) -> None:
        self.run, self.name, self.loaded, self.config = run, name, run.loaded, run.loaded.config
        self.layer, self.leaf = names.layer_of(name), graph.leaf(name)
        letters = [letter for letter in graph.dims(name) if letter != "B"]
        self.at = dict(zip(letters, index, strict=True))
        self.reads = graph.inputs(self.config, name)
        self.module = graph.module_of(self.config, name)
        self.inputs: list[str] = []
        self.weights: list[str] = []
        self.lines: list[str] = []

    @property
    def t(self) -> int:
        """The token."""
        return self.at["T"]

    @property
    def head(self) -> int:
        """The query head or key/value head."""
        return self.at["H"] if "H" in self.at else self.at["Hkv"]

    @property
    def kv(self) -> int:
        """The key/value head that a query head reads."""
        return self.at["H"] // (self.config.n_heads // self.config.n_kv_heads)

    def read(self, variable: str, address: str) -> np.ndarray:
        """The run's values at an address, flat, in float64."""
        self.inputs.append(address)
        self.lines.append(f'{variable} = seen["{address}"].double().reshape(-1)')
        return as_float64(self.run[address])

    def weight(self, variable: str, name: str, row: int) -> np.ndarray:
        """A row of a matrix or a number of a vector; 0 where the model has none."""
        if name not in self.loaded.weights:
            return np.zeros(1)
        self.weights.append(f"{name}[{row}]")
        self.lines.append(f'{variable} = lm.weights()["{name}"][{row}].double().reshape(-1)')
        return as_float64(self.loaded.weight_row(name, row))

    def full(self, module: str) -> str:
        """A module's name with its layer."""
        return module if self.layer is None else f"layers.{self.layer}.{module}"


def as_float64(tensor: Tensor) -> np.ndarray:
    """A tensor's values, flat."""
    return tensor.detach().double().cpu().reshape(-1).numpy()


def short(name: str) -> str:
    """A tensor's name within its layer."""
    return graph.leaf(name).removeprefix("attn.").removeprefix("mlp.")


# ── Products ──────────────────────────────────────────────────────────────────────────────────────


def with_weight(p: Element) -> Sum:
    """One row of a weight times one row of the input, and a bias."""
    source, t, config = p.reads[0], p.t, p.config
    from_heads = p.module.endswith("o_proj")
    x = p.read("x", f"{source}[:,{t}]" if from_heads else f"{source}[{t}]")
    width = config.head_dim
    heads = p.leaf in ("attn.q", "attn.k", "attn.v")
    out = (
        p.head * width + p.at["D"] if heads else next(p.at[n] for n in ("C", "F", "V") if n in p.at)
    )
    w = p.weight("w", f"{p.module}.weight", out)
    bias = p.weight("bias", f"{p.module}.bias", out)
    whole = math.fsum(x * w)
    then, exact, python = [], whole, "(x * w).sum()"
    if p.weights[-1].startswith(f"{p.module}.bias"):
        exact, python = exact + float(bias[0]), f"{python} + bias[0]"
        then.append((f"+ bias {float(bias[0]):.6g}", exact))
    if heads and config.qkv_clip:
        exact = min(max(exact, -config.qkv_clip), config.qkv_clip)
        python = f"({python}).clamp(-{config.qkv_clip}, {config.qkv_clip})"
        then.append((f"cut to ± {config.qkv_clip:g}", exact))

    def label(i: int) -> str:
        place = f"{i // width},{t},{i % width}" if from_heads else f"{t},{i}"
        return f"{short(source)}[{place}] · weight[{out},{i}]"

    formula = f"Σᵢ {short(source)}[{t},i] · {p.module}.weight[{out},i]"
    formula += " + bias" if then and then[0][0].startswith("+ bias") else ""
    return Sum(formula=formula, exact=exact, a=x, b=w, label=label, then=then, python=python)


def scores(p: Element) -> Sum:
    """A query times a key, scaled."""
    (query, key), t, s = p.reads, p.t, p.at["S"]
    q = p.read("q", f"{query}[{p.head},{t}]")
    k = p.read("k", f"{key}[{p.kv},{s}]")
    factor = p.config.score_scale or 1 / math.sqrt(p.config.head_dim)
    said = f"× {factor:g}" if p.config.score_scale else f"÷ √{p.config.head_dim}"
    exact = math.fsum(q * k) * factor
    names_of = f"{short(query)}[{p.head},{t},i] · {short(key)}[{p.kv},{s},i]"
    return Sum(
        formula=f"(Σᵢ {names_of}) {said}", exact=exact, a=q, b=k, then=[(said, exact)],
        label=lambda i: names_of.replace(",i]", f",{i}]"), python=f"(q * k).sum() * {factor!r}",
    )  # fmt: skip


def mixed(p: Element) -> Sum:
    """Values, each by the share that the pattern gives it."""
    (pattern, values), t, d = p.reads, p.t, p.at["D"]
    shares = p.read("shares", f"{pattern}[{p.head},{t}]")
    v = p.read("v", f"{values}[{p.kv},:,{d}]")
    return Sum(
        formula=f"Σₛ pattern[{p.head},{t},s] · v[{p.kv},s,{d}]", exact=math.fsum(shares * v),
        a=shares, b=v, label=lambda s: f"pattern[{p.head},{t},{s}] · v[{p.kv},{s},{d}]",
        python="(shares * v).sum()",
    )  # fmt: skip


def multiplied(p: Element) -> Sum:
    """Two numbers, multiplied."""
    where = f"[{p.t},{p.at['F']}]"
    a, b = (p.read(v, f"{read}{where}") for v, read in zip("ab", p.reads, strict=True))
    return Sum(
        formula=f"act{where} × up{where}", exact=float(a[0] * b[0]), a=a, b=b,
        label=lambda i: f"act{where} · up{where}", python="a[0] * b[0]",
    )  # fmt: skip


# ── Sums, factors, look-ups ───────────────────────────────────────────────────────────────────────


def added(p: Element) -> Sum:
    """The sum of what is added to the stream; a single one is taken as it is."""
    where = f"[{p.t},{p.at['C']}]"
    parts = [p.read(f"x{i}", f"{read}{where}") for i, read in enumerate(p.reads)]
    values = np.concatenate(parts)
    return Sum(
        formula=" + ".join(f"{short(read)}{where}" for read in p.reads), exact=math.fsum(values),
        a=values, b=np.ones(len(values)), label=lambda i: f"{short(p.reads[i])}{where}",
        how="a", python=" + ".join(f"x{i}[0]" for i in range(len(parts))),
    )  # fmt: skip


def row_of_table(p: Element) -> Sum:
    """A number of the embedding table, or of that of the positions."""
    row, c = (p.run.ids[p.t] if p.leaf == "embed" else p.t), p.at["C"]
    table = f"{p.leaf}.weight"
    value = float(p.weight("row", table, row)[c])
    return Sum(formula=f"{table}[{row},{c}]", exact=value, python=f"row[{c}]")


def scaled(p: Element, factor: float, said: str, *, cap: float = 0.0) -> Sum:
    """A number times a factor, maybe cut softly."""
    source = p.reads[0]
    where = f"[{','.join(map(str, p.at.values()))}]"
    x = p.read("x", f"{source}{where}")
    exact, python = float(x[0]) * factor, f"x[0] * {factor!r}"
    then = []
    if cap:
        exact = math.tanh(exact / cap) * cap
        python = f"torch.tanh({python} / {cap!r}) * {cap!r}"
        then = [(f"{cap:g} · tanh(x / {cap:g})", exact)]
    return Sum(
        formula=f"{short(source)}{where} {said}" + (f", then {then[0][0]}" if cap else ""),
        exact=exact, a=x, b=np.full(1, factor), label=lambda i: f"{short(source)}{where} {said}",
        then=then, python=python,
    )  # fmt: skip


def embed_scaled(p: Element) -> Sum:
    """The embedding times a constant, which is rounded to the run's dtype first."""
    factor = float(torch.tensor(p.config.embed_scale, dtype=p.loaded.lm.dtype))
    return scaled(p, factor, f"× {factor:g}")


def logits(p: Element) -> Sum:
    """A product, or what a factor and a cap make of it."""
    if not graph.has(p.config, "raw_logits"):
        return with_weight(p)
    factor = p.config.logit_scale
    return scaled(p, factor, f"× {factor:g}", cap=p.config.logit_cap)


def query_scaled(p: Element) -> Sum:
    """A query times the factor of its position."""
    where = f"[{p.head},{p.t},{p.at['D']}]"
    q = p.read("q", f"{p.reads[0]}{where}")
    by = p.read("by", f"{p.reads[1]}[{p.t}]")
    return Sum(
        formula=f"{short(p.reads[0])}{where} × query_growth[{p.t}]", exact=float(q[0] * by[0]),
        a=q, b=by, label=lambda i: f"{short(p.reads[0])}{where} · query_growth[{p.t}]",
        python="q[0] * by[0]",
    )  # fmt: skip


def grown(p: Element) -> Sum:
    """The factor of a position."""
    exact = float(growth(p.config, torch.tensor([p.t]), torch.float64)[0])
    original = p.config.rope.original_context if p.config.rope else 1
    grows = p.config.query_growth
    return Sum(
        formula=f"1 + {grows:g} · ln(1 + ⌊{p.t} / {original}⌋)", exact=exact,
        python=f"1 + {grows!r} * torch.tensor(1.0 + {p.t} // {original}).double().log()",
    )  # fmt: skip


# ── Norms ─────────────────────────────────────────────────────────────────────────────────────────


def norm(
    p: Element, where: str, module: str, place: int, factor: float = 1.0, own: int | None = None
) -> Sum:
    """A number of a row, by the size of the row, times a weight (and a factor behind it).

    where   index of the row in what is read; place   of the number in it; own   of its weight,
            where that is another
    """
    config, source = p.config, p.reads[0]
    x = p.read("x", f"{source}{where}")
    count, centred = len(x), config.norm == "layer"
    mean = math.fsum(x) / count if centred else 0.0
    off = x - mean
    square = math.fsum(off * off) / count
    size = math.sqrt(square + config.norm_eps)
    exact = off[place] / size
    what = f"(x − {mean:.6g})" if centred else "x"
    then = [("÷ count: mean of squares", square), (f"√(that + {config.norm_eps:g})", size)]
    then.append((f"{what}[{place}] = {off[place]:.6g}, ÷ that", float(exact)))
    python = f"(x{' - x.mean()' if centred else ''})[{place}] / "
    python += (
        f"(x.{'var(correction=0)' if centred else 'square().mean()'} + {config.norm_eps!r}).sqrt()"
    )
    if config.norm_weight:
        weight = (
            float(p.weight("w", f"{module}.weight", place if own is None else own)[0])
            + config.norm_offset
        )
        exact, python = exact * weight, f"{python} * (w[0] + {int(config.norm_offset)})"
        then.append((f"× weight {weight:.6g}", float(exact)))
    if config.norm == "layer" and config.norm_bias:
        bias = float(p.weight("b", f"{module}.bias", place)[0])
        exact, python = exact + bias, f"{python} + b[0]"
        then.append((f"+ bias {bias:.6g}", float(exact)))
    if factor != 1:
        exact, python = exact * factor, f"({python}) * {factor!r}"
        then.append((f"× {factor:g}", float(exact)))
    return Sum(
        formula=f"{what}[{place}] / √(mean of {what}² + ε) · weight, x = {short(source)}{where}",
        exact=float(exact), a=off, b=off, label=lambda i: f"{what}[{i}]²", then=then,
        facts={"mean": mean, "rms": size, "count": count}, python=python,
    )  # fmt: skip


def stream_norm(p: Element) -> Sum:
    """The norm of a token of the stream."""
    return norm(p, f"[{p.t}]", p.module, p.at["C"])


def heads_norm(p: Element) -> Sum:
    """The norm of a query or key: of its head, or of all heads of the token together."""
    place, among_all = p.at["D"], p.head * p.config.head_dim + p.at["D"]
    if p.config.qk_norm == "whole":
        return norm(p, f"[:,{p.t}]", p.module, among_all)
    own = among_all if p.config.qk_norm == "each" else place
    return norm(p, f"[{p.head},{p.t}]", p.module, place, own=own)


def joined(p: Element) -> Sum:
    """What is added to the stream: a product, or what a norm and a factor make of it."""
    raw = p.leaf.replace("_", ".")
    if not graph.has(p.config, raw, p.layer or 0):
        return with_weight(p)
    factor = p.config.residual_scale
    if p.config.norm_places == "before":
        return scaled(p, factor, f"× {factor:g}")
    return norm(p, f"[{p.t}]", p.module, p.at["C"], factor)


# ── RoPE ──────────────────────────────────────────────────────────────────────────────────────────


def angle_of(run: ExploredRun, which: str, token: int, pair: int) -> tuple[float, float]:
    """Radians per position of a pair of a RoPE ("rope", "second_rope"), and a token's angle."""
    config = run.loaded.config
    rope = getattr(config, which)
    found = frequencies(rope, config.rotary_width(rope), length=len(run.ids), dtype=torch.float64)
    return float(found[pair]), float(found[pair]) * token


def turn(p: Element) -> Sum:
    """The cosine or sine of an angle."""
    which, function = p.leaf.split(".")
    pair, rope = p.at["D/2"], getattr(p.config, which)
    frequency, angle = angle_of(p.run, which, p.t, pair)
    value = math.cos(angle) if function == "cos" else math.sin(angle)
    exact = value * rope.magnitude
    then = [(function, value)]
    if rope.magnitude != 1:
        then.append((f"× {rope.magnitude:g}", exact))
    return Sum(
        formula=f"{function}(position {p.t} × {frequency:.6g})", exact=exact,
        a=np.array([float(p.t)]), b=np.array([frequency]), then=then,
        label=lambda i: f"position · frequency of pair {pair}",
        facts={"angle": angle, "pair": pair},
        python=f"math.{function}({angle!r}) * {rope.magnitude!r}",
    )  # fmt: skip


def rotated(p: Element) -> Sum:
    """One component of a pair after its turn; components beyond the pairs stay as they are."""
    source, cos, sin = p.reads
    head, t, d = p.head, p.t, p.at["D"]
    name = short(source)
    pairs = p.run.shape(cos)[-1]
    if d >= 2 * pairs:
        x = p.read("x", f"{source}[{head},{t},{d}]")
        return Sum(
            formula=f"{name}[{head},{t},{d}], which is not turned", exact=float(x[0]), a=x,
            b=np.ones(1), label=lambda i: f"{name}[{head},{t},{d}]", how="a", python="x[0]",
        )  # fmt: skip
    pair = d % pairs
    x = p.read("x", f"{source}[{head},{t}]")[[pair, pair + pairs]]
    c = float(p.read("c", f"{cos}[{t},{pair}]")[0])
    s = float(p.read("s", f"{sin}[{t},{pair}]")[0])
    first = d < pairs
    b = np.array([c, -s] if first else [s, c])
    one, other = f"{name}[{head},{t},{pair}]", f"{name}[{head},{t},{pair + pairs}]"
    said = (f"{one} · cos", f"{other} · (−sin)") if first else (f"{one} · sin", f"{other} · cos")
    a, z = f"x[{pair}]", f"x[{pair + pairs}]"
    return Sum(
        formula=" + ".join(said), exact=math.fsum(x * b), a=x, b=b, label=lambda i: said[i],
        facts={"angle": math.atan2(s, c), "pair": pair, "cos": c, "sin": s},
        python=f"{a} * c[0] - {z} * s[0]" if first else f"{z} * c[0] + {a} * s[0]",
    )  # fmt: skip


# ── Who looks where ───────────────────────────────────────────────────────────────────────────────


def masked(p: Element) -> Sum:
    """A score, or the lowest number where the token may not look."""
    where = f"[{p.head},{p.t},{p.at['S']}]"
    allowed = bool(p.read("allowed", f"{p.reads[1]}[{p.t},{p.at['S']}]")[0])
    x = p.read("x", f"{p.reads[0]}{where}")
    dialect, dtype = p.loaded.model.dialect, p.run[p.reads[0]].dtype
    low = -math.inf if dialect.mask == "-inf" else torch.finfo(dtype).min
    exact = float(x[0]) if allowed else low
    formula = (
        f"{short(p.reads[0])}{where}"
        if allowed
        else f"{low:.4g}: token {p.t} may not look at {p.at['S']}"
    )
    return Sum(
        formula=formula, exact=exact, a=x if allowed else np.zeros(0),
        b=np.ones(1) if allowed else np.zeros(0), label=lambda i: f"{short(p.reads[0])}{where}",
        how="a", python=f'x[0] if allowed[0] else torch.tensor(float("{low}")).double()',
    )  # fmt: skip


def share(p: Element) -> Sum:
    """The softmax of a row: e to the power of the distance from its largest, by their sum."""
    head, t, s = p.head, p.t, p.at["S"]
    x = p.read("x", f"{p.reads[0]}[{head},{t}]")
    python = "x.softmax(0)"
    if p.config.sinks:
        sink = p.weight("sink", p.full("attn.sinks"), head)
        x, python = np.concatenate((x, sink)), "torch.cat((x, sink)).softmax(0)"
    largest = float(x.max())
    powers = np.exp(x - largest)
    total = math.fsum(powers)
    exact = float(powers[s]) / total
    then = [(f"e^(score[{s}] − largest)", float(powers[s])), ("÷ sum", exact)]
    label = f"e^({short(p.reads[0])}[{head},{t},{{}}] − {largest:.6g})"
    return Sum(
        formula=f"e^({short(p.reads[0])}[{head},{t},{s}] − largest) / Σₛ e^(… − largest)",
        exact=exact, a=x, b=np.full(len(x), largest), products=powers, how="e^(a − b)",
        label=lambda i: label.format(i) if i < p.run.shape(p.name)[-1] else "e^(sink − largest)",
        then=then, facts={"max": largest, "sum": total}, python=f"{python}[{s}]",
    )  # fmt: skip


def may_look(p: Element) -> Sum:
    """True where a token may look: at itself and before, within the window."""
    t, s = p.t, p.at["S"]
    window = p.config.window if p.leaf == "window_mask" else 0
    formula = f"{t} ≥ {s}" + (f" and {s} > {t} − {window}" if window else "")
    python = f"float({t} >= {s}" + (f" and {s} > {t} - {window})" if window else ")")
    allowed = t >= s and (not window or s > t - window)
    return Sum(formula=formula, exact=float(allowed), python=python)


def given(p: Element) -> Sum:
    """Tokens and positions: nothing is computed."""
    value = p.run.ids[p.t] if p.leaf == "tokens" else p.t
    return Sum(formula="given", exact=float(value), python=f"float({value})")


# ── The MLP's function ────────────────────────────────────────────────────────────────────────────


def activated(p: Element) -> Sum:
    """The function of one number."""
    where = f"[{p.t},{p.at['F']}]"
    x = p.read("x", f"{p.reads[0]}{where}")
    form = p.config.activation
    exact = float(activation(form, _EXACT)(torch.from_numpy(x))[0])
    called = {"silu": "silu(x)", "relu2": "relu(x).square()", "gelu": "gelu(x)"}
    text = called.get(form, 'gelu(x, approximate="tanh")')
    return Sum(
        formula=f"{form}({short(p.reads[0])}{where})", exact=exact, a=x, b=np.ones(1),
        label=lambda i: f"{short(p.reads[0])}{where}", how="a", then=[(form, exact)],
        python=f"torch.nn.functional.{text}[0]",
    )  # fmt: skip


KINDS: dict[str, Callable[[Any], Sum]] = {
    **dict.fromkeys(("tokens", "positions"), given),
    **dict.fromkeys(("mask", "window_mask"), may_look),
    **dict.fromkeys(("embed", "pos_embed"), row_of_table),
    **dict.fromkeys(("embed_normed", "attn_norm", "mlp_norm", "final_norm"), stream_norm),
    "embed_scaled": embed_scaled,
    **dict.fromkeys(("rope.cos", "rope.sin", "second_rope.cos", "second_rope.sin"), turn),
    "query_growth": grown,
    **dict.fromkeys(("resid_pre", "resid_mid", "resid_post"), added),
    **dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.out"), with_weight),
    **dict.fromkeys(("attn.q_normed", "attn.k_normed"), heads_norm),
    **dict.fromkeys(("attn.q_rotated", "attn.k_rotated"), rotated),
    "attn.q_scaled": query_scaled,
    "attn.scores": scores,
    "attn.capped_scores": lambda p: scaled(p, 1.0, "", cap=p.config.score_cap),
    "attn.masked_scores": masked,
    "attn.pattern": share,
    "attn.z": mixed,
    **dict.fromkeys(("attn_out", "mlp_out"), joined),
    **dict.fromkeys(("mlp.pre", "mlp.gate", "mlp.up", "mlp.out"), with_weight),
    "mlp.act": activated,
    "mlp.hidden": multiplied,
    "raw_logits": with_weight,
    "logits": logits,
}
