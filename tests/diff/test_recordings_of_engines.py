"""The emitters of docs/recordings.md, run on stand-ins built as the engines' modules are."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from tiny import LLAMA, random_model
from torch import nn

import pellucid
from pellucid.models import build

TOKENS = list(range(3, 20))


def emitter(name: str) -> dict:
    """The names that the block of the page with this function defines."""
    page = (ROOT / "docs" / "recordings.md").read_text("utf-8")
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.S) if f"def {name}(" in b]
    names: dict = {}
    exec(code, names)
    return names


# ── vLLM's modules ───────────────────────────────────────────────────────────────────────────────


class AddedNorm(nn.Module):
    """A norm that adds the stream first, in place, as vLLM's kernel does, and returns both."""

    def __init__(self, weight, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x, residual=None):
        if residual is not None:
            residual += x
            x.copy_(F.rms_norm(residual, x.shape[-1:], self.weight, self.eps))
            return x, residual
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Product(nn.Module):
    """A linear layer that returns its bias too, which it has not."""

    def __init__(self, *weights):
        super().__init__()
        self.weight = nn.Parameter(torch.cat(weights))

    def forward(self, x):
        return F.linear(x, self.weight), None


class Rotary(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c

    def forward(self, positions, q, k):
        turns = self.c.rope.theta ** (-torch.arange(0, self.c.head_dim, 2) / self.c.head_dim)
        cos, sin = (f(positions[:, None] * turns)[:, None] for f in (torch.cos, torch.sin))
        for x in (q, k):
            one, two = x.view(len(x), -1, self.c.head_dim).chunk(2, -1)
            turned = torch.cat((one * cos - two * sin, two * cos + one * sin), -1)
            x.copy_(turned.flatten(1))
        return q, k


class Kernel(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c

    def forward(self, q, k, v):
        q, k, v = (x.unflatten(1, (-1, self.c.head_dim)).transpose(0, 1) for x in (q, k, v))
        z = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True,
                                           enable_gqa=True)  # fmt: skip
        return z[0].transpose(0, 1).flatten(1)


class Layer(nn.Module):
    def __init__(self, c, w, rotary, eps):
        super().__init__()
        self.c = c
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.qkv_proj = Product(*(w[f"attn.{x}_proj.weight"] for x in "qkv"))
        self.self_attn.rotary_emb, self.self_attn.attn = rotary, Kernel(c)
        self.self_attn.o_proj = Product(w["attn.o_proj.weight"])
        self.mlp.gate_up_proj = Product(w["mlp.gate_proj.weight"], w["mlp.up_proj.weight"])
        self.mlp.down_proj = Product(w["mlp.down_proj.weight"])
        self.input_layernorm = AddedNorm(w["attn_norm.weight"], eps)
        self.post_attention_layernorm = AddedNorm(w["mlp_norm.weight"], eps)

    def forward(self, positions, x, residual):
        c = self.c
        if residual is None:
            residual, x = x.clone(), self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        qkv, _ = self.self_attn.qkv_proj(x)
        q, k, v = qkv.split((c.n_heads * c.head_dim, *[c.n_kv_heads * c.head_dim] * 2), -1)
        q, k = self.self_attn.rotary_emb(positions, q.contiguous(), k.contiguous())
        x, _ = self.self_attn.o_proj(self.self_attn.attn(q, k, v))
        x, residual = self.post_attention_layernorm(x, residual)
        gate, up = self.mlp.gate_up_proj(x)[0].chunk(2, -1)
        x, _ = self.mlp.down_proj(F.silu(gate) * up)
        return x, residual


class Engine(nn.Module):
    """Tokens (T) in one row; one module turns the queries and keys of all layers."""

    def __init__(self, c, w, eps):
        super().__init__()
        rotary = Rotary(c)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding.from_pretrained(w["embed.weight"])
        self.model.layers = nn.ModuleList(
            Layer(
                c, {k.split(".", 2)[2]: x for k, x in w.items() if f"layers.{n}." in k}, rotary, eps
            )
            for n in range(c.n_layers)
        )
        self.model.norm = AddedNorm(w["norm.weight"], c.norm_eps)
        self.logits_processor = Head(w["unembed.weight"])

    def forward(self, input_ids, positions):
        x, residual = self.model.embed_tokens(input_ids), None
        for layer in self.model.layers:
            x, residual = layer(positions, x, residual)
        x, _ = self.model.norm(x, residual)
        return self.logits_processor(x)


class Head(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return F.linear(x, self.weight)


@pytest.mark.parametrize("eps", [LLAMA.norm_eps, 1e-3])
def test_an_engine_of_vllms_make(eps, tmp_path):
    ours = random_model(LLAMA, torch.float32)
    weights = {name: x.clone() for name, x in ours.state_dict().items()}
    engine, file = Engine(LLAMA, weights, eps), tmp_path / "engine.safetensors"
    emitter("record_engine")["record_engine"](engine, file)
    with torch.no_grad():
        for ids in (TOKENS, TOKENS[:1]):  # a second pass, which is not kept
            engine(input_ids=torch.tensor(ids), positions=torch.arange(len(ids)))
    report = pellucid.diff(ours, file, TOKENS)
    seen = {row.name for row in report.tensors}
    assert {"tokens", "embed", "final_norm", "logits"} <= seen
    parts = {row.name.removeprefix("layers.1.") for row in report.tensors if "ers.1." in row.name}
    assert {"attn_norm", "attn.q", "attn.k", "attn.v", "attn.q_rotated", "attn.k_rotated"} <= parts
    assert {"attn.z", "attn_out", "resid_mid", "mlp_norm", "mlp.gate", "mlp.up"} <= parts
    assert {"mlp.hidden", "mlp_out"} <= parts
    if eps == LLAMA.norm_eps:
        assert report.verdict == "within-rounding", report.summary()
    else:
        assert (report.first.name, report.cause.name) == ("layers.0.attn_norm", "norm eps")


def test_queries_and_keys_that_are_normed_behind_rope():
    """torchtune's first Qwen 3 did so: what its norms return is turned already."""
    ours = random_model(replace(LLAMA, qk_norm="head"), torch.float32)
    other = build(replace(ours.config, qk_norm_last=True))
    other.load_state_dict(ours.state_dict())
    with pellucid.trace.trace(other, ("*.q", "*.k", "*_normed", "*attn_norm", "tokens")) as seen:
        other(torch.tensor([TOKENS]))
    report = pellucid.diff(ours, seen, TOKENS)
    assert report.first.name == "layers.0.attn.q_normed", report.summary()
    assert report.cause.name == "q/k norm after RoPE"


# ── llama.cpp's tensors ──────────────────────────────────────────────────────────────────────────


def nodes_of(seen, config):
    """(name, array as ggml has it, memory as it lies there) of a Llama's graph, in its order."""

    def pairs(x):  # halves -> neighbours, the order of a Llama's rows in a GGUF
        one, two = x.chunk(2, -1)
        return torch.stack((one, two), -1).flatten(-2)

    def rows(x):  # (1, H, T, D) -> (T, H, D)
        return x[0].transpose(0, 1)

    yield "inp_embd", seen["embed"][0]
    for n in range(config.n_layers):
        at = f"layers.{n}."
        yield f"attn_norm-{n}", seen[f"{at}attn_norm"][0]
        yield f"Qcur-{n}", pairs(rows(seen[f"{at}attn.q"]))  # before RoPE, under the same name
        for name, leaf in (("Qcur", "q_rotated"), ("Kcur", "k_rotated")):
            yield f"{name}-{n}", pairs(rows(seen[f"{at}attn.{leaf}"]))
        yield f"Vcur-{n}", rows(seen[f"{at}attn.v"])
        yield f"kq_soft_max-{n}", seen[f"{at}attn.pattern"][0]
        for name, leaf in (("attn_out", "attn_out"), ("ffn_inp", "resid_mid"),
                           ("ffn_norm", "mlp_norm"), ("ffn_gate", "mlp.gate"),
                           ("ffn_up", "mlp.up"), ("ffn_swiglu", "mlp.hidden"),
                           ("ffn_out", "mlp_out"), ("l_out", "resid_post")):  # fmt: skip
            yield f"{name}-{n}", seen[at + leaf][0]
    yield "result_norm", seen["final_norm"][0]
    yield "result_output", seen["logits"][0]


@pytest.mark.parametrize("wrong", ["", "layers.1.attn.v"])
def test_llama_cpps_tensors_in_memory(wrong, tmp_path):
    """Structures laid out as ggml.h says, with gaps between rows, as views of larger ones have."""
    names = emitter("keep_in")
    ours, other = (random_model(LLAMA, torch.float32) for _ in range(2))
    with torch.no_grad():
        for x, y in zip(other.parameters(), ours.parameters(), strict=True):
            x.copy_(y)
        if wrong:
            other.layers[1].attn.v_proj.weight *= 1.01
    with pellucid.trace.trace(other) as seen:
        other(torch.tensor([TOKENS]))
    found, kept = {}, []
    keep = names["keep_in"](found)
    for name, x in nodes_of(seen, LLAMA):
        memory = torch.zeros(*x.shape[:-1], x.shape[-1] + 3)
        memory[..., : x.shape[-1]] = x
        shape, strides = [*x.shape[::-1], 1, 1, 1][:4], [4 * s for s in memory.stride()[::-1]]
        strides += [4 * memory.numel()] * (4 - len(strides))
        node = names["Tensor"](type=0, ne=(ctypes.c_int64 * 4)(*shape), data=memory.data_ptr(),
                               nb=(ctypes.c_size_t * 4)(*strides), name=name.encode())  # fmt: skip
        kept.append((memory, node))
        assert keep(ctypes.addressof(node), True, None) and keep(
            ctypes.addressof(node), False, None
        )
    np.savez(tmp_path / "llama.npz", **found)
    report = pellucid.diff(ours, tmp_path / "llama.npz", TOKENS)
    assert len(report.tensors) > 2 * 11
    if not wrong:
        assert report.verdict == "identical", report.summary()
    else:
        assert report.first.name == wrong, report.summary()


@pytest.mark.peers
def test_llama_cpp_itself(tmp_path):
    """The page's own lines, on a GGUF file of the demo, held against the file that was run."""
    pytest.importorskip("llama_cpp")
    lm = pellucid.load("demo", dtype="float32")
    ids = lm.encode("def read(path):")
    pellucid.convert("demo", tmp_path / "demo.gguf", "gguf", dtype=torch.float32)
    page = (ROOT / "docs" / "recordings.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    (code,) = [block for block in blocks if "import llama_cpp" in block]
    code = code.replace("model.gguf", str(tmp_path / "demo.gguf")).replace("[1, 15, 8]", str(ids))
    names = emitter("keep_in")
    exec(code.replace("llama.npz", str(tmp_path / "llama.npz")), names)
    report = pellucid.diff(tmp_path / "demo.gguf", tmp_path / "llama.npz", ids)
    assert report.verdict in ("within-rounding", "explained"), str(report)
    assert len(report.tensors) > 40
