"""What is measured: named shapes with random weights, written once and kept in a work folder."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pellucid import checkpoints
from pellucid.families.shapes import SHAPES as WELL_KNOWN
from pellucid.models import Config, LlamaConfig, RopeConfig
from pellucid.models.quantised import Format, quantise

_BITS = {"int8": 8, "int4": 4}
# The tiny one is that of the stories15M checkpoint (Karpathy, llama2.c), where overhead rules.
SHAPES: dict[str, Config] = {
    "gpt2-124m": WELL_KNOWN["gpt2"].config,
    "llama-3.2-1b": WELL_KNOWN["llama-3.2-1b"].config,
    "llama-3-8b": WELL_KNOWN["llama-3-8b"].config,
    "stories15m": LlamaConfig(
        vocab_size=32000,
        context_length=256,
        width=288,
        n_layers=6,
        n_heads=6,
        n_kv_heads=6,
        head_dim=48,
        hidden_width=768,
        rope=RopeConfig(theta=10000.0),
        tied=True,
    ),
}


class RandomWeights(Mapping[str, Tensor]):
    """Parameter name -> random bfloat16 tensor, made when asked for; the same at every asking.

    Matrices are normal with standard deviation 0.02, those that add to the residual stream scaled
    down by sqrt(2 · layers) (GPT-2, section 2.3), norms are 1 and biases 0: no value that a real
    model would not have, so that no kernel meets denormals or overflow.
    """

    def __init__(self, config: Config) -> None:
        self._shapes = checkpoints.parameter_shapes(config)
        self._residual = 0.02 / (2 * config.n_layers) ** 0.5

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            value = 0.0 if name.endswith("bias") else 1.0
            return torch.full(shape, value, dtype=torch.bfloat16)
        adds = name.endswith(("o_proj.weight", "down_proj.weight"))
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(shape, generator=generator)
        return values.mul_(self._residual if adds else 0.02).bfloat16()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def model_home(work: Path, title: str, config: Config) -> Path:
    """The folder of `work` for everything made of one config; another config has another."""
    digest = hashlib.sha256(repr(config).encode()).hexdigest()[:8]
    plain = "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in title)
    return work / f"{plain[-40:]}-{digest}"


def hf_folder(home: Path, config: Config, dtype: str) -> Path:
    """The random model as a Hugging Face folder, written if need be.

    dtype  "bfloat16", or "float32" with the same values; "int8" or "int4" for Pellucid's own
           quantised folder of them
    """
    how = Format(bits=_BITS[dtype]) if dtype in _BITS else None
    folder = home / (f"{dtype}-g{how.group}-h{how.head_bits}" if how else dtype)
    if folder.is_dir():
        return folder
    if dtype == "bfloat16":
        home.mkdir(parents=True, exist_ok=True)
        checkpoints.save(folder, config, RandomWeights(config))
        return folder
    source = checkpoints.open_checkpoint(hf_folder(home, config, "bfloat16"))
    if how:
        checkpoints.save_quantised(folder, quantise(checkpoints.load_model(source), how), how)
    else:
        checkpoints.save(folder, config, source.weights, dtype=getattr(torch, dtype))
    return folder
