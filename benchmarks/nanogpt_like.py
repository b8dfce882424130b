"""A plain GPT with the arithmetic of nanoGPT's model, as the peer of the training benchmark.

nanoGPT is no package and this project's machines have no network, so its model is written here
anew, from what it computes: one joined product for queries, keys and values, fused causal
attention, GELU in its exact form, layer norms and products without biases, a tied head, the loss
from all logits at once; AdamW as PyTorch has it for the device. Nothing of it is a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PeerConfig:
    """Shape, and the share of values that dropout leaves out."""

    vocab_size: int
    context: int
    width: int
    layers: int
    heads: int
    dropout: float = 0.0


class PeerBlock(nn.Module):
    """Attention and MLP on a normalised stream."""

    def __init__(self, config: PeerConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.rate = config.heads, config.dropout
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.joined = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, -1).transpose(1, 2)
            for part in self.joined(self.norm1(x)).split(width, dim=2)
        )
        rate = self.rate if self.training else 0.0
        z = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        x = x + self.dropout(self.out(z.transpose(1, 2).reshape(batch, tokens, width)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class PeerGPT(nn.Module):
    """Tokens and targets to the mean loss."""

    def __init__(self, config: PeerConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(PeerBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.head.weight = self.embed.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets (B, T) -> mean cross-entropy."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.embed(tokens) + self.positions(place))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def peer_optimizer(model: nn.Module, device: str) -> torch.optim.AdamW:
    """Matrices decay, vectors do not; in one kernel on a GPU, as nanoGPT asks for it."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=device == "cuda" or None)
