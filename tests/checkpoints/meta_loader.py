"""Meta's side of the fence: their loader and their arithmetic, plainly, without Pellucid.

What a folder must be for `llama3/generation.py` and `llama/generation.py` of Meta to read it: every
``*.pth`` is one rank's share, params.json is spread into ``ModelArgs(**params)``, and the names fit
``load_state_dict(strict=True)``. The ranks' shares are put together as fairscale's parallel layers
compute with them: column-parallel outputs side by side, row-parallel inputs side by side.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# ModelArgs of llama (Llama 2), and of llama-models (Llama 3.1 and later). `max_seq_len` and
# `max_batch_size` are fields too, but the loaders pass them as arguments beside **params.
LLAMA2_FIELDS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier",
    "norm_eps",
}  # fmt: skip
LLAMA3_FIELDS = LLAMA2_FIELDS | {"rope_theta", "use_scaled_rope"}
COLUMNS = ("wq", "wk", "wv", "w1", "w3", "output")
ROWS = ("wo", "w2")


class MetaModel:
    """A folder in Meta's layout, read by Meta's rules."""

    def __init__(self, folder: Path, llama3: bool) -> None:
        params = json.loads((folder / "params.json").read_text())
        assert params.keys() <= (LLAMA3_FIELDS if llama3 else LLAMA2_FIELDS)
        defaults: dict[str, Any] = {
            "n_kv_heads": None, "multiple_of": 256, "ffn_dim_multiplier": None, "norm_eps": 1e-5,
            "rope_theta": 500000.0 if llama3 else 10000.0, "use_scaled_rope": False,
        }  # fmt: skip
        self.args = defaults | params
        if self.args["n_kv_heads"] is None:
            self.args["n_kv_heads"] = self.args["n_heads"]
        paths = sorted(folder.glob("*.pth"))
        ranks = [torch.load(path, map_location="cpu", weights_only=True) for path in paths]
        assert all(rank.keys() == ranks[0].keys() for rank in ranks)
        self.weights: dict[str, Tensor] = {}
        for name in ranks[0]:
            shares = [rank[name] for rank in ranks]
            leaf = name.split(".")[-2]
            if leaf in COLUMNS:
                self.weights[name] = torch.cat(shares, 0)
            elif leaf in ROWS:
                self.weights[name] = torch.cat(shares, 1)
            elif leaf == "tok_embeddings":  # VocabParallelEmbedding, before it ParallelEmbedding
                self.weights[name] = torch.cat(shares, 0 if llama3 else 1)
            else:
                assert all(torch.equal(share, shares[0]) for share in shares)
                self.weights[name] = shares[0]
        self._check_strictly()

    def _check_strictly(self) -> None:
        """As load_state_dict(strict=True): these names and shapes, no more, no fewer."""
        width, heads = self.args["dim"], self.args["n_heads"]
        hidden = int(2 * 4 * width / 3)
        if self.args["ffn_dim_multiplier"] is not None:
            hidden = int(self.args["ffn_dim_multiplier"] * hidden)
        multiple = self.args["multiple_of"]
        hidden = multiple * ((hidden + multiple - 1) // multiple)
        kv = self.args["n_kv_heads"] * (width // heads)
        expected = {
            "tok_embeddings.weight": (self.args["vocab_size"], width),
            "norm.weight": (width,),
            "output.weight": (self.args["vocab_size"], width),
        }
        for layer in range(self.args["n_layers"]):
            prefix = f"layers.{layer}."
            expected |= {
                prefix + "attention.wq.weight": (width, width),
                prefix + "attention.wk.weight": (kv, width),
                prefix + "attention.wv.weight": (kv, width),
                prefix + "attention.wo.weight": (width, width),
                prefix + "feed_forward.w1.weight": (hidden, width),
                prefix + "feed_forward.w2.weight": (width, hidden),
                prefix + "feed_forward.w3.weight": (hidden, width),
                prefix + "attention_norm.weight": (width,),
                prefix + "ffn_norm.weight": (width,),
            }
        assert {name: tuple(weight.shape) for name, weight in self.weights.items()} == expected

    def logits(self, tokens: list[int]) -> Tensor:
        """tokens (T) -> logits (T, V), in float64."""
        w = {name: weight.double() for name, weight in self.weights.items()}
        heads, kv_heads = self.args["n_heads"], self.args["n_kv_heads"]
        head_dim = self.args["dim"] // heads
        turn = self._turns(len(tokens), head_dim)
        x = w["tok_embeddings.weight"][tokens]
        future = torch.ones(len(tokens), len(tokens)).triu(1).bool()
        for layer in range(self.args["n_layers"]):
            p = f"layers.{layer}."
            normed = self._norm(x, w[p + "attention_norm.weight"])
            q = (normed @ w[p + "attention.wq.weight"].T).view(-1, heads, head_dim)
            k = (normed @ w[p + "attention.wk.weight"].T).view(-1, kv_heads, head_dim)
            v = (normed @ w[p + "attention.wv.weight"].T).view(-1, kv_heads, head_dim)
            q, k = _rotated(q, turn), _rotated(k, turn)
            out = []
            for head in range(heads):
                kv = head // (heads // kv_heads)
                scores = q[:, head] @ k[:, kv].T / math.sqrt(head_dim)
                out.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, kv])
            x = x + torch.cat(out, -1) @ w[p + "attention.wo.weight"].T
            normed = self._norm(x, w[p + "ffn_norm.weight"])
            gate = torch.nn.functional.silu(normed @ w[p + "feed_forward.w1.weight"].T)
            up = normed @ w[p + "feed_forward.w3.weight"].T
            x = x + (gate * up) @ w[p + "feed_forward.w2.weight"].T
        return self._norm(x, w["norm.weight"]) @ w["output.weight"].T

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.args["norm_eps"]) * weight

    def _turns(self, length: int, head_dim: int) -> Tensor:
        """(T, D/2) complex numbers of length 1; neighbouring components are one pair."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        frequencies = self.args["rope_theta"] ** -exponents
        if self.args["use_scaled_rope"]:
            frequencies = torch.tensor([_scaled(each) for each in frequencies.tolist()]).double()
        angles = torch.outer(torch.arange(length).double(), frequencies)
        return torch.polar(torch.ones_like(angles), angles)


def _scaled(frequency: float, factor: float = 8.0, context: int = 8192) -> float:
    """Llama 3.1: long waves slower by the factor, short ones as they are, a ramp between."""
    wavelength = 2 * math.pi / frequency
    if wavelength < context / 4:
        return frequency
    if wavelength > context:
        return frequency / factor
    smooth = (context / wavelength - 1) / 3
    return (1 - smooth) * frequency / factor + smooth * frequency


def _rotated(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2)
