"""Write Meta's layout: ``params.json`` and ``consolidated.*.pth``, one shard or many.

The counterpart of meta.py. What is written is what Meta's own loaders read: ``ModelArgs`` takes the
keys of params.json by name, and the tensors go into the model with ``load_state_dict(strict=True)``
after fairscale's column- and row-parallel layers have taken one shard each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.checkpoints.files import Shape, Stored
from pellucid.checkpoints.formats.meta import (
    EMBED,
    HEAD,
    MetaEntry,
    beyond_meta,
    hidden_width,
    interleaved,
    rope,
    table,
)
from pellucid.checkpoints.weights import parameter_shapes
from pellucid.checkpoints.writers import PthWriter
from pellucid.models import Config

_MULTIPLES = (256, 1024, 4096, 512, 128, 64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True, kw_only=True)
class MetaFiles:
    """The shards of a model, which all hold the same names.

    entries  the name table; a tied head is in it where it needs values of its own
    parts    stored name -> what one shard holds of it
    same     stored name -> the one whose values it shares (a tied head)
    shards   how many there are
    """

    entries: tuple[MetaEntry, ...]
    parts: dict[str, Stored]
    same: dict[str, str]
    shards: int


def write_params(config: Config, newer: bool) -> dict[str, Any]:
    """``params.json`` of a config, in the keys that Meta's ``ModelArgs`` has.

    `newer`: for the loader of Llama 3, which takes theta to be 500,000 where it is not stated; the
    one of Llama 1 and 2 has no ``rope_theta`` and refuses keys it does not know. No loader lets the
    file state the context length: it is an argument of theirs.

    ValueError, with the reason, for a model that the format cannot state.
    """
    beyond = beyond_meta(config)
    if beyond:
        raise ValueError(
            f"Meta's layout states the sizes and the RoPE of a Llama; this {config.family} model "
            f"has other features ({', '.join(beyond)}): convert it to hf"
        )
    scaled = _scaled(config)
    if config.head_dim * config.n_heads != config.width:
        raise ValueError(
            f"Meta's layout takes the head width from the width, {config.width} / "
            f"{config.n_heads} heads; this model sets it apart, to {config.head_dim}"
        )
    biased = [
        {"qkv": "attention_bias", "mlp": "mlp_bias"}[part] for part in config.biases if part != "o"
    ]
    if biased:
        raise ValueError(f"Meta's layout has no biases; this model has {' and '.join(biased)}")
    assert config.rope is not None, "a Llama"
    multiple_of, multiplier = _hidden(config.width, config.hidden_width)
    params: dict[str, Any] = {"dim": config.width}
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    params |= {"multiple_of": multiple_of, "n_heads": config.n_heads}
    if newer or config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    params |= {"n_layers": config.n_layers, "norm_eps": config.norm_eps}
    if newer or config.rope.theta != 10000.0:
        params["rope_theta"] = config.rope.theta
    if newer:
        params["use_scaled_rope"] = scaled
    return params | {"vocab_size": config.vocab_size}


def _scaled(config: Config) -> bool:
    """Whether RoPE is scaled the one way that params.json can say."""
    assert config.rope is not None, "a Llama"
    for scaled in (False, True):
        if config.rope == rope(config.width, config.rope.theta, scaled):
            return scaled
    if config.rope.type != "llama3":
        raise ValueError(
            f"Meta's layout has RoPE plain or scaled as in Llama 3.1; this model's is "
            f"{config.rope.type!r}"
        )
    expected = rope(config.width, config.rope.theta, True)
    apart = ", ".join(
        f"{name} {getattr(config.rope, name)} instead of {getattr(expected, name)}"
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_context")
        if getattr(config.rope, name) != getattr(expected, name)
    )
    raise ValueError(
        f"Meta's layout does not state how RoPE is scaled: for width {config.width} this model has "
        f"{apart}"
    )


def _hidden(width: int, hidden: int) -> tuple[int, float | None]:
    """``multiple_of`` and ``ffn_dim_multiplier`` from which `hidden` comes out exactly.

    Without a multiplier where that is possible, then the one with the fewest decimals.
    """
    for multiple_of in _MULTIPLES:
        if hidden_width(width, multiple_of, None) == hidden:
            return multiple_of, None
    whole = int(2 * (4 * width) / 3)
    for decimals in range(1, 18):
        for multiple_of in _MULTIPLES:
            # int() of anything from hidden - multiple_of + 1 up to hidden + 1 will do: the middle
            multiplier = round((hidden + 1 - multiple_of / 2) / whole, decimals)
            if hidden_width(width, multiple_of, multiplier) == hidden:
                return multiple_of, multiplier
    raise ValueError(
        f"Meta's layout cannot state hidden width {hidden} at width {width}: no ffn_dim_multiplier "
        f"of {whole} gives it"
    )


def meta_files(
    config: Config, dtypes: Mapping[str, torch.dtype], shards: int, newer: bool
) -> MetaFiles:
    """What each of `shards` files holds.

    dtypes  parameter name -> the dtype it is written in
    newer   split the embedding by rows, over the vocabulary; Llama 1 and 2 split it over the width

    Meta's model has a head of its own even where the head is the embedding, so a tied head is
    written out. It takes no room where it can be a second name for the embedding's values.

    ValueError where heads, widths or vocabulary do not divide into `shards`.
    """
    embed_dim = 0 if newer or shards == 1 else 1
    entries, same = list(table(config, embed_dim)), {}
    if config.tied and embed_dim == 0:
        same[HEAD] = EMBED
    elif config.tied:
        entries.append(MetaEntry(stored=HEAD, parameter="embed.weight", dim=0))
    if shards < 1:
        raise ValueError(f"{shards} shards: expected 1 or more")
    for what, count in (
        ("query heads", config.n_heads),
        ("key/value heads", config.n_kv_heads),
        ("hidden width", config.hidden_width),
        ("vocabulary", config.vocab_size),
        ("width", config.width),
    ):
        if count % shards:
            raise ValueError(f"{shards} shards: {what} {count} does not divide by {shards}")
    shapes = parameter_shapes(config)
    parts = {
        entry.stored: Stored(
            _part(shapes[entry.parameter], entry.dim, shards), dtypes[entry.parameter]
        )
        for entry in entries
    }
    return MetaFiles(entries=tuple(entries), parts=parts, same=same, shards=shards)


def _part(shape: Shape, dim: int | None, shards: int) -> Shape:
    return tuple(size // shards if axis == dim else size for axis, size in enumerate(shape))


def write_shards(folder: Path, files: MetaFiles, read: Callable[[str], Tensor]) -> None:
    """Write all shards side by side, so that each tensor is read once and none is kept.

    read  parameter name -> tensor, in the dtype that `meta_files` was told
    """
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                PthWriter(folder / f"consolidated.{shard:02}.pth", files.parts, files.same)
            )
            for shard in range(files.shards)
        ]
        for entry in files.entries:
            for writer, part in zip(writers, _parts(entry, files.shards, read), strict=True):
                writer.write(entry.stored, part)


def _parts(entry: MetaEntry, shards: int, read: Callable[[str], Tensor]) -> Iterator[Tensor]:
    """One parameter, shard by shard."""
    whole = read(entry.parameter)
    if entry.heads:
        whole = interleaved(whole, entry.heads)
    yield from [whole] * shards if entry.dim is None else whole.chunk(shards, entry.dim)
