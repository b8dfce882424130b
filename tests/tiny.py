"""Tiny random models for the tests: small enough to run in a millisecond, uneven in every size."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pellucid.models import Config, GPTConfig, LlamaConfig, Model, RopeConfig, build

# No two letters share a size, so that a transposed or swapped axis cannot pass unnoticed.
LLAMA = LlamaConfig(
    vocab_size=97,
    context_length=64,
    width=36,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=10,
    hidden_width=56,
    rope=RopeConfig(theta=10000.0),
)
GPT = GPTConfig(vocab_size=97, context_length=64, width=36, n_layers=2, n_heads=4, hidden_width=56)
CONFIGS: dict[str, Config] = {
    "gpt2": GPT,
    "gpt2-book": replace(GPT, biases=("o", "mlp"), tied=False),
    "llama-mha": replace(LLAMA, n_kv_heads=4),
    "llama-gqa": LLAMA,
    "llama-mqa": replace(LLAMA, n_kv_heads=1, tied=True),
}


def random_model(
    config: Config, dtype: torch.dtype = torch.float64, dialect: str = "hf", seed: int = 0
) -> Model:
    """A model in eval mode whose weights are large enough to make every step matter."""
    model = build(config, dialect)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            norm = parameter.ndim == 1 and name.endswith("norm.weight")
            parameter.copy_(1 + values / 10 if norm else values / 4)
    return model.to(dtype).eval()


def random_tokens(config: Config, *shape: int, seed: int = 0) -> Tensor:
    """Token ids, (B, T) or whatever `shape` says."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator)
