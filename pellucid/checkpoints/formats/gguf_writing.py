"""Our models as GGUF files: llama.cpp's names, keys and row order.

Names and keys are those of llama.cpp's ``llama-arch.cpp`` and ``convert_hf_to_gguf.py``. Vectors
and the position table are float32 whatever the matrices are, as its converter leaves them. The
file has no vocabulary: token ids are all that is needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pellucid.checkpoints import parameter_shapes
from pellucid.checkpoints.formats.gguf_file import Announced, write
from pellucid.checkpoints.formats.meta import interleaved
from pellucid.checkpoints.writers import bytes_of
from pellucid.models import Config, RopeConfig
from pellucid.models.rope import frequencies

_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}  # llama.cpp's enum llama_ftype
_WHOLE = {
    "embed": "token_embd", "pos_embed": "position_embd", "norm": "output_norm",
    "unembed": "output",
}  # fmt: skip
_IN_LAYER = {
    "attn_norm": "attn_norm", "attn.q_proj": "attn_q", "attn.k_proj": "attn_k",
    "attn.v_proj": "attn_v", "attn.o_proj": "attn_output", "mlp_norm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_Read = Callable[[], Tensor]


def write_model(path: Path, config: Config, weights: Mapping[str, Tensor], dtype: str) -> None:
    """A model as one GGUF file, its matrices in `dtype`: float32, float16 or bfloat16.

    Weights are read one at a time. ValueError for a RoPE scaling that llama.cpp's file format
    states otherwise (dynamic, yarn).
    """
    keys = {"general.architecture": config.family, "general.file_type": _FILE_TYPES[dtype]}
    keys |= {f"{config.family}.{key}": value for key, value in _hyperparameters(config).items()}
    keys["tokenizer.ggml.model"] = "none"
    write(path, keys, (_announced(*entry, dtype) for entry in _entries(config, weights)))


def _hyperparameters(config: Config) -> dict[str, int | float | str]:
    keys: dict[str, int | float | str] = {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "embedding_length": config.width,
        "block_count": config.n_layers,
        "feed_forward_length": config.hidden_width,
        "attention.head_count": config.n_heads,
    }
    if config.rope is None:
        if config.activation == "gelu":
            raise ValueError(
                f"activation is {config.activation!r}: llama.cpp's gpt2 knows only the tanh form"
            )
        return keys | {"attention.layer_norm_epsilon": float(config.norm_eps)}
    keys |= {
        "attention.head_count_kv": config.n_kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope.theta),
    }
    if config.rope.type == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope.factor)}
    elif config.rope.type not in ("default", "llama3"):
        raise ValueError(f"RoPE scaling {config.rope.type!r} is not written to GGUF files")
    return keys


def _entries(
    config: Config, weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, tuple[int, ...], _Read]]:
    """llama.cpp's name, shape and reader of every tensor."""
    shapes = parameter_shapes(config)
    for name, shape in shapes.items():
        path, _, kind = name.rpartition(".")
        if not path.startswith("layers."):
            yield f"{_WHOLE[path]}.{kind}", shape, lambda name=name: weights[name]
            continue
        _, layer, leaf = path.split(".", 2)
        if config.rope is None and leaf in ("attn.q_proj", "attn.k_proj", "attn.v_proj"):
            if leaf == "attn.q_proj":
                names = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
                joined = (3 * shape[0], *shape[1:])
                yield f"blk.{layer}.attn_qkv.{kind}", joined, _joined(weights, names)
            continue
        heads = _turned_heads(config, leaf)
        read = _interleaved(weights, name, heads) if heads else lambda name=name: weights[name]
        yield f"blk.{layer}.{_IN_LAYER[leaf]}.{kind}", shape, read
    if config.rope is not None and config.rope.type == "llama3":
        yield "rope_freqs.weight", (config.head_dim // 2,), lambda: _divisors(config)


def _joined(weights: Mapping[str, Tensor], names: list[str]) -> _Read:
    return lambda: torch.cat([weights[name] for name in names])


def _interleaved(weights: Mapping[str, Tensor], name: str, heads: int) -> _Read:
    return lambda: interleaved(weights[name], heads)


def _turned_heads(config: Config, leaf: str) -> int:
    """Heads of a q or k matrix, whose rows llama.cpp expects in Meta's order; 0 for the others."""
    if config.rope is None:
        return 0
    return {"attn.q_proj": config.n_heads, "attn.k_proj": config.n_kv_heads}.get(leaf, 0)


def _divisors(config: Config) -> Tensor:
    """(D/2): what llama.cpp divides each plain RoPE frequency by."""
    assert config.rope is not None, "a model with RoPE"
    plain = RopeConfig(theta=config.rope.theta)
    return frequencies(plain, config.head_dim) / frequencies(config.rope, config.head_dim)


def _announced(name: str, shape: tuple[int, ...], read: _Read, dtype: str) -> Announced:
    narrow = len(shape) == 2 and not name.startswith("position_embd")
    dtype = dtype if narrow else "float32"
    return Announced(
        name=name,
        shape=shape,
        dtype=dtype,
        data=lambda: bytes_of(read().to(getattr(torch, dtype)).contiguous()),
    )
