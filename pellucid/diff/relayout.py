"""Why two weight tensors differ: the known ways to lay one out, shard it, round it or break it.

Each trial rebuilds B's tensor from A's in one known way and must give it bit for bit; the first
that does names the cause.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from pellucid import names
from pellucid.diff.quantisation import quantised
from pellucid.diff.rounding import PIECE, dtype_name, gives, pieces, precision, rounded
from pellucid.diff.weight_changes import LOOSE, changed

Kind = Literal["fault", "explained"]
Explanation = tuple[str, str, Kind]  # cause, finding, kind
FEW = 4  # changed values that are told one by one
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
HEADED = ("attn.q_proj", "attn.k_proj", "attn.v_proj")


def explain(
    name: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], config: Any = None
) -> Explanation:
    """What was done to A's tensor to give B's: (cause, finding in words, fault or explained)."""
    x, y = mine[name], theirs[name]
    for cause, finding, kind, candidate in _trials(name, x, y, mine, config):
        if candidate.shape == y.shape and gives(candidate, y):
            return cause, finding, kind
        del candidate  # before the next is made
    if x.shape != y.shape:
        return (
            "other shape",
            f"A has shape {tuple(x.shape)}, B {tuple(y.shape)}; no known re-layout fits",
            "fault",
        )
    return _by_values(name, x, y, config)


def _trials(
    name: str, x: Tensor, y: Tensor, mine: Mapping[str, Tensor], config: Any
) -> Iterator[tuple[str, str, Kind, Tensor]]:
    """(cause, finding, kind, what B's tensor would be) for every known way, cheap ones first."""
    yield from rounded(x, y)
    if x.ndim == 2 and y.ndim == 2 and x.shape[1] == y.shape[1] and y.shape[0] > x.shape[0]:
        padded = torch.cat((x.to(y.dtype), y[x.shape[0] :]))
        rows = f"{y.shape[0]} rows against {x.shape[0]}"
        yield "vocabulary padded", f"B's table is padded: {rows}", "explained", padded
    if x.ndim == 2:
        yield "transposed weight", "B's tensor is A's transposed", "fault", x.T
    if x.ndim == 2 and x.shape == y.shape and name in ("embed.weight", "unembed.weight"):
        for said, moved in (
            ("next", torch.cat((y[:1], x[:-1].to(y.dtype)))),
            ("previous", torch.cat((x[1:].to(y.dtype), y[-1:]))),
        ):
            yield (
                "embedding rows shifted",
                f"A's row of each token stands at the {said} one",
                "fault",
                moved,
            )
    yield from _other_tensor(name, x, y, mine)
    if name.removesuffix(".weight").removesuffix(".bias").endswith(HEADED):
        yield from head_layouts(name, x, mine, config)
    if x.dtype != y.dtype or _sum_of_bits(x) == _sum_of_bits(y):
        yield from shard_orders(x)
    if x.ndim == 1:
        yield "norm weight plus one", "B's tensor is A's plus one", "fault", x + 1
        yield "norm weight plus one", "B's tensor is A's minus one", "fault", x - 1
    yield from _from_siblings(name, x, y, mine)


def _sum_of_bits(x: Tensor) -> int:
    """The same for the same values in any order."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
    return sum(int(part.view(kind).sum(dtype=torch.int64)) for _, part, _ in pieces(x, x))


def _other_tensor(
    name: str, x: Tensor, y: Tensor, mine: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, Kind, Tensor]]:
    """Another of A's tensors of this shape: the same parameter of another layer, or a neighbour."""
    layer = names.layer_of(name)
    if layer is None and name != "unembed.weight":
        return
    probe = y.flatten()[:8]
    for other, tensor in mine.items():
        if other == name or tensor.shape != y.shape:
            continue
        if not torch.equal(tensor.flatten()[:8].to(y.dtype), probe):
            continue
        elsewhere = names.layer_of(other)
        if elsewhere is not None and elsewhere != layer:
            cause = "tensor of another layer"
        else:
            cause = "swapped weights"
        yield cause, f"B's tensor is A's {other}", "fault", tensor


def head_layouts(
    name: str, x: Tensor, mine: Mapping[str, Tensor], config: Any
) -> Iterator[tuple[str, str, Kind, Tensor]]:
    """Rows of q, k and v: RoPE pairs side by side or half apart, heads in another order."""
    width = _head_dim(name, x, mine, config)
    if width is None:
        return
    heads = x.shape[0] // width
    rest = x.shape[1:]
    if width % 2 == 0:
        halves = x.reshape(heads, 2, width // 2, *rest)
        pairs = x.reshape(heads, width // 2, 2, *rest)
        finding = "B's rows are {} for RoPE, A's {}"
        interleaved, split = "interleaved", "half-split"
        flat = x.shape
        yield (
            "q/k not permuted",
            finding.format(interleaved, split),
            "fault",
            halves.transpose(1, 2).reshape(flat),
        )
        yield (
            "q/k not permuted",
            finding.format("permuted once too often", split),
            "fault",
            pairs.transpose(1, 2).reshape(flat),
        )
        yield from _other_head_counts(x, halves.transpose(1, 2), heads)
    rows = x.reshape(heads, width, *rest)
    if heads > 1:
        for shift in range(1, heads):
            rolled = rows.roll(shift, 0).reshape(x.shape)
            yield "heads reordered", f"B's heads are A's moved by {shift}", "fault", rolled
        for first in range(heads - 1):
            for second in range(first + 1, heads):
                order = list(range(heads))
                order[first], order[second] = second, first
                finding = f"B's heads {first} and {second} are A's swapped"
                yield "heads reordered", finding, "fault", rows[order].reshape(x.shape)
    yield from _fused_splits(name, x, width, mine)


def _other_head_counts(
    x: Tensor, pairs: Tensor, heads: int
) -> Iterator[tuple[str, str, Kind, Tensor]]:
    """Rows permuted for RoPE with the query heads' count for keys, or any other.

    pairs  x with the rows of each head in the order before that, (heads, D/2, 2, …)
    """
    rows, rest = x.shape[0], x.shape[1:]
    for count in range(1, rows // 2 + 1):
        if rows % (2 * count) or count == heads:
            continue
        wrong = pairs.reshape(count, rows // count // 2, 2, *rest).transpose(1, 2)
        finding = f"B's rows were permuted for RoPE as {count} heads, there are {heads}"
        yield "q/k permuted with the wrong head count", finding, "fault", wrong.reshape(x.shape)


def _from_siblings(
    name: str, x: Tensor, y: Tensor, mine: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, Kind, Tensor]]:
    """Rows that stand in the matrices which others store joined with this one, in any order."""
    stems = next((g for g in _JOINED if name.removesuffix(".weight").endswith(g)), None)
    if stems is None or x.shape != y.shape or x.ndim != 2:
        return
    block = name.removesuffix(".weight").rpartition(".")[0]
    parts = [mine.get(f"{block}.{stem}.weight") for stem in stems]
    if any(part is None for part in parts):
        return
    held = [part.to(y.dtype) for part in parts if part is not None]
    probe = min(8, x.shape[1])
    index = {bytes_of(row): n for n, row in enumerate(torch.cat(held)[:, :probe])}
    order = [index.get(bytes_of(row), -1) for row in y[:, :probe]]
    if min(order) < 0:
        return
    counts = []
    first = 0
    for stem, part in zip(stems, held, strict=True):
        inside = sum(first <= place < first + len(part) for place in order)
        counts.append(f"{inside} of {stem.removesuffix('_proj')}")
        if inside == len(order) and f".{name}".endswith(f".{stem}.weight"):
            return  # its own rows in another order: no split went wrong
        if inside == len(order):
            said = f"B's rows are A's {block}.{stem}.weight's, in another order"
            yield "swapped weights", said, "fault", torch.cat(held)[order]
            return
        first += len(part)
    said = f"B's rows are, by their values, {', '.join(counts)}; the first are rows {order[:6]} …"
    cause = "fused qkv split wrongly" if len(stems) == 3 else "gate and up split wrongly"
    yield cause, said, "fault", torch.cat(held)[order]


def bytes_of(row: Tensor) -> bytes:
    """The bits of a few values, as a key."""
    return row.contiguous().view(torch.uint8).numpy().tobytes()


def _fused_splits(
    name: str, x: Tensor, width: int, mine: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, Kind, Tensor]]:
    """A joined q|k|v cut per head where it is laid out per matrix, or the other way round."""
    stem, kind = name.rsplit("_proj", 1)
    stem, letter = stem[:-1], stem[-1]
    parts = [mine.get(f"{stem}{other}_proj{kind}") for other in "qkv"]
    if any(part is None or part.shape != x.shape for part in parts):
        return
    joined = torch.cat([part for part in parts if part is not None])
    place = "qkv".index(letter)
    per_head = joined.reshape(-1, 3, width, *x.shape[1:])[:, place].reshape(x.shape)
    yield "fused qkv split wrongly", "B cut the joined q|k|v head by head", "fault", per_head
    strided = joined.reshape(-1, 3, *x.shape[1:])[:, place].reshape(x.shape)
    yield "fused qkv split wrongly", "B took every third row of the joined q|k|v", "fault", strided


def _head_dim(name: str, x: Tensor, mine: Mapping[str, Tensor], config: Any) -> int | None:
    if config is not None:
        return config.head_dim
    layer = names.layer_of(name)
    output = mine.get(f"layers.{layer}.attn.o_proj.weight")
    return None if output is None or x.shape[0] % 2 else x.shape[0]


def shard_orders(x: Tensor) -> Iterator[tuple[str, str, Kind, Tensor]]:
    """Parts of a tensor joined along the wrong dimension, or in the wrong order."""
    for count in (2, 4, 8):
        for dim in range(min(x.ndim, 2)):
            if x.shape[dim] % count:
                continue
            parts = x.chunk(count, dim)
            if x.ndim == 2:
                finding = f"{count} shards joined on dimension {1 - dim} instead of {dim}"
                wrong = torch.cat(parts, 1 - dim).view(x.shape)
                yield "shards joined wrongly", finding, "fault", wrong
                del wrong  # of a large table no more copies than have to be
            finding = f"{count} shards joined in reverse order on dimension {dim}"
            yield "shards joined wrongly", finding, "fault", torch.cat(parts[::-1], dim)


def _by_values(name: str, x: Tensor, y: Tensor, config: Any) -> Explanation:
    """Same shape, no re-layout fits: look at the values themselves."""
    if not y.isfinite().all() and x.isfinite().all():
        broken = ~y.isfinite()
        count, large = int(broken.sum()), float(x[broken].abs().max())
        if large > torch.finfo(torch.float16).max:
            finding = f"{count:,} values overflow float16: A's reach {large:.3g}"
            return "float16 overflow", finding, "fault"
        return "not finite", f"{count:,} of B's values are not finite", "fault"
    if not (x.isfinite().all() and y.isfinite().all()):
        return "not finite", "values that are not finite, and others, differ", "fault"
    held, beside = _as_held(x, y)
    places = [torch.tensor(place) for place in _few_changed(held, y)]
    if 0 < len(places) <= FEW:
        cause, finding, kind = _bit_flips(torch.stack(places), held, y)
        return cause, finding + beside, kind
    cause, finding = changed(held, y, precision(y), _head_share(name, config))
    if x.ndim == 2:
        shifted = _shifted_groups(held, y)
        if shifted is not None:
            return shifted
        if not cause.startswith(LOOSE):  # exactly this, whatever levels the values stand on
            return cause, finding + beside, "fault"
        levels = quantised(x, y)
        if levels is not None:
            return levels
        other = quantised(y, x)
        if other is not None and other[2] == "explained":
            return other[0], other[1].replace("B's values are A's", "A's values are B's"), other[2]
    return cause, finding + beside, "fault"


def _as_held(x: Tensor, y: Tensor) -> tuple[Tensor, str]:
    """A's tensor as B could hold it: in B's dtype, or in the coarser type of all of B's values."""
    if x.dtype != y.dtype:
        return x.to(y.dtype), f", beside {dtype_name(x.dtype)} stored as {dtype_name(y.dtype)}"
    for coarse in (torch.bfloat16, torch.float16):
        if x.dtype.itemsize <= 2 or gives(x.to(coarse), x):
            continue
        held = x.to(coarse).to(x.dtype)
        if held.isfinite().all() and int((held != y).sum()) * 4 < int((x != y).sum()):
            return held, f", beside A's values rounded through {dtype_name(coarse)}"
    return x, ""


def _few_changed(x: Tensor, y: Tensor) -> list[list[int]]:
    """Places of the values that differ; after FEW + 1 no more are looked for."""
    found: list[list[int]] = []
    for first, part, held in pieces(x, y):
        for place in (part != held).nonzero()[: FEW + 1].tolist():
            found.append([place[0] + first, *place[1:]])
        if len(found) > FEW:
            break
    return found


def _head_share(name: str, config: Any) -> tuple[int, int] | None:
    """(dimension, length) of one head's part of a projection, where it has one."""
    if config is None or ".attn." not in name:
        return None
    if name.removesuffix(".weight").removesuffix(".bias").endswith(HEADED):
        return 0, config.head_dim
    return (1, config.head_dim) if name.endswith("o_proj.weight") else None


def _bit_flips(changed: Tensor, x: Tensor, y: Tensor) -> Explanation:
    if x.dtype != y.dtype:
        return "other weights", f"{len(changed)} values differ", "fault"
    place = tuple(changed[0].tolist())
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
    flipped = int(x[place].view(integers)) ^ int(y[place].view(integers))
    flipped &= (1 << (8 * x.dtype.itemsize)) - 1
    address = ",".join(map(str, place))
    values = f"[{address}]: A has {float(x[place]):.6g}, B has {float(y[place]):.6g}"
    if len(changed) > 1:
        return "other weights", f"{len(changed)} values differ, the first {values}", "fault"
    if flipped.bit_count() != 1:
        return "one value changed", values, "fault"
    bit = flipped.bit_length() - 1
    mantissa = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}
    kind = "mantissa" if bit < mantissa[x.dtype] else "exponent"
    kind = "sign" if bit == 8 * x.dtype.itemsize - 1 else kind
    return "one bit flipped", f"one {kind} bit (bit {bit}) flipped at {values}", "fault"


def _shifted_groups(x: Tensor, y: Tensor) -> Explanation | None:
    """Equal but for a few groups of neighbours in a row, each moved by one amount."""
    if x.numel() > PIECE:
        differ = (x != y).any(1)
        if float(differ.double().mean()) > 0.25:
            return None
        rows = differ.nonzero()[:, 0]
    else:
        rows = torch.arange(len(x))
    dtype, exact, seen = y.dtype, x[rows].double(), y[rows].double()
    for group in (32, 64, 128, exact.shape[1]):
        whole = exact.shape[1] // group * group
        shift = (seen - exact)[:, :whole].reshape(-1, group)
        moved = shift.abs().amax(1) > 0
        rest = bool((seen - exact)[:, whole:].any())
        if rest or not 0 < float(moved.double().mean()) <= 0.25 or group < 8:
            continue
        middle = shift[moved].mean(1, keepdim=True)
        rounded = torch.finfo(dtype).eps * exact.abs().amax()
        even = (shift[moved] - middle).abs() <= 0.1 * middle.abs() + rounded
        if bool(even.all() and (middle.abs() > 4 * rounded).all()):
            row, column = divmod(int(moved.nonzero()[0]) * group, whole)
            finding = (
                f"{int(moved.sum())} group(s) of {group} moved, each by one amount; the first at "
                f"[{int(rows[row])}, {column}:{column + group}], by {float(middle[0]):.3g}"
            )
            return "quantised group with a wrong zero point", finding, "fault"
    return None
