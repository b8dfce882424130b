"""Arithmetic against float64, and float64 against whole numbers.

The error allowed for a sum of n products is 4 · √n · u · Σ|a·b|, with u the unit roundoff of the
type sums are kept in: the size rounding errors reach when they are as often up as down (Higham and
Mary, 2019, "A new approach to probabilistic rounding error analysis"), with room above it.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.doctor.check import MachineCheck, compared

# Rows, inner size, columns: whole tiles of kernels, what is left over beside them, one row.
SHAPES = ((1, 640, 96), (17, 33, 65), (128, 256, 192), (3, 1000, 50))
_HALF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # unit roundoffs


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same normal numbers every time, rounded to `dtype`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounding(a: Tensor, b: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The error allowed for a @ b: of sums in float32, and of results rounded to `dtype`."""
    sums = 4 * math.sqrt(a.shape[-1]) * _HALF[torch.float32] * (a.double().abs() @ b.double().abs())
    return sums + (2 * _HALF[dtype] * exact.abs() if dtype != torch.float32 else 0)


def whole_numbers() -> MachineCheck:
    """float64 products of whole numbers, which are exact, against Python's own."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-(2**20), 2**20, (9, 40), generator=generator) for _ in "ab")
    rows = [[sum(x * y for x, y in zip(r, c, strict=True)) for c in b.tolist()] for r in a.tolist()]
    computed, exact = a.double() @ b.double().T, torch.tensor(rows, dtype=torch.float64)
    return compared("products, float64", [(computed, exact, torch.zeros(()))])


def products(dtype: torch.dtype, device: str) -> MachineCheck:
    """Products of matrices of `dtype` on a device against float64."""
    pairs = []
    for rows, inner, columns in SHAPES:
        a, b = (
            numbers(rows, inner, seed=2, dtype=dtype),
            numbers(inner, columns, seed=3, dtype=dtype),
        )
        exact = a.double() @ b.double()
        pairs.append((a.to(device) @ b.to(device), exact, rounding(a, b, exact, dtype)))
    return compared(_named("products", dtype, device), pairs)


def attention(dtype: torch.dtype, device: str) -> MachineCheck:
    """PyTorch's attention kernel, causal, with fewer heads of keys, against the formula."""
    q, k, v = (numbers(2, heads, 70, 32, seed=heads, dtype=dtype) for heads in (6, 2, 3))
    v = v[:, :2]
    computed = F.scaled_dot_product_attention(
        q.to(device), k.to(device), v.to(device), is_causal=True, enable_gqa=True
    )
    exact = exact_attention(q.double(), k.double(), v.double())
    # Shares are kept in `dtype` by some kernels: an error of u on each, and u on the result.
    allowed = 16 * _HALF[dtype] * v.double().abs().amax() * torch.ones(())
    return compared(_named("attention", dtype, device), [(computed, exact, allowed)])


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax(q kᵀ / √D) v with a causal mask, written out; k and v (B, Hkv, S, D) are shared."""
    groups = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(groups, dim=1) for each in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    shares = scores.masked_fill(later, -torch.inf).exp()
    return (shares / shares.sum(-1, keepdim=True)) @ v


def gradients(device: str) -> MachineCheck:
    """Gradients of a layer with SiLU and RMSNorm in float32 against float64."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        x = numbers(20, 48, seed=4).to(device, dtype).requires_grad_()
        weight = numbers(64, 48, seed=5).to(device, dtype).requires_grad_()
        hidden = F.rms_norm(F.silu(x @ weight.T), (64,), eps=1e-5)
        (hidden * numbers(20, 64, seed=6).to(device, dtype)).sum().backward()
        assert x.grad is not None and weight.grad is not None, "both were asked for"
        found[dtype] = (x.grad, weight.grad)
    pairs = [
        (narrow, wide.cpu(), 64 * _HALF[torch.float32] * wide.abs().max().cpu())
        for narrow, wide in zip(*found.values(), strict=True)
    ]
    return compared(_named("gradients", torch.float32, device), pairs)


def bfloat16_bits(device: str) -> MachineCheck:
    """Every bfloat16 read and written again, and float32 rounded to the nearest, ties to even.

    The right bits are computed with whole numbers: bfloat16 is the upper half of a float32.
    """
    high = torch.arange(0x10000, dtype=torch.int64)
    halves = high.repeat(4)
    low = torch.tensor([0, 0x7FFF, 0x8000, 0x8001]).repeat_interleave(len(high))
    finite = halves & 0x7F80 != 0x7F80
    halves, low = halves[finite], low[finite]
    rounded = halves + ((low > 0x8000) | ((low == 0x8000) & (halves & 1 == 1)))
    bits = (halves << 16) | low
    narrow = torch.where(bits >= 2**31, bits - 2**32, bits).int().to(device).view(torch.float32)
    written = narrow.bfloat16().cpu().view(torch.int16).int() & 0xFFFF
    wide = torch.where(high >= 2**15, high - 2**16, high).short().to(device).view(torch.bfloat16)
    read = wide.float().cpu().view(torch.int32).long() & 0xFFFFFFFF
    nan = wide.isnan().cpu()  # a NaN may be written in many ways
    wrong = int((written != rounded).sum()) + int((read[~nan] != (high << 16)[~nan]).sum())
    name = "bfloat16, every value" + ("" if device == "cpu" else f", {device}")
    if wrong:
        return MachineCheck(
            name, "wrong", f"{wrong:,} of {len(written) + len(read):,} are other bits"
        )
    return MachineCheck(name, "right", f"{len(written) + len(read):,} conversions, bit for bit")


def threads_agree(threads: int) -> MachineCheck:
    """A large product with one thread and with all: both within rounding of float64."""
    a, b = numbers(96, 512, seed=8), numbers(512, 2048, seed=9)
    exact = a.double() @ b.double()
    before, pairs = torch.get_num_threads(), []
    try:
        for count in {1, threads}:
            torch.set_num_threads(count)
            pairs += [(a @ b, exact, rounding(a, b, exact, torch.float32)) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    return compared(f"products with 1 and {threads} threads", pairs)


def kernels() -> list[MachineCheck]:
    """The C decoder's products in every type it reads, and one whole step, against float64."""
    from pellucid.generate import native

    try:
        made = native.library()
    except native.NotBuilt as problem:
        return [MachineCheck("C kernels", "note", f"not there: {problem}")]
    name = made.pellucid_instructions().decode()
    return [_kernel_products(made, name), _kernel_step(made, name)]


def _kernel_products(made: ctypes.CDLL, name: str) -> MachineCheck:
    from pellucid.generate.native.decoder import multiply
    from pellucid.models.quantised import QuantisedLinear

    pairs = []
    for columns, inner, rows in ((1, 64, 16), (1, 1000, 33), (5, 300, 50), (4, 1000, 33)):
        x = numbers(columns, inner, seed=10)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            layer = nn.Linear(inner, rows, bias=False)
            layer.weight = nn.Parameter(numbers(rows, inner, seed=11, dtype=dtype), False)
            given = x.to(dtype).float()  # a model rounds its activations before a product
            stored: list[tuple[nn.Module, Tensor]] = [(layer, layer.weight)]
            if dtype == torch.float32:
                for bits in (8, 6, 4):
                    quantised = QuantisedLinear(layer, bits=bits, group=32)
                    quantised.quantise_(layer.weight)
                    stored.append((quantised, quantised.weight))
            for module, weight in stored:
                exact = given.double() @ weight.double().T
                allowed = rounding(given, weight.T, exact, torch.float32)
                pairs.append((multiply(made, module, given), exact, allowed))
    return compared(f"C kernels, {name}: products", pairs)


def _kernel_step(made: ctypes.CDLL, name: str) -> MachineCheck:
    """Logits of one decoding step after a prompt, the same model's in float64 beside them."""
    from pellucid.generate.native import NativeDecoder
    from pellucid.models import Cache, ModelConfig, build

    config = ModelConfig(
        vocab_size=101, context_length=64, width=48, n_layers=2, n_heads=4, n_kv_heads=2,
        head_dim=12, hidden_width=80, tied=False,
    )  # fmt: skip
    model = build(config).eval().requires_grad_(False)
    with torch.no_grad():
        for place, weight in enumerate(model.parameters()):
            if weight.dim() > 1:
                weight.copy_(numbers(*weight.shape, seed=20 + place) / math.sqrt(weight.shape[-1]))
    tokens = torch.arange(3, 3 + 7 * 13, 7)[None] % config.vocab_size
    cache = Cache(config.n_layers)
    model(tokens[:, :-1], cache=cache)
    cache.reserve(32)
    decoder = NativeDecoder(made, model, length=32, threads=2)
    try:
        computed = decoder.step([tokens[0, -1:].tolist()], cache)
    finally:
        decoder.close()
    exact = model.double()(tokens)[:, -1]
    allowed = 2**-16 * exact.abs().max()
    return compared(f"C kernels, {name}: a decoding step", [(computed, exact, allowed)])


def timed(check: Callable[[], MachineCheck]) -> MachineCheck:
    """A check with the seconds it took; what raises is wrong, and says what was raised."""
    import time

    begin = time.perf_counter()
    found = check()
    return replace(found, seconds=time.perf_counter() - begin)


def _named(what: str, dtype: torch.dtype, device: str) -> str:
    where = "" if device == "cpu" else f", {device}"
    return f"{what}, {str(dtype).removeprefix('torch.')}{where}"
