"""Models as people write them, under names and layouts that Pellucid has not heard of.

Each takes our parameters and stores them its own way. A switch in `wrong` makes one mistake.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Grouped(nn.Module):
    """q, k and v of a group of heads joined, gate and up joined, rotate-half, one SDPA kernel."""

    def __init__(self, config, weights, wrong=""):
        super().__init__()
        self.table, self.wrong = nn.Embedding(config.vocab_size, config.width), wrong
        self.stack = nn.ModuleList(GroupedBlock(config, wrong) for _ in range(config.n_layers))
        self.last_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.scores_of_words = nn.Linear(config.width, config.vocab_size, bias=False)
        take(self.table.weight, weights["embed.weight"])
        take(self.last_norm.weight, weights["norm.weight"])
        take(self.scores_of_words.weight, weights["unembed.weight"])
        for n, block in enumerate(self.stack):
            block.load({k.split(".", 2)[2]: x for k, x in weights.items() if f"layers.{n}." in k})

    def forward(self, ids):
        x = self.table(ids) * (8.0 if self.wrong == "scaled" else 1.0)
        for block in self.stack[:-1] if self.wrong == "skipped" else self.stack:
            x = block(x)
        return {"scores": self.scores_of_words(self.last_norm(x))}


class GroupedBlock(nn.Module):
    def __init__(self, c, wrong):
        super().__init__()
        self.c, self.wrong, self.each = c, wrong, c.n_heads // c.n_kv_heads
        rows = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
        self.before_attention = nn.RMSNorm(c.width, eps=1e-3 if wrong == "eps" else c.norm_eps)
        self.before_mlp = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.qkv = nn.Linear(c.width, rows, bias=False)
        self.mix = nn.Linear(c.n_heads * c.head_dim, c.width, bias=False)
        self.gate_and_up = nn.Linear(c.width, 2 * c.hidden_width, bias=False)
        self.back = nn.Linear(c.hidden_width, c.width, bias=False)

    def load(self, w):
        c = self.c
        parts = [
            w[f"attn.{x}_proj.weight"].unflatten(0, (c.n_kv_heads, -1, c.head_dim)) for x in "qkv"
        ]
        take(self.qkv.weight, torch.cat(parts, 1).flatten(0, 2))
        take(self.mix.weight, w["attn.o_proj.weight"])
        take(
            self.gate_and_up.weight, torch.cat((w["mlp.gate_proj.weight"], w["mlp.up_proj.weight"]))
        )
        take(self.back.weight, w["mlp.down_proj.weight"])
        take(self.before_attention.weight, w["attn_norm.weight"])
        take(self.before_mlp.weight, w["mlp_norm.weight"])

    def forward(self, x):
        c, (batch, length, _) = self.c, x.shape
        joined = self.qkv(x if self.wrong == "behind" else self.before_attention(x))
        groups = joined.view(batch, length, c.n_kv_heads, self.each + 2, c.head_dim)
        q, k, v = groups.split((self.each, 1, 1), dim=3)
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in (q, k, v))
        q, k = (self.turn(part, length) for part in (q, k))
        k, v = (self.repeat(part) for part in (k, v))
        q, k = (k, q) if self.wrong == "exchanged" else (q, k)
        z = F.scaled_dot_product_attention(
            q, k, v, is_causal=self.wrong != "mask", scale=1.0 if self.wrong == "scale" else None
        )
        stream, x = x, x + self.mix(z.transpose(1, 2).flatten(2))
        x = self.before_attention(x) if self.wrong == "behind" else x
        read = stream if self.wrong == "parallel" else x
        gate, up = self.gate_and_up(self.before_mlp(read)).chunk(2, dim=-1)
        gate, up = (up, gate) if self.wrong == "branch" else (gate, up)
        return x + self.back(F.silu(gate * up) if self.wrong == "both" else F.silu(gate) * up)

    def repeat(self, x):
        if self.wrong == "tiled":
            return x.repeat(1, self.each, 1, 1)
        return x.repeat_interleave(self.each, dim=1)

    def turn(self, x, length):
        theta = 500.0 if self.wrong == "theta" else self.c.rope.theta
        turns = theta ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
        places = torch.arange(length).clamp(max=7 if self.wrong == "clamped" else length)
        angles = places[:, None] * turns
        first, second = x.chunk(2, dim=-1)
        if self.wrong in ("pairs", "written"):
            first, second = x[..., ::2], x[..., 1::2]
        sign = -1 if self.wrong == "sign" else 1
        turned = (
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + sign * first * angles.sin(),
        )
        if self.wrong == "pairs":
            return torch.stack(turned, -1).flatten(-2)
        return torch.cat(turned, -1)


class Bare(nn.Module):
    """No modules for products: bare (in, out) matrices; attention and norms written out."""

    def __init__(self, config, weights, wrong=""):
        super().__init__()
        self.words = nn.Parameter(weights["embed.weight"].clone())
        self.places = nn.Parameter(weights["pos_embed.weight"].clone())
        self.blocks = nn.ModuleList(
            BareBlock(config, {k: x for k, x in weights.items() if f"layers.{n}." in k}, wrong)
            for n in range(config.n_layers)
        )
        self.norm = Centred(weights, "norm", config.norm_eps)
        self.wrong = wrong

    def forward(self, ids):
        x = F.embedding(ids, self.words)
        x = x if self.wrong == "places" else x + self.places[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.words.T


class BareBlock(nn.Module):
    def __init__(self, config, weights, wrong):
        super().__init__()
        w = {name.split(".", 2)[2]: x for name, x in weights.items()}
        self.one, self.two = (
            Centred(w, name, config.norm_eps) for name in ("attn_norm", "mlp_norm")
        )
        self.look = Looking(config, w, wrong)
        self.widen = nn.Linear(*w["mlp.up_proj.weight"].T.shape)
        self.narrow = nn.Linear(*w["mlp.down_proj.weight"].T.shape)
        for module, name in ((self.widen, "up"), (self.narrow, "down")):
            take(module.weight, w[f"mlp.{name}_proj.weight"])
            take(module.bias, w[f"mlp.{name}_proj.bias"])
        self.bend = Bend(wrong)
        self.wrong = wrong

    def forward(self, x):
        x = x + self.look(self.one(x))
        normed = (self.one if self.wrong == "norm" else self.two)(x)
        return (normed if self.wrong == "stream" else x) + self.narrow(
            self.bend(self.widen(normed))
        )


class Looking(nn.Module):
    def __init__(self, config, w, wrong):
        super().__init__()
        self.heads, self.wrong = config.n_heads, wrong
        for letter in "qkvo":
            setattr(
                self, f"w_{letter}", nn.Parameter(w[f"attn.{letter}_proj.weight"].T.contiguous())
            )
            setattr(self, f"b_{letter}", nn.Parameter(w[f"attn.{letter}_proj.bias"].clone()))

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            torch.addmm(getattr(self, f"b_{n}"), x.view(-1, width), getattr(self, f"w_{n}"))
            .view(batch, length, self.heads, -1)
            .transpose(1, 2)
            for n in "qkv"
        )
        scores = q @ k.transpose(-1, -2)
        scores = scores if self.wrong == "scale" else scores / math.sqrt(q.shape[-1])
        hidden = torch.ones(length, length, dtype=torch.bool).triu(2 if self.wrong == "mask" else 1)
        masked = scores.masked_fill(hidden, -1e9)
        if self.wrong == "added":  # not wrong: as a BERT's or an old GPT-2's mask
            masked = scores - 10_000.0 * hidden.to(scores.dtype)
        pattern = masked.softmax(-2 if self.wrong == "axis" else -1)
        z = pattern @ v
        z = z if self.wrong == "join" else z.transpose(1, 2)
        flat = z.reshape(-1, width)
        added = self.b_o + 0.1 if self.wrong == "shift" else self.b_o
        return torch.addmm(added, flat, self.w_o).view(batch, length, width)


class Centred(nn.Module):
    def __init__(self, weights, name, eps):
        super().__init__()
        self.gain = nn.Parameter(weights[f"{name}.weight"].clone())
        self.shift = nn.Parameter(weights[f"{name}.bias"].clone())
        self.eps = eps

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps) * self.gain
            + self.shift
        )


class Bend(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def forward(self, x):
        if self.wrong == "erf":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        cube = 0.0447 if self.wrong == "constant" else 0.044715
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + cube * x**3)))


def take(parameter, tensor):
    with torch.no_grad():
        parameter.copy_(tensor)


class Cached(nn.Module):
    """Rows of q and k in neighbouring pairs, turned as complex numbers; a cache; a greedy loop."""

    def __init__(self, config, weights, wrong=""):
        super().__init__()
        self.tok = nn.Embedding(config.vocab_size, config.width)
        self.parts = nn.ModuleList(CachedBlock(config, wrong) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.out = nn.Linear(config.width, config.vocab_size, bias=False)
        for module, name in ((self.tok, "embed"), (self.norm, "norm"), (self.out, "unembed")):
            take(module.weight, weights[f"{name}.weight"])
        for n, block in enumerate(self.parts):
            block.load({k.split(".", 2)[2]: x for k, x in weights.items() if f"layers.{n}." in k})

    @torch.inference_mode()
    def forward(self, ids, start_pos):
        x = self.tok(ids)
        for block in self.parts:
            x = block(x, start_pos)
        return self.out(self.norm(x)[:, -1:])

    def continued(self, ids, steps):
        """Greedy tokens with the cache: one call, then one for each token."""
        start = 0
        for _ in range(steps + 1):
            logits = self(ids, start)
            start += ids.shape[1]
            ids = logits[:, -1].argmax(-1, keepdim=True)


class CachedBlock(nn.Module):
    def __init__(self, c, wrong):
        super().__init__()
        self.c, self.wrong = c, wrong
        self.wq = nn.Linear(c.width, c.n_heads * c.head_dim, bias=False)
        self.wk = nn.Linear(c.width, c.n_kv_heads * c.head_dim, bias=False)
        self.wv = nn.Linear(c.width, c.n_kv_heads * c.head_dim, bias=False)
        self.wo = nn.Linear(c.n_heads * c.head_dim, c.width, bias=False)
        self.w1 = nn.Linear(c.width, c.hidden_width, bias=False)
        self.w2 = nn.Linear(c.hidden_width, c.width, bias=False)
        self.w3 = nn.Linear(c.width, c.hidden_width, bias=False)
        self.n1, self.n2 = (nn.RMSNorm(c.width, eps=c.norm_eps) for _ in range(2))
        self.held = torch.zeros(2, 1, c.context_length, c.n_kv_heads, c.head_dim)

    def load(self, w):
        names = {
            "wv": "attn.v_proj",
            "wo": "attn.o_proj",
            "w1": "mlp.gate_proj",
            "w2": "mlp.down_proj",
            "w3": "mlp.up_proj",
            "n1": "attn_norm",
            "n2": "mlp_norm",
        }
        if self.wrong == "norms":
            names |= {"n1": "mlp_norm", "n2": "attn_norm"}
        for mine, ours in names.items():
            take(getattr(self, mine).weight, w[f"{ours}.weight"])
        keys = self.wv if self.wrong == "keys" else self.wk
        if self.wrong == "keys":
            take(self.wk.weight, w["attn.v_proj.weight"])
        for mine, letter in ((self.wq, "q"), (keys, "k")):
            rows = w[f"attn.{letter}_proj.weight"].unflatten(0, (-1, 2, self.c.head_dim // 2))
            rows = rows if self.wrong == "halves" else rows.transpose(1, 2)
            take(mine.weight, rows.flatten(0, 2))

    def forward(self, x, start):
        c, (batch, length, _) = self.c, x.shape
        normed = self.n1(x)
        q, k, v = (
            w(normed).view(batch, length, -1, c.head_dim) for w in (self.wq, self.wk, self.wv)
        )
        q, k = self.turn(q, start), self.turn(k, start)
        v = self.turn(v, start) if self.wrong == "values" else v
        for held, new in zip(self.held, (k, v), strict=True):
            held[:, start : start + length] = new
        k, v = (
            held[:, : start + length].repeat_interleave(c.n_heads // c.n_kv_heads, 2)
            for held in self.held
        )
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(c.head_dim)
        if length > 1:
            hidden = torch.full((length, length), float("-inf")).triu(1)
            scores = scores + torch.hstack((torch.zeros(length, start), hidden))
        z = torch.matmul(F.softmax(scores, dim=-1), v)
        x = x + self.wo(z.transpose(1, 2).flatten(2))
        normed = self.n2(x)
        act = F.gelu if self.wrong == "gelu" else F.silu
        return x.add_(self.w2(act(self.w1(normed)) * self.w3(normed)))  # written over the stream

    def turn(self, x, start):
        step = 1 if self.wrong == "restart" and start else start
        turns = self.c.rope.theta ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
        angles = (torch.arange(x.shape[1]) + step)[:, None] * turns
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(
            turned * torch.polar(torch.ones_like(angles), angles)[:, None]
        ).flatten(-2)


class ByHead(nn.Module):
    """Heads as an axis of every weight of attention, queries scaled before their product."""

    def __init__(self, config, weights, wrong=""):
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.width)
        take(self.words.weight, weights["embed.weight"])
        self.layers = nn.ModuleList(HeadBlock() for _ in range(config.n_layers))
        for n, layer in enumerate(self.layers):
            w = {k.split(".", 2)[2]: x for k, x in weights.items() if f"layers.{n}." in k}
            layer.load(config, w, wrong)
        self.last = nn.RMSNorm(config.width, eps=config.norm_eps)
        take(self.last.weight, weights["norm.weight"])
        self.head = nn.Parameter(weights["unembed.weight"].T.contiguous())

    def forward(self, ids):
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return self.last(x) @ self.head


class HeadBlock(nn.Module):
    def load(self, config, w, wrong):
        self.c, self.wrong = config, wrong
        for x in "qkv":
            heads = w[f"attn.{x}_proj.weight"].unflatten(0, (-1, config.head_dim))
            heads = heads.reshape(len(heads), config.width, -1) if wrong == x else heads.mT
            setattr(self, x, nn.Parameter(heads.contiguous()))  # (heads, C, D)
        o = w["attn.o_proj.weight"].unflatten(1, (-1, config.head_dim)).permute(1, 2, 0)
        self.o = nn.Parameter(o.contiguous())  # (heads, D, C)
        for x in ("gate", "up", "down"):
            setattr(self, x, nn.Parameter(w[f"mlp.{x}_proj.weight"].T.contiguous()))
        for x, ours in (("one", "attn_norm"), ("two", "mlp_norm")):
            setattr(self, x, nn.Parameter(w[f"{ours}.weight"].clone()))

    def forward(self, x):
        x = x + self.attention(self.norm(x, self.one))
        y = self.norm(x, self.two)
        return x + (F.silu(y @ self.gate) * (y @ self.up)) @ self.down

    def norm(self, x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, self.c.norm_eps)

    def attention(self, x):
        c = self.c
        q, k, v = (torch.einsum("btc,hcd->bhtd", x, getattr(self, name)) for name in "qkv")
        turns = c.rope.theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        angles = torch.arange(x.shape[1])[:, None] * turns
        cos, sin = (part.repeat(1, 2) for part in (angles.cos(), angles.sin()))
        q, k = (
            y * cos + torch.cat((-y.chunk(2, -1)[1], y.chunk(2, -1)[0]), -1) * sin for y in (q, k)
        )
        q = q / (1.0 if self.wrong == "scale" else math.sqrt(c.head_dim))
        k, v = (y.repeat_interleave(c.n_heads // c.n_kv_heads, 1) for y in (k, v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        return torch.einsum("bhtd,hdc->btc", z, self.o)
