"""A live transformers model as a side of a diff: what its own modules compute, under our names.

Nothing in the model is replaced. Hooks on its modules see what goes in and comes out; the attention
function it was loaded with is wrapped, which shows queries and keys after RoPE, the mask, the
pattern and z:

    embed_tokens  rotary_emb        input_layernorm  q k v   [attention]   o_proj   …   lm_head
        │             │                    │           │     q_rotated …     │             │
      embed     rope.cos, rope.sin     attn_norm     attn.q  pattern, z   attn_out      logits

What an implementation does not show is absent, never computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pellucid import graph, names
from pellucid.diff.sides.attention_calls import Call, implementation, wrapped
from pellucid.diff.sides.module_names import (
    HEAD_NORMS,
    HEADS_IN,
    HEADS_OUT,
    inputs,
    outputs,
    submodule,
)
from pellucid.diff.sides.side import Batch, Side
from pellucid.numerics import dialect
from pellucid.prompts import padded
from pellucid.trace import Trace


def from_transformers(
    model: Any,
    label: str,
    tokenizer: Any = None,
    *,
    config: Any = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Side:
    """A side that runs a transformers model as it is: its dtype, attention, training mode.

    tokenizer        anything with ``encode(text) -> ids`` and maybe ``bos_token_id``
    config, weights  the model's, in our terms, where the caller can state them

    GPT-2, Llama, and models whose modules carry the same names (Mistral, Qwen 3, Gemma 2, …).
    ValueError for a model whose blocks are called otherwise.
    """
    blocks = blocks_of(model, label)
    gpt2 = hasattr(model.base_model, "wpe")

    def run(rows: Batch, steps: int) -> Trace:
        watch = ForeignWatch(model, blocks, gpt2)
        with watch.hooks(), torch.no_grad():
            _drive(model, rows, steps, watch)
        return watch.trace()

    return Side(
        label=label,
        dtype=model.dtype,
        config=config,
        dialect=dialect("hf", getattr(config, "rounding", "gpt2" if gpt2 else "llama")),
        weights=weights,
        encode=None if tokenizer is None else lambda text: list(tokenizer.encode(text)),
        bos_id=getattr(tokenizer, "bos_token_id", None),
        run=run,
    )


def blocks_of(model: Any, label: str) -> nn.ModuleList:
    """The blocks of a transformers model; ValueError for one that calls them otherwise."""
    base = getattr(model, "base_model", None)
    blocks = getattr(base, "layers", getattr(base, "h", None))
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(
            f"{label} is a {type(model).__name__}, whose blocks are not in .layers or .h: expected "
            "a GPT-2 or a model with Llama's module names"
        )
    return blocks


def _drive(model: Any, rows: Batch, steps: int, watch: ForeignWatch) -> None:
    """One pass over the rows, then decoding steps with the model's own KV cache.

    The tokens of each step are the greedy ones, or those of ``rows.following``. Rows of unequal
    length come as a user of transformers gives them: padded on the left, with an attention mask and
    positions that begin at the first real token.
    """
    following = getattr(rows, "following", None)
    device = next(model.parameters()).device
    tokens, padding = padded(rows, device)
    cache = None
    for step in range(steps + 1):
        watch.step = step
        given: dict[str, Any] = {"use_cache": steps > 0, "past_key_values": cache}
        if padding is not None:
            place = torch.arange(watch.seen + tokens.shape[1], device=device)
            real = (place[None] >= padding[:, None]).long()
            positions = (real.cumsum(-1) - 1).clamp(min=0)
            given |= {"attention_mask": real, "position_ids": positions[:, watch.seen :]}
        watch.keep("tokens", tokens)
        out = model(tokens, **given)
        watch.seen += tokens.shape[1]
        watch.finish(out)
        if step == steps:
            return
        cache, tokens = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        if following:
            tokens = torch.tensor([[row[step]] for row in following], device=device)


class ForeignWatch:
    """What one run of a model shows, pass by pass."""

    def __init__(self, model: Any, blocks: nn.ModuleList, gpt2: bool) -> None:
        self.model, self.blocks, self.gpt2 = model, blocks, gpt2
        self.step = self.seen = 0
        self.kept: dict[str, tuple[Tensor, int]] = {}
        self.layers = {
            id(module): layer for layer, block in enumerate(blocks) for module in block.modules()
        }

    def keep(self, name: str, tensor: Tensor, instead: bool = False) -> None:
        """Record under the current step; what was seen first stays, unless this is to replace it.

        The version that torch counts tells later whether the tensor was written over.
        """
        name = self.named(name)
        if instead or name not in self.kept:
            self.kept[name] = tensor.detach(), tensor._version

    def finish(self, output: Any) -> None:
        """The model's own logits; what its head returned is another tensor where they differ."""
        logits, raw = getattr(output, "logits", None), self.named("raw_logits")
        if logits is None or raw not in self.kept:
            return
        self.keep("logits", logits)
        if torch.equal(self.kept[raw][0], logits):
            del self.kept[raw]

    def shape(self, name: str) -> torch.Size | None:
        """Shape of what was recorded under a name in this step."""
        held = self.kept.get(self.named(name))
        return None if held is None else held[0].shape

    def named(self, name: str) -> str:
        """A name of the current step."""
        return f"step.{self.step}.{name}" if self.step else name

    def trace(self) -> Trace:
        """The observations in the order of the forward pass, without what was overwritten later."""
        intact = {name: x for name, (x, version) in self.kept.items() if x._version == version}
        return Trace({name: intact[name] for name in sorted(intact, key=place_in_pass)})

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch the model; everything is as before afterwards, also after an error."""
        with ExitStack() as stack:
            for handle in self._handles():
                stack.callback(handle.remove)
            attentions = [
                module for block in self.blocks for module in block.children() if _attends(module)
            ]
            for place, key in {
                (id(place), key): (place, key) for place, key in map(implementation, attentions)
            }.values():
                stack.enter_context(wrapped(place, key, self._attention))
            yield

    def _handles(self) -> Iterator[Any]:
        base = self.model.base_model
        table = submodule(base, "embed_tokens")
        scales = any(hasattr(table, name) for name in ("embed_scale", "scalar_embed_scale"))
        ends = {
            "embed_tokens": "embed_scaled" if scales else "embed",
            "wte": "embed",
            "norm": "final_norm",
            "ln_f": "final_norm",
            "final_layernorm": "final_norm",
        }
        for path, name in ends.items():
            yield from _on_output(base, path, self._keeper(name))
        if self.model is not base:
            yield from _on_output(self.model, "lm_head", self._keeper("raw_logits"))
        yield from _on_input(base, "wpe", lambda x: self.keep("positions", _shared(x, 1)))
        yield from _on_output(base, "wpe", lambda x: self.keep("pos_embed", _shared(x, 2)))
        if hasattr(base, "rotary_emb"):
            yield base.rotary_emb.register_forward_hook(self._rope, with_kwargs=True)
        width = _head_dim(self.model.config)
        for layer, block in enumerate(self.blocks):
            for paths, on, head_dim in (
                (outputs(block), _on_output, 0),
                (inputs(block), _on_input, 0),
                (HEADS_OUT, _on_output, width),
                (HEADS_IN, _on_input, width),
            ):
                for path, leaf in paths.items():
                    yield from on(block, path, self._keeper(f"layers.{layer}.{leaf}", head_dim))
            for path, leaf in HEAD_NORMS.items():
                keep = self._normed(f"layers.{layer}.{leaf}", width)
                yield from _on_output(block, path, keep)
            yield from _on_output(block, "attn.c_attn", self._joined(layer, width))

    def _keeper(self, name: str, head_dim: int = 0) -> Keep:
        def keep(x: Tensor) -> None:
            self.keep(name, _heads(x, head_dim) if head_dim else x)

        return keep

    def _normed(self, plain: str, head_dim: int) -> Keep:
        """Normalised queries or keys: all heads side by side, or heads and tokens in either order.

        Where there are as many tokens as heads, the order that is more like what was normalised.
        """

        def keep(x: Tensor) -> None:
            if x.ndim == 3:
                self.keep(f"{plain}_normed", _heads(x, head_dim))
                return
            held = self.kept.get(self.named(plain))
            if held is None or x.ndim != 4:
                return
            choices = [y for y in (x.transpose(1, 2), x) if y.shape == held[0].shape]
            if choices:
                alike = [float((y.detach().double() * held[0].double()).sum()) for y in choices]
                self.keep(f"{plain}_normed", choices[alike.index(max(alike))])

        return keep

    def _joined(self, layer: int, head_dim: int) -> Keep:
        """q | k | v side by side, (B, T, 3C)."""

        def keep(x: Tensor) -> None:
            for letter, part in zip("qkv", x.chunk(3, dim=-1), strict=True):
                self.keep(f"layers.{layer}.attn.{letter}", _heads(part, head_dim))

        return keep

    def _rope(self, module: nn.Module, arguments: Any, named: Any, output: Any) -> None:
        positions = named.get("position_ids", arguments[1] if len(arguments) > 1 else None)
        if isinstance(positions, Tensor) and positions.ndim == 2:
            self.keep("positions", _shared(positions, 1))
        kind = named.get("layer_type", arguments[2] if len(arguments) > 2 else None)
        which = "second_rope" if isinstance(kind, str) and "sliding" in kind else "rope"
        for leaf, table in zip(("cos", "sin"), output, strict=True):
            first, second = table.chunk(2, dim=-1)  # (B, T, D/2) twice, for the two halves of q
            if table.ndim == 3 and torch.equal(first, second):
                self.keep(f"{which}.{leaf}", _shared(first, 2))

    def _attention(self, call: Call, result: Any) -> None:
        """What the attention function was given, and what it returns."""
        layer = self.layers.get(id(call.module))
        if layer is None or not isinstance(result, tuple):
            return
        last = "_normed" if hasattr(call.module, "query_layernorm") else "_rotated"
        block, rotated = f"layers.{layer}.attn.", "" if self.gpt2 else last
        passes = call.query.shape[2]
        self.keep(f"{block}q{rotated}", call.query, instead=self.gpt2)
        if call.key.shape[2] == self.seen + passes:
            # the new ones stand behind those of the cache
            k, v = call.key[:, :, self.seen :], call.value[:, :, self.seen :]
            if v.shape == self.shape(f"{block}v"):  # not yet repeated for the query heads
                self.keep(f"{block}k{rotated}", k, instead=self.gpt2)
                self.keep(f"{block}v", v, instead=True)
        mask = call.allowed()
        if mask is not None and mask.shape[-1] == self.seen + passes:
            self.keep("window_mask" if call.window else "mask", mask)
        out, pattern = result[:2]
        if isinstance(pattern, Tensor) and pattern.ndim == 4:
            self.keep(f"{block}pattern", pattern)
        if out.ndim == 4:
            self.keep(f"{block}z", out.transpose(1, 2))  # it returns (B, T, H, D)


Keep = Callable[[Tensor], None]


def _on_output(root: nn.Module, path: str, keep: Keep) -> Iterator[Any]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        keep(output[0] if isinstance(output, tuple) else output)

    module = submodule(root, path)
    if module is not None:
        yield module.register_forward_hook(hook)


def _on_input(root: nn.Module, path: str, keep: Keep) -> Iterator[Any]:
    def hook(module: nn.Module, arguments: Any, named: Any) -> None:
        given = arguments[0] if arguments else named.get("hidden_states")
        if isinstance(given, Tensor):
            keep(given)

    module = submodule(root, path)
    if module is not None:
        yield module.register_forward_pre_hook(hook, with_kwargs=True)


def _attends(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in ("o_proj", "c_attn")) and hasattr(module, "config")


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, heads · D) -> (B, heads, T, D)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _shared(x: Tensor, ndim: int) -> Tensor:
    """Without the batch axis where all rows share one."""
    return x[0] if x.ndim == ndim + 1 and len(x) == 1 else x


def place_in_pass(name: str) -> tuple[int, int, int, int]:
    """Sort key of a name: step, before / in / after the blocks, layer, row of the vocabulary."""
    row, layer = graph.row(name), names.layer_of(name)
    section = 1 if layer is not None else 2 if row.leaf in ("final_norm", "logits") else 0
    return names.step_of(name), section, layer or 0, graph.ROWS.index(row)
