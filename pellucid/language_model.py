"""A model with its tokenizer: the object most people hold.

`load` opens a checkpoint; `LanguageModel` joins what the floors below do apart: generating, tracing
and walking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import pellucid
from pellucid import checkpoints, tokenizers
from pellucid.trace import Edit, Globs, Trace, estimated_bytes, trace

if TYPE_CHECKING:
    from pellucid.checkpoints import Checkpoint
    from pellucid.models import Config, Model
    from pellucid.reference import Step
    from pellucid.tokenizers import Tokenizer

Prompt = str | Sequence[int]


def load(
    source: str | Path = "demo",
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    dialect: str | None = None,
) -> LanguageModel:
    """Open a model: a folder in Meta's or Hugging Face's layout, ``owner/name``, or a demo.

    dtype    "float32", "bfloat16", …; None keeps the checkpoint's own, without a second copy
    dialect  whose rounding: "meta", "hf", "notebook"; None takes the layout's

    Raises ValueError or OSError, in one clear line, for a checkpoint that is not whole.
    """
    checkpoint = checkpoints.open_checkpoint(source)
    model = checkpoints.load_model(
        checkpoint, dtype=as_dtype(dtype), device=torch.device(device), dialect=dialect
    )
    return LanguageModel(model, tokenizers.load(checkpoint.folder), checkpoint)


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from its name; ValueError for a name that is no floating-point dtype."""
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ValueError(
                f"unknown dtype {dtype!r}: expected float32, bfloat16, float16, float64"
            )
        return found
    return dtype


class LanguageModel:
    """A model, its tokenizer and where they came from.

    `model` is a plain ``nn.Module``: everything PyTorch can do with one, it can do here.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, checkpoint: Checkpoint | None = None
    ) -> None:
        self.model, self.tokenizer, self.checkpoint = model, tokenizer, checkpoint

    @property
    def config(self) -> Config:
        """Shape of the model."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and so of the activations."""
        return self.model.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed.weight.device

    @property
    def name(self) -> str:
        """The source as it was given, or the family of a model made by hand."""
        return self.checkpoint.source if self.checkpoint else self.config.family

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, {self.config.family}, {self.dtype}, {self.device})"

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text as the model expects it (with its BOS), ids as they are.

        ValueError for ids outside the vocabulary or an empty prompt.
        """
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt, bos=self.tokenizer.adds_bos)
        else:
            tokens = [int(token) for token in prompt]
        check_tokens(tokens, self.config)
        return tokens

    def trace(
        self,
        prompt: Prompt,
        only: Globs = "*",
        *,
        edit: Mapping[str, Edit] | None = None,
        gradients: Callable[[Tensor], Tensor] | None = None,
        generate: int = 0,
        max_bytes: int | None = None,
    ) -> Trace:
        """Every named tensor of a run on `prompt`, or those that match a glob of `only`.

        edit       name -> function; what it returns feeds the rest of the run
        gradients  a scalar of the logits (B, T, V); its gradient at every kept name is in
                   ``seen.grad(name)``. The parameters' own ``.grad`` stay untouched
        generate   greedy decoding steps after the prompt, with the KV cache; the names of step i
                   begin with ``step.i.``
        max_bytes  refuse beyond this size (default: half of the free memory)
        """
        tokens = self.encode(prompt)
        if gradients and generate:
            raise ValueError("gradients are traced for one pass: leave out generate")
        self._guard(len(tokens), generate, only, max_bytes)
        batch = torch.tensor([tokens], device=self.device)
        with trace(self.model, only, edit=edit, gradients=gradients is not None) as seen:
            if generate:
                tokens = tokens + self._decode(tokens, generate)
            else:
                logits = self.model(batch)
        if gradients:
            kept = [tensor for tensor in seen.values() if tensor.requires_grad]
            torch.autograd.backward(gradients(logits), inputs=kept)
        seen.meta.update(self._meta(tokens))
        return seen

    def walk(
        self, prompt: Prompt, *, layer: int = 0, head: int = 0, everything: bool = False
    ) -> Iterator[Step]:
        """From the prompt to the next token, one named tensor at a time (DESIGN: the walk)."""
        from pellucid.reference import walk

        tokens = self.encode(prompt)
        return walk(
            self.config,
            self.model.state_dict(),
            tokens,
            token_strings=[self.tokenizer.token_string(token) for token in tokens],
            specials=self.tokenizer.specials,
            dialect=self.model.dialect,
            layer=layer,
            head=head,
            everything=everything,
        )

    def _guard(self, tokens: int, steps: int, only: Globs, max_bytes: int | None) -> None:
        """Refuse a trace that would not fit, with the numbers, before anything is computed."""
        size = self.dtype.itemsize
        need = estimated_bytes(self.config, 1, tokens, tokens, size, only)
        for step in range(1, steps):
            need += estimated_bytes(self.config, 1, 1, tokens + step, size, only)
        room = max_bytes if max_bytes is not None else free_memory(self.device) // 2
        if need > room:
            raise ValueError(
                f"this trace would hold {need / 1e9:.1f} GB, more than the {room / 1e9:.1f} GB it "
                f"may take: name fewer tensors with only=, shorten the prompt of {tokens} tokens, "
                "or raise max_bytes"
            )

    def _meta(self, tokens: Sequence[int]) -> dict[str, Any]:
        return {
            "model": self.name,
            "family": self.config.family,
            "dtype": str(self.dtype).removeprefix("torch."),
            "dialect": self.model.dialect.name,
            "tokens": list(tokens),
            "token_strings": [self.tokenizer.token_string(token) for token in tokens],
            "versions": {"pellucid": pellucid.__version__, "torch": torch.__version__},
        }


def check_tokens(tokens: Iterable[int], config: Config) -> None:
    """ValueError for no tokens, or for one outside the vocabulary."""
    tokens = list(tokens)
    if not tokens:
        raise ValueError("the prompt has no tokens: give some text")
    for token in tokens:
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary 0 … {config.vocab_size - 1}")


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken on a device now; for the CPU what the kernel calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        return 8 << 30  # not Linux: a guess that fits most machines
