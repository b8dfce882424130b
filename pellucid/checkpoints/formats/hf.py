"""Hugging Face's layout: the two-way name table, and a folder of safetensors as `Weights`.

The table says which parameters a stored tensor holds. Most hold one. GPT-2 joins q, k and v and
stores its matrices the other way round (transformers' ``Conv1D`` computes x · W):

       c_attn.weight, stored (C, 3C)                q_proj.weight (C, C), a view of it
             C       C       C
         ┌───────┬───────┬───────┐
       C │  qᵀ   │  kᵀ   │  vᵀ   │      ->        columns 0 … C, transposed
         └───────┴───────┴───────┘
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pellucid.checkpoints.config_keys import read_json
from pellucid.checkpoints.files import (
    SafetensorsFile,
    SafetensorsFolder,
    Shape,
    TensorFile,
    same_bits,
)
from pellucid.checkpoints.formats.hf_config import read_config
from pellucid.checkpoints.weights import (
    Recipe,
    Redundant,
    Weights,
    accounted,
    expected_shapes,
)
from pellucid.models import Config

INDEX = "model.safetensors.index.json"
# What makes a tokenizer, whichever kind it is, and what says how to talk to the model.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One stored tensor and the parameters in it, one below the other along dimension 0.

    transposed  stored the other way round, (in, out)
    zeros       holds no parameter: a bias of this shape that the model does not have
    """

    stored: str
    parameters: tuple[str, ...] = ()
    transposed: bool = False
    zeros: Shape | None = None


def table(config: Config) -> Iterator[Entry]:
    """Every stored tensor of a model with `config`, in the order of the forward pass."""
    return _gpt2(config) if config.rope is None else _llama(config)


def _llama(config: Config) -> Iterator[Entry]:
    def entry(stored: str, ours: str) -> Entry:
        return Entry(stored=stored, parameters=(ours,))

    yield entry("model.embed_tokens.weight", "embed.weight")
    for layer in range(config.n_layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        yield entry(f"{theirs}.input_layernorm.weight", f"{ours}.attn_norm.weight")
        yield entry(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight")
        for kind, block, biased, leaves in (
            ("attn", "self_attn", "qkv" in config.biases, ("q_proj", "k_proj", "v_proj", "o_proj")),
            ("mlp", "mlp", "mlp" in config.biases, ("gate_proj", "up_proj", "down_proj")),
        ):
            for leaf in leaves:
                for part in ("weight", "bias") if biased else ("weight",):
                    yield entry(f"{theirs}.{block}.{leaf}.{part}", f"{ours}.{kind}.{leaf}.{part}")
    yield entry("model.norm.weight", "norm.weight")
    if not config.tied:
        yield entry("lm_head.weight", "unembed.weight")


def _gpt2(config: Config) -> Iterator[Entry]:
    def both(stored: str, ours: str, transposed: bool = False) -> Iterator[Entry]:
        yield Entry(
            stored=f"{stored}.weight", parameters=(f"{ours}.weight",), transposed=transposed
        )
        yield Entry(stored=f"{stored}.bias", parameters=(f"{ours}.bias",))

    yield Entry(stored="transformer.wte.weight", parameters=("embed.weight",))
    yield Entry(stored="transformer.wpe.weight", parameters=("pos_embed.weight",))
    for layer in range(config.n_layers):
        theirs, ours = f"transformer.h.{layer}", f"layers.{layer}"
        qkv = tuple(f"{ours}.attn.{leaf}_proj" for leaf in "qkv")
        yield from both(f"{theirs}.ln_1", f"{ours}.attn_norm")
        yield Entry(
            stored=f"{theirs}.attn.c_attn.weight",
            parameters=tuple(f"{name}.weight" for name in qkv),
            transposed=True,
        )
        yield Entry(
            stored=f"{theirs}.attn.c_attn.bias",
            parameters=tuple(f"{name}.bias" for name in qkv) if "qkv" in config.biases else (),
            zeros=None if "qkv" in config.biases else (3 * config.width,),
        )
        yield from both(f"{theirs}.attn.c_proj", f"{ours}.attn.o_proj", transposed=True)
        yield from both(f"{theirs}.ln_2", f"{ours}.mlp_norm")
        yield from both(f"{theirs}.mlp.c_fc", f"{ours}.mlp.up_proj", transposed=True)
        yield from both(f"{theirs}.mlp.c_proj", f"{ours}.mlp.down_proj", transposed=True)
    yield from both("transformer.ln_f", "norm")
    if not config.tied:
        yield Entry(stored="lm_head.weight", parameters=("unembed.weight",))


def joined(entry: Entry, parts: Sequence[Tensor]) -> Tensor:
    """The stored tensor of an entry from its parameters: the way out."""
    if entry.zeros is not None:
        raise AssertionError(f"{entry.stored} holds no parameter, there is nothing to join")
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return (whole.t() if entry.transposed else whole).contiguous()


def stored_shape(entry: Entry, shapes: Mapping[str, Shape]) -> Shape:
    """Shape of an entry's stored tensor, from its parameters' shapes."""
    if entry.zeros is not None:
        return entry.zeros
    first = shapes[entry.parameters[0]]
    whole = (sum(shapes[name][0] for name in entry.parameters), *first[1:])
    return whole[::-1] if entry.transposed else whole


def open_folder(folder: Path) -> tuple[Config, Weights]:
    """Config and weights of a folder in Hugging Face's layout, every key and tensor accounted for.

    ValueError or OSError, in one line, where something is missing, cut short or does not fit.
    """
    config = read_config(read_json(folder / "config.json"), str(folder / "config.json"))
    source = _safetensors(folder)
    shapes = expected_shapes(config, [source], str(folder / "config.json"))
    prefix = _prefix_left_out(config, source)
    recipes: dict[str, Recipe] = {}
    redundant = _redundant(config, prefix)
    for entry in table(config):
        stored = entry.stored.removeprefix(prefix)
        if entry.zeros is not None:
            redundant[stored] = Redundant(
                shape=entry.zeros,
                agrees=lambda bias, weights: not bias.any(),
                otherwise='is not zero, although config.json says "qkv_bias": false',
            )
        begin = 0
        for name in entry.parameters:
            recipes[name] = Recipe(
                stored=stored,
                shape=shapes[name],
                shapes=(stored_shape(entry, shapes),),
                make=_Part(begin, shapes[name][0], entry.transposed, len(entry.parameters) == 1),
            )
            begin += shapes[name][0]
    assert recipes.keys() == shapes.keys(), "the name table and the model disagree"
    ordered = {name: recipes[name] for name in shapes}
    return config, accounted([source], ordered, redundant, str(folder), "config.json")


@dataclass(frozen=True)
class _Part:
    """Rows `begin` … `begin + rows` of a stored tensor, turned upright; a view."""

    begin: int
    rows: int
    transposed: bool
    whole: bool

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        upright = parts[0].t() if self.transposed else parts[0]
        return upright if self.whole else upright[self.begin : self.begin + self.rows]


def _prefix_left_out(config: Config, source: TensorFile) -> str:
    """``transformer.`` where the file leaves it out, as the original GPT-2 repository does."""
    prefix = "transformer." if config.rope is None else "model."
    return "" if any(name.startswith(prefix) for name in source.entries) else prefix


def _redundant(config: Config, prefix: str) -> dict[str, Redundant]:
    """What files hold beside the parameters: buffers, and a tied head written out."""
    found: dict[str, Redundant] = {}
    for layer in range(config.n_layers):
        if config.rope is None:
            # the causal mask and its filling, buffers in files of transformers < 4.31
            for leaf in ("bias", "masked_bias"):
                found[f"transformer.h.{layer}.attn.{leaf}".removeprefix(prefix)] = Redundant()
        else:
            # RoPE frequencies, in files of transformers < 4.32; the config states them
            found[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq".removeprefix(prefix)] = (
                Redundant(shape=(config.head_dim // 2,))
            )
    if config.tied:
        found["lm_head.weight"] = Redundant(
            shape=(config.vocab_size, config.width),
            agrees=lambda head, weights: same_bits(head, weights["embed.weight"]),
            otherwise="differs from the embedding, although config.json says they are one "
            '("tie_word_embeddings": true)',
        )
    return found


def _safetensors(folder: Path) -> SafetensorsFile | SafetensorsFolder:
    """The folder's tensors: ``model.safetensors``, or the files of an index."""
    single = folder / "model.safetensors"
    if single.is_file():
        return SafetensorsFile(single)
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        instead = f"; {', '.join(others[:3])} is not read: save as safetensors" if others else ""
        raise FileNotFoundError(
            f"{folder}: no weights: expected model.safetensors or {INDEX}{instead}"
        )
    return _from_index(folder)


def _from_index(folder: Path) -> SafetensorsFolder:
    index = folder / INDEX
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in listed.values()
    ):
        raise ValueError(f"{index}: expected a weight_map from tensor names to file names")
    names = sorted(set(listed.values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{folder}: {len(absent)} of {len(names)} weight files missing: {', '.join(absent)}"
        )
    files = {name: SafetensorsFile(folder / name) for name in names}
    lost = [tensor for tensor, name in listed.items() if tensor not in files[name].entries]
    if lost:
        raise ValueError(
            f"{index}: {len(lost)} of {len(listed)} tensors are not in the file it names: "
            + ", ".join(f"{tensor} in {listed[tensor]}" for tensor in lost[:6])
        )
    unlisted = [
        f"{tensor} in {name}"
        for name, file in files.items()
        for tensor in file.entries
        if listed.get(tensor) != name
    ]
    if unlisted:
        raise ValueError(
            f"{index}: {len(unlisted)} tensors are in the files but not in the index: "
            + ", ".join(unlisted[:6])
        )
    return SafetensorsFolder({tensor: files[name] for tensor, name in listed.items()})
