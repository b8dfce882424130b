"""Adapters on disk in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT names a tensor by the module of the transformers model that it belongs to. Most of those are
one of our linear layers; GPT-2's ``c_attn`` is three, q, k and v, one below the other. Both ways
between them are exact:

    ours -> PEFT   three adapters are one of rank 3r       PEFT -> ours   one adapter is three that
                                                           share its A and split the rows of its B
         B (3C, 3r)        A (3r, C)                            B (3C, r)     A (r, C)
        ┌────┬────┬────┐  ┌────┐                               ┌────┐        ┌────┐
        │ Bq │ 0  │ 0  │  │ Aq │                               │ Bq │   ×    │ A  │
        ├────┼────┼────┤  ├────┤                               ├────┤        └────┘
        │ 0  │ Bk │ 0  │ ×│ Ak │                               │ Bk │
        ├────┼────┼────┤  ├────┤                               ├────┤
        │ 0  │ 0  │ Bv │  │ Av │                               │ Bv │
        └────┴────┴────┘  └────┘                               └────┘

The first is a file of rank 3r whose metadata says so, and is read back as the three it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from pellucid import files
from pellucid.checkpoints.formats.peft_config import CONFIG, read_config, scale, written_config
from pellucid.models import adapters as lora
from pellucid.models.adapters import Adapter
from pellucid.models.finite import check_finite
from pellucid.tokenizers import TemplateChat, Tokenizer

TENSORS = "adapter_model.safetensors"
TEMPLATE = "chat_template.jinja"  # the chat format that an adapter taught a model without one
RANKS = "pellucid.ranks"  # metadata: module -> rank of each of the layers joined in it
_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

Names = Mapping[str, Sequence[str]]


class _Order(Protocol):
    def ours(self, stored: Tensor) -> Tensor: ...

    def theirs(self, parameter: Tensor) -> Tensor: ...


class _Entry(Protocol):
    @property
    def stored(self) -> str: ...

    @property
    def parameters(self) -> Sequence[str]: ...

    @property
    def order(self) -> _Order | None: ...


class Layers(tuple[str, ...]):
    """Our linear layers in one module; `order`: of its rows, where the files keep another one."""

    order: _Order | None = None

    @classmethod
    def of(cls, entry: _Entry) -> Layers:
        """The layers whose weights a stored tensor holds."""
        layers = cls(name.removesuffix(".weight") for name in entry.parameters)
        layers.order = entry.order
        return layers


def module_names(entries: Iterable[_Entry]) -> dict[str, tuple[str, ...]]:
    """transformers' module path -> our linear layers in it, from a checkpoint's name table.

    entries  what ``pellucid.checkpoints.formats.hf.table(config)`` yields
    """
    return {
        entry.stored.removesuffix(".weight"): Layers.of(entry)
        for entry in entries
        if entry.parameters and all(name.endswith("_proj.weight") for name in entry.parameters)
    }


# ── Out ──────────────────────────────────────────────────────────────────────────────────────────


def save_adapter(
    folder: str | Path, model: nn.Module, names: Names, *, base: str | None = None
) -> None:
    """Write the adapters of `model` as a folder that PEFT's ``PeftModel.from_pretrained`` reads.

    names  `module_names` of the model
    base   where the model itself comes from, for the reader's information

    The files are complete or absent. ValueError for a model without adapters.
    """
    from safetensors.torch import save

    there = lora.adapters(model)
    if not there:
        raise ValueError("the model has no adapters to save")
    tensors: dict[str, Tensor] = {}
    joined_ranks: dict[str, list[int]] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, paths in names.items():
        parts = [there.get(path) for path in paths]
        present = [part for part in parts if part is not None]
        if not present:
            continue
        a, b, apart = _joined_factors(module, parts, [_rows(model, path) for path in paths])
        order = _order(paths)
        b = b if order is None else order.theirs(b).contiguous()
        if apart:
            joined_ranks[module] = apart
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b
        ranks[module], alphas[module] = len(a), present[0].scale * len(a)
    dropout = next(iter(there.values())).dropout.p
    config = written_config(names, ranks, alphas, dropout, base)
    metadata = {"format": "pt"} | ({RANKS: json.dumps(joined_ranks)} if joined_ranks else {})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / TENSORS, save(tensors, metadata))
    _write(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def _order(paths: Sequence[str]) -> _Order | None:
    return paths.order if isinstance(paths, Layers) else None


def _rows(model: nn.Module, path: str) -> int:
    layer = model.get_submodule(path)
    linear = layer.base if isinstance(layer, Adapter) else layer
    assert isinstance(linear, nn.Linear), f"{path} is no linear layer"
    return linear.out_features


def _joined_factors(
    module: str, parts: Sequence[Adapter | None], rows: Sequence[int]
) -> tuple[Tensor, Tensor, list[int]]:
    """A (r, in) and B (out, r) of the layers joined in `module`, and their ranks.

    The ranks are empty where A is one and the same for all of them, or there is only one.
    """
    present = [part for part in parts if part is not None]
    scales = {part.scale for part in present}
    if len(scales) > 1:
        raise ValueError(f"the adapters of {module} have different alpha / rank: {sorted(scales)}")
    whole = len(present) == len(parts)
    if whole and all(torch.equal(part.a, present[0].a) for part in present[1:]):
        a, b = present[0].a, torch.cat([part.b for part in present])
        return _plain(a), _plain(b), []
    ranks = [part.rank if part else 0 for part in parts]
    b = torch.zeros(sum(rows), sum(ranks), dtype=present[0].b.dtype)
    top = left = 0
    for part, height, rank in zip(parts, rows, ranks, strict=True):
        if part is not None:
            b[top : top + height, left : left + rank] = part.b.detach()
        top, left = top + height, left + rank
    return _plain(torch.cat([part.a for part in present])), b, ranks


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


# ── In ───────────────────────────────────────────────────────────────────────────────────────────


def apply_adapter(model: nn.Module, folder: str | Path, names: Names) -> dict[str, Adapter]:
    """Put the adapters of a PEFT folder around the linear layers of `model`.

    names  `module_names` of the model

    The model is frozen but for them; ``lora.fold(model)`` merges them for good. Raises OSError
    where there is no adapter and ValueError for one that does not fit the model or computes
    something else than plain LoRA.
    """
    if lora.adapters(model):
        raise ValueError("the model has adapters already: merge or extract them first")
    folder = Path(folder)
    config, where = read_config(folder), str(folder / TENSORS)
    found, metadata = _read_tensors(folder)
    ranks = _joined_ranks(metadata.get(RANKS, "{}"), where)
    made: dict[str, Adapter] = {}
    for module, (a, b) in found.items():
        paths = _paths(module, names, where)
        alpha = scale(config, module, len(a), where) * len(a)
        linears = [_linear(model, path) for path in paths]
        order = _order(paths)
        b = b if order is None or len(b) != linears[0].out_features else order.ours(b)
        try:
            parts = _apart(a, b, linears, ranks.get(module), alpha, config["lora_dropout"])
        except ValueError as error:
            raise ValueError(f"{where}: {module}: {error}") from None
        made |= {path: part for path, part in zip(paths, parts, strict=True) if part is not None}
    lora.attach(model, made)
    return made


def use_template(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Give a tokenizer without a chat format the template beside an adapter, if there is one."""
    template = Path(folder) / TEMPLATE
    if tokenizer.chat is None and template.is_file():
        roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        values = {
            name: tokenizer.token_string(token)
            for name, token in roles.items()
            if token is not None
        }
        text = files.read_text(template)
        tokenizer.chat = TemplateChat(tokenizer, text, values)


def _linear(model: nn.Module, path: str) -> nn.Linear:
    layer = model.get_submodule(path)
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"{path} is quantised and carries no adapter: merge it into the model as it was, and "
            "quantise that"
        )
    return layer


def _apart(
    a: Tensor,
    b: Tensor,
    linears: Sequence[nn.Linear],
    ranks: Sequence[int] | None,
    alpha: float,
    dropout: float,
) -> list[Adapter | None]:
    """The adapters of the layers joined in one module; None where the file has none for a layer."""
    weight = linears[0].weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a, b = (tensor.to(device=weight.device, dtype=dtype) for tensor in (a, b))
    heights = [linear.out_features for linear in linears]
    if len(b) != sum(heights):
        raise ValueError(f"B has {len(b)} rows: expected {sum(heights)}")
    rows = b.split(heights)
    if ranks is None or sum(ranks) != len(a) or not _is_block_diagonal(rows, ranks):
        shared = nn.Parameter(a)
        return [
            Adapter(linear, shared, part.contiguous(), alpha=alpha, dropout=dropout)
            for linear, part in zip(linears, rows, strict=True)
        ]
    made: list[Adapter | None] = []
    left = 0
    for linear, part, rank in zip(linears, rows, ranks, strict=True):
        inside = slice(left, left + rank)
        own = (a[inside].contiguous(), part[:, inside].contiguous())
        share = alpha * rank / len(a)  # the same alpha / rank as the whole
        made.append(Adapter(linear, *own, alpha=share, dropout=dropout) if rank else None)
        left += rank
    return made


def _joined_ranks(text: str, where: str) -> Mapping[str, list[int]]:
    ranks = files.parse_object(text, f"{where}: {RANKS}")
    for module, inside in ranks.items():
        if not isinstance(inside, list) or not all(type(r) is int and r >= 0 for r in inside):
            raise ValueError(f"{where}: {RANKS}: {module}: expected a list of ranks")
    return ranks


def _is_block_diagonal(rows: Sequence[Tensor], ranks: Sequence[int]) -> bool:
    left = 0
    for part, rank in zip(rows, ranks, strict=True):
        if part[:, :left].any() or part[:, left + rank :].any():
            return False
        left += rank
    return True


def _read_tensors(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, str]]:
    """transformers' module path -> (A, B), and the file's metadata."""
    from safetensors import SafetensorError, safe_open

    path = folder / TENSORS
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no adapter weights: expected {TENSORS}")
    halves: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118  not a dict
                match = _KEY.fullmatch(key)
                if match is None:
                    raise ValueError(f"{path}: {key} is no tensor of a plain LoRA adapter")
                halves.setdefault(match[1], {})[match[2]] = file.get_tensor(key)
                check_finite(f"{path}: {key}", halves[match[1]][match[2]])
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    alone = [module for module, both in halves.items() if len(both) < 2]
    if alone or not halves:
        raise ValueError(f"{path}: expected lora_A and lora_B of each module; {alone or 'no'} has")
    return {module: (both["A"], both["B"]) for module, both in halves.items()}, metadata


def _paths(module: str, names: Names, where: str) -> Sequence[str]:
    """Our layers of a module. One saved from a model without its head lacks the first word."""
    for name, paths in names.items():
        if module == name or module == name.partition(".")[2]:
            return paths
    raise ValueError(
        f"{where}: {module} is no layer of this model that can be adapted; does the adapter belong "
        f"to it? Its layers are named like {next(iter(names))}"
    )
