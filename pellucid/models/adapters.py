"""LoRA (Hu et al. 2021): a frozen linear layer plus the product of two thin trainable matrices.

        x ──┬── W ────────────── + ── y        W (out, in) frozen
            └── A ── B ── α/r ───┘             A (r, in), B (out, r) trained; B begins as zeros,
                                               so a new adapter changes nothing

An `Adapter` stands in the place of its `nn.Linear`. The taps are in the modules around it, so a
trace has the names it always had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.devices import check_room

WORDS = {
    "attention": ("layers.*.attn.*",),
    "mlp": ("layers.*.mlp.*",),
    "all": ("layers.*.attn.*", "layers.*.mlp.*"),
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What to adapt, and with how many numbers.

    rank     r, the width of the product
    alpha    the product is scaled by alpha / rank
    dropout  share of the input's elements that the product does not see in training
    targets  globs of module paths such as ``layers.*.attn.q_proj``, or the words "attention",
             "mlp" and "all"
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attention",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank is {self.rank}: expected 1 or more")
        if not self.alpha > 0:
            raise ValueError(f"LoRA alpha is {self.alpha}: expected a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout is {self.dropout}: expected a share, 0 to below 1")
        if not self.targets:
            raise ValueError("LoRA has no targets: give module globs, attention, mlp or all")


class Adapter(nn.Module):
    """A linear layer `base` with a low-rank addition: base(x) + alpha / r · B A x.

    a (r, in) and b (out, r) are in float32 at least, whatever the base is in: steps of training are
    too small for bfloat16. A parameter given as `a` is shared, not copied.
    """

    original: Tensor | None

    def __init__(
        self, base: nn.Linear, a: Tensor, b: Tensor, *, alpha: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if a.shape[1] != base.in_features or b.shape != (base.out_features, a.shape[0]):
            raise ValueError(
                f"adapter of A {tuple(a.shape)} and B {tuple(b.shape)} on a layer of "
                f"{base.in_features} to {base.out_features}: expected (r, {base.in_features}) and "
                f"({base.out_features}, r)"
            )
        self.base = base
        self.a = a if isinstance(a, nn.Parameter) else nn.Parameter(a)
        self.b = b if isinstance(b, nn.Parameter) else nn.Parameter(b)
        self.alpha, self.dropout = alpha, nn.Dropout(dropout)
        self.off = False
        self.register_buffer("original", None, persistent=False)  # the base's weight while merged

    @property
    def rank(self) -> int:
        """r, the width of the product."""
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        """Factor on the product: alpha / r."""
        return self.alpha / self.rank

    @property
    def merged(self) -> bool:
        """Whether the base's weight holds the product already."""
        return self.original is not None

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out)."""
        y = self.base(x)
        if self.off or self.merged:
            return y
        low = F.linear(self.dropout(x).to(self.a.dtype), self.a)  # (…, r)
        return y + (F.linear(low, self.b) * self.scale).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the product into the base's weight, rounded once; the weight before is kept."""
        if self.merged:
            return
        self.original = weight = self.base.weight.detach()
        product = self.b @ self.a * self.scale  # (out, in)
        self.base.weight.data = (weight.to(product.dtype) + product).to(weight.dtype)

    def unmerge(self) -> None:
        """The base's weight as it was, to the bit: it is put back, not computed."""
        if self.original is not None:
            self.base.weight.data, self.original = self.original, None


def inject(model: nn.Module, config: LoraConfig, seed: int = 0) -> dict[str, Adapter]:
    """Freeze `model` and put a new adapter around each linear layer that is a target.

    Returns module path -> adapter. ValueError for a target that no layer matches.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = _targets(model, config)
    numbers = config.rank * sum(each.in_features + each.out_features for each in targets.values())
    device = next(model.parameters()).device  # with each number its gradient and two of AdamW
    check_room(16 * numbers, device, f"training adapters of rank {config.rank:,}", "take less")
    made = {path: _begun(linear, config, generator) for path, linear in targets.items()}
    attach(model, made)
    return made


def _begun(linear: nn.Linear, config: LoraConfig, generator: torch.Generator) -> Adapter:
    """A is uniform within ±1/√in, as in the authors' code and in PEFT; B is zero."""
    weight = linear.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    bound = linear.in_features**-0.5
    a = torch.empty(config.rank, linear.in_features, dtype=dtype)
    a.uniform_(-bound, bound, generator=generator)
    b = torch.zeros(linear.out_features, config.rank, dtype=dtype, device=weight.device)
    return Adapter(linear, a.to(weight.device), b, alpha=config.alpha, dropout=config.dropout)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that can carry an adapter, by path: those inside the blocks.

    The output head is left out: a model multiplies by its weight, which may be the embedding's.
    """
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.startswith("layers.")
    }


def _targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Linear]:
    if adapters(model):
        raise ValueError("the model has adapters already: merge or extract them first")
    there = linears(model)
    chosen: set[str] = set()
    for target in config.targets:
        globs = WORDS.get(target, (target,))
        found = {path for path in there if any(fnmatchcase(path, glob) for glob in globs)}
        if not found:
            leaves = sorted({"layers.*." + path.split(".", 2)[2] for path in there})
            raise ValueError(
                f"LoRA target {target!r} matches no layer: expected attention, mlp, all, or a glob "
                f"of {', '.join(leaves)}"
            )
        chosen |= found
    return {path: linear for path, linear in there.items() if path in chosen}


def attach(model: nn.Module, made: Mapping[str, Adapter]) -> None:
    """Put adapters in the places of their bases; everything but their A and B is frozen."""
    model.requires_grad_(False)
    for path, adapter in made.items():
        _put(model, path, adapter)
        adapter.a.requires_grad_(True)
        adapter.b.requires_grad_(True)
        adapter.train(model.training)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Module path -> adapter, in the order of the forward pass; empty for a model without."""
    return {path: part for path, part in model.named_modules() if isinstance(part, Adapter)}


def extract(model: nn.Module) -> dict[str, Adapter]:
    """Take the adapters out: the model as it was before, its parameters trainable again."""
    found = adapters(model)
    for path, adapter in found.items():
        adapter.unmerge()
        _put(model, path, adapter.base)
    model.requires_grad_(True)
    return found


def merge(model: nn.Module) -> None:
    """Put every product into its base's weight; `unmerge` gives back the same bits as before.

    While merged, the weights before are kept beside them, and the adapters cannot be trained.
    """
    for adapter in adapters(model).values():
        adapter.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, to the bit."""
    for adapter in adapters(model).values():
        adapter.unmerge()


def fold(model: nn.Module) -> None:
    """Merge for good: plain linear layers with the products in their weights, trainable again."""
    for path, adapter in adapters(model).items():
        adapter.merge()
        _put(model, path, adapter.base)
        adapter.original = None
    model.requires_grad_(True)


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Inside, the model has plain linear layers with the products in them, to save or to sample.

    Its parameters have the names of a model without adapters. Afterwards all is as it was.
    """
    found = adapters(model)
    apart = [adapter for adapter in found.values() if not adapter.merged]
    for path, adapter in found.items():
        adapter.merge()
        _put(model, path, adapter.base)
    try:
        yield
    finally:
        for path, adapter in found.items():
            _put(model, path, adapter)
        for adapter in apart:
            adapter.unmerge()


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what it did before it was adapted."""
    before = [(part, part.off, part.merged) for part in adapters(model).values()]
    for adapter, _, _ in before:
        adapter.unmerge()
        adapter.off = True
    try:
        yield
    finally:
        for adapter, off, merged in before:
            adapter.off = off
            if merged:
                adapter.merge()


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
