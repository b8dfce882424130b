"""A model with its tokenizer: the object most people hold.

`load` opens a checkpoint; `LanguageModel` joins what the floors below do apart: generating, tracing
and walking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

import pellucid
from pellucid import checkpoints, tokenizers
from pellucid.generate import (
    Sampling,
    TextStream,
    default_length,
    encode_prompt,
    generate_tokens,
    stream_text,
)
from pellucid.models.quantised import FullWeights, is_quantised
from pellucid.trace import Edit, Globs, Trace, estimated_bytes, trace

if TYPE_CHECKING:
    from pellucid.checkpoints import Checkpoint
    from pellucid.models import Config, Model
    from pellucid.tokenizers import Tokenizer
    from pellucid.walk import Step

Prompt = str | Sequence[int]
Length = int | Literal["usual"] | None


def load(
    source: str | Path = "demo",
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    dialect: str | None = None,
    stream: bool = False,
    adapter: str | Path | None = None,
) -> LanguageModel:
    """Open a model: a folder in Meta's or Hugging Face's layout, ``owner/name``, or a demo.

    dtype    "float32", "bfloat16", …; None keeps the checkpoint's own, without a second copy
    dialect  whose rounding: "meta", "hf", "notebook"; None takes the layout's
    stream   read each block's weights from the disk when it runs, for a model larger than memory
    adapter  a folder with a LoRA adapter in PEFT's format. Its products are computed beside the
             weights, as PEFT does, not rounded into them; ``lora.fold(lm.model)`` merges them,
             which decodes faster

    Raises ValueError or OSError, in one clear line, for a checkpoint or an adapter that is not
    whole, for an adapter of another model, and for a device that this machine does not have.
    """
    if adapter is not None and stream:
        raise ValueError("an adapter stands beside weights in memory: leave out stream, or adapter")
    place = as_device(device)
    checkpoint = checkpoints.open_checkpoint(source)
    load_model = checkpoints.stream_model if stream else checkpoints.load_model
    model = load_model(checkpoint, dtype=as_dtype(dtype), device=place, dialect=dialect)
    lm = LanguageModel(model, tokenizers.load(checkpoint.folder), checkpoint)
    if adapter is not None:
        _adapt(lm, Path(adapter))
    return lm


def _adapt(lm: LanguageModel, folder: Path) -> None:
    """Put a PEFT folder's adapters around the layers; its chat template, where `lm` has none."""
    from pellucid.checkpoints.formats.hf import table
    from pellucid.checkpoints.formats.peft import apply_adapter, module_names, speak_template

    apply_adapter(lm.model, folder, module_names(table(lm.config)))
    lm.model.requires_grad_(True)  # as every loaded model: gradients are traced to its beginning
    speak_template(lm.tokenizer, folder)
    lm.adapter = folder


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


def as_device(device: str | torch.device) -> torch.device:
    """A torch device from its name; ValueError for one that is unknown or not in this machine."""
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {str(device)!r}: expected cpu, cuda, cuda:1 …") from None
    if place.type == "cuda":  # counted, not tried: a context on the first GPU takes its memory
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (place.index or 0) >= count:
            found = f"{count} of them" if count else "no GPU that it can use"
            raise ValueError(f"device {place}: PyTorch finds {found} in this machine; try cpu")
    elif place.type != "cpu":
        try:
            torch.empty(0, device=place)
        except (RuntimeError, AssertionError, NotImplementedError):
            raise ValueError(
                f"device {place}: PyTorch cannot use it on this machine; try cpu"
            ) from None
    return place


class LanguageModel:
    """A model, its tokenizer and where they came from.

    `model` is a plain ``nn.Module``: everything PyTorch can do with one, it can do here.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, checkpoint: Checkpoint | None = None
    ) -> None:
        self.model, self.tokenizer, self.checkpoint = model, tokenizer, checkpoint
        self.adapter: Path | None = None  # the folder whose adapter it has

    @property
    def config(self) -> Config:
        """Shape of the model."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and so of the activations."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def name(self) -> str:
        """The source as it was given, or the family of a model made by hand; with its adapter."""
        name = self.checkpoint.source if self.checkpoint else self.config.family
        return f"{name} with {self.adapter}" if self.adapter else name

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, {self.config.family}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageModel:
        """Weights of its own; the tokenizer and the open files are read only and shared.

        ValueError for streamed weights: there is nothing in memory that could be copied.
        """
        if checkpoints.is_streamed(self.model):
            raise ValueError("a model whose weights are streamed has none to copy: load it again")
        copy = LanguageModel(deepcopy(self.model, memo), self.tokenizer, self.checkpoint)
        copy.adapter = self.adapter
        return copy

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text as the model expects it (with its BOS), ids as they are.

        ValueError for ids outside the vocabulary or an empty prompt.
        """
        if isinstance(prompt, str):
            tokens = encode_prompt(self.tokenizer, prompt)
        else:
            tokens = [int(token) for token in prompt]
        check_tokens(tokens, self.config)
        return tokens

    def generate(self, prompt: Prompt, *, max_new_tokens: Length = "usual", **options: Any) -> str:
        """The text that follows `prompt`; the options are those of `stream`."""
        return "".join(self.stream(prompt, max_new_tokens=max_new_tokens, **options))

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: Length = "usual",
        stop: str | Sequence[str] | None = (),
        seed: int | None = None,
        slide: bool = False,
        fast: bool | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Pieces of the text that follows `prompt`, as they come; never half a character.

        max_new_tokens  "usual": 128, fewer where the context ends before; None: until the model
                        stops or its context is full
        stop            one string or several before which the text ends
        seed            the same seed gives the same text; None draws another each time
        slide           let a Llama go on past its context, over the last tokens
        fast            decode in C: None where it can be done, True or an error, False never
        sampling        temperature (0: greedy), top_k, top_p, min_p, repetition_penalty
        """
        rows = self._stream(
            [self.encode(prompt)],
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            slide=slide,
            fast=fast,
            sampling=Sampling(**sampling),
        )
        return (piece for (piece,) in rows if piece)

    def generate_batch(
        self, prompts: Sequence[Prompt], *, max_new_tokens: Length = "usual", **options: Any
    ) -> list[str]:
        """As `generate` for several prompts at once; each row's text is the one it has alone.

        ValueError for a single prompt: its letters or tokens are no prompts.
        """
        if isinstance(prompts, str) or any(isinstance(prompt, int) for prompt in prompts):
            raise ValueError(
                f"generate_batch takes a list of prompts, got one: {str(prompts)[:40]!r}; put it "
                "into a list, or call generate"
            )
        own = ("stop", "seed", "slide", "fast")
        known = {name: options.pop(name) for name in own if name in options}
        rows = [self.encode(prompt) for prompt in prompts]
        stream = self._stream(
            rows, max_new_tokens=max_new_tokens, sampling=Sampling(**options), **known
        )
        return [completion.text for completion in stream.complete()]

    def _stream(
        self, rows: Sequence[Sequence[int]], *, max_new_tokens: Length, **options: Any
    ) -> TextStream:
        if max_new_tokens == "usual":
            slide = options.get("slide", False)
            max_new_tokens = default_length(self.config, rows, slide=slide)
        return stream_text(
            self.model, self.tokenizer, rows, max_new_tokens=max_new_tokens, **options
        )

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
        if gradients and checkpoints.is_streamed(self.model):
            raise ValueError("gradients need the weights in memory: load without stream")
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
        """From the prompt to the next token, one named tensor at a time."""
        from pellucid.walk import walk

        tokens = self.encode(prompt)
        return walk(
            self.config,
            self.weights(),
            tokens,
            token_strings=[self.tokenizer.token_string(token) for token in tokens],
            specials=self.tokenizer.specials,
            dialect=self.model.dialect,
            dtype=self.dtype,
            layer=layer,
            head=head,
            everything=everything,
        )

    def weights(self) -> Mapping[str, Tensor]:
        """Parameter name -> tensor; of streamed weights each is read when it is asked for."""
        if self.checkpoint is not None and checkpoints.is_streamed(self.model):
            return checkpoints.WeightsInOrder(self.checkpoint.weights)
        if is_quantised(self.model):
            return FullWeights(self.model)
        from pellucid.models.adapters import folded

        with folded(self.model):  # the walk knows one weight for each product
            return dict(self.model.state_dict())

    def _decode(self, tokens: list[int], steps: int) -> list[int]:
        """Greedy tokens of so many decoding steps after the first pass, seen by an open trace."""
        passes = generate_tokens(
            self.model,
            [tokens],
            sampling=Sampling(temperature=0.0),
            max_new_tokens=steps + 1,
            vocab_size=self.tokenizer.vocab_size,  # the trace names its tokens by their text
            unused_ids=self.tokenizer.unused_ids,
        )
        chosen = [token for (token,) in passes if token is not None]
        return chosen[:-1]  # the last pass chooses a token that no pass reads

    def _guard(self, tokens: int, steps: int, only: Globs, max_bytes: int | None) -> None:
        """Refuse a trace that would not fit, with the numbers, before anything is computed."""
        size, dialect = self.dtype.itemsize, self.model.dialect
        need = estimated_bytes(self.config, 1, tokens, tokens, size, only, dialect)
        for step in range(1, steps + 1):
            need += estimated_bytes(self.config, 1, 1, tokens + step, size, only, dialect)
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
