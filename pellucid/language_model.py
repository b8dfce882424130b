"""A model with its tokenizer: the object most people hold.

`load` opens a checkpoint; `LanguageModel` joins what the floors below do apart: generating, tracing
and walking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from torch import Tensor

import pellucid
from pellucid import checkpoints, tokenizers
from pellucid.devices import as_device, as_dtype, check_room
from pellucid.edits import Edit
from pellucid.generate import (
    AT_ONCE,
    Sampling,
    TextStream,
    check_lengths,
    check_same_tokens,
    decodes_in_c,
    default_length,
    encode_prompt,
    generate_tokens,
    row_seeds,
    stream_text,
)
from pellucid.models.quantised import Format, FullWeights, is_quantised, quantise
from pellucid.prompts import Prompt, Prompts, check_tokens, is_batch, padded
from pellucid.trace import Globs, Trace, backward, edited, trace
from pellucid.trace_plan import check_names, run_bytes

if TYPE_CHECKING:
    from pellucid.checkpoints import Checkpoint
    from pellucid.models import Config, Model
    from pellucid.tokenizers import Tokenizer
    from pellucid.walk import Step

DraftSource: TypeAlias = "str | Path | LanguageModel"
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
    from pellucid.checkpoints.formats.peft import apply_adapter, module_names, use_template

    apply_adapter(lm.model, folder, module_names(table(lm.config)))
    lm.model.requires_grad_(True)  # as every loaded model: gradients are traced to its beginning
    use_template(lm.tokenizer, folder)
    lm.adapter = folder


class LanguageModel:
    """A model, its tokenizer and where they came from.

    `model` is a plain ``nn.Module``: everything PyTorch can do with one, it can do here.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, checkpoint: Checkpoint | None = None
    ) -> None:
        self.model, self.tokenizer, self.checkpoint = model, tokenizer, checkpoint
        self.adapter: Path | None = None  # the folder whose adapter it has
        self._copies: dict[str, Model] = {}  # quantised ones, by which it drafts for itself

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

    def to(
        self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
    ) -> LanguageModel:
        """This model, moved to a device or to another dtype of its weights, in place.

        ValueError for weights that are streamed, and for another dtype of quantised ones.
        """
        if checkpoints.is_streamed(self.model):
            raise ValueError("streamed weights stay where they are: load the model again")
        if dtype is not None and is_quantised(self.model):
            raise ValueError("quantised weights keep their form: load the model again with a dtype")
        place = None if device is None else as_device(device)
        self.model.to(device=place, dtype=as_dtype(dtype))
        return self

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text as the model expects it (with its BOS), ids as they are.

        ValueError for ids outside the vocabulary or an empty prompt.
        """
        if isinstance(prompt, str):
            tokens = encode_prompt(self.tokenizer, prompt)
        else:
            try:
                if isinstance(prompt, bytes):
                    raise TypeError("bytes would be read as ids")
                tokens = [int(token) for token in prompt]
            except (TypeError, ValueError):
                raise ValueError(f"{prompt!r:.60} is no prompt: expected text, or ids") from None
        check_tokens(tokens, self.config)
        return tokens

    def decode(self, tokens: Iterable[int] | Tensor) -> str:
        """The text of token ids (T), special tokens by name."""
        return self.tokenizer.decode([int(token) for token in tokens])

    def _rows(self, prompts: Prompts) -> list[list[int]]:
        """Token ids of one prompt or several."""
        if not is_batch(prompts):
            return [self.encode(cast(Prompt, prompts))]
        return [self.encode(prompt) for prompt in cast(Sequence[Prompt], prompts)]

    def __call__(self, prompts: Prompts) -> Tensor:
        """Logits (B, T, V) of prompts; shorter ones are padded on the left.

        With a graph for gradients, as any module's, unless ``torch.no_grad`` is on.
        """
        tokens, starts = padded(self._rows(prompts), self.device)
        return self.model(tokens, starts=starts)

    def loss(self, prompts: Prompts) -> Tensor:
        """Mean over the tokens after each prompt's first of −ln p, in nats per token; a scalar.

        ValueError for a prompt of one token: there is nothing to predict.
        """
        rows = self._rows(prompts)
        if min(len(row) for row in rows) < 2:
            raise ValueError("a prompt of one token has no next token to predict")
        tokens, starts = padded(rows, self.device)
        logits = self.model(tokens[:, :-1], starts=starts)
        targets = tokens[:, 1:].clone()
        for row, ids in enumerate(rows):
            targets[row, : targets.shape[1] - len(ids) + 1] = -100  # padding, and each first token
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.nn.functional.cross_entropy(wide.flatten(0, 1), targets.flatten())

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: Length = "usual",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] | None = (),
        seed: int | None = None,
        slide: bool = False,
        fast: bool | None = None,
        draft: DraftSource | None = None,
        edit: Mapping[str, Edit] | None = None,
    ) -> str:
        """The text that follows `prompt`; the arguments are those of `stream`."""
        stream = self._edited_stream(
            self.encode(prompt), edit, max_new_tokens, stop=stop, seed=seed, slide=slide, fast=fast,
            draft=draft, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty,
        )  # fmt: skip
        return "".join(piece for (piece,) in stream)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: Length = "usual",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] | None = (),
        seed: int | None = None,
        slide: bool = False,
        fast: bool | None = None,
        draft: DraftSource | None = None,
        edit: Mapping[str, Edit] | None = None,
    ) -> Iterator[str]:
        """Pieces of the text that follows `prompt`, as they come; never half a character.

        max_new_tokens  "usual": 128, fewer where the context ends before; None: until the model
                        stops or its context is full
        temperature … repetition_penalty   as `generate.Sampling` says; temperature 0 is greedy
        stop            one string or several before which the text ends
        seed            the same seed gives the same text; None draws another each time
        slide           let a Llama go on past its context, over the last tokens
        fast            decode in C: None where it can be done, True or an error, False never
        draft           a smaller model (see `draft_model`) runs ahead where that pays. Greedy text
                        is the same, drawn text as likely, but another for the same seed
        edit            name, glob or address -> number, tensor or function (`edits`), in every
                        step; decodes in PyTorch
        """
        stream = self._edited_stream(
            self.encode(prompt), edit, max_new_tokens, stop=stop, seed=seed, slide=slide, fast=fast,
            draft=draft, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty,
        )  # fmt: skip
        return (piece for (piece,) in stream if piece)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: Length | Sequence[int] = "usual",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] | None = (),
        seed: int | None = None,
        slide: bool = False,
        fast: bool | None = None,
        at_once: int = AT_ONCE,
    ) -> list[str]:
        """As `generate` for several prompts at once; each row's text is the one it has alone.

        max_new_tokens may be one number for each prompt. `at_once` prompts are written at a time;
        where C decodes, the next one follows when one of them ends.

        ValueError for a single prompt: its letters or tokens are no prompts.
        """
        if isinstance(prompts, str) or any(isinstance(prompt, int) for prompt in prompts):
            raise ValueError(
                f"generate_batch takes a list of prompts, got one: {str(prompts)[:40]!r}; put it "
                "into a list, or call generate"
            )
        rows = [self.encode(prompt) for prompt in prompts]
        lengths = max_new_tokens
        if lengths == "usual":
            lengths = default_length(self.config, rows, slide=slide)
        lengths = check_lengths(rows, lengths, self.config, slide=slide)
        seeds = row_seeds(seed, len(rows))
        most = len(rows) if decodes_in_c(self.model, fast) else at_once
        texts = []
        for first in range(0, len(rows), most):  # where C does not decode: one padded batch each
            some = slice(first, first + most)
            stream = self._stream(
                rows[some], lengths[some], stop=stop, seed=seeds[some], slide=slide, fast=fast,
                at_once=at_once, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                repetition_penalty=repetition_penalty,
            )  # fmt: skip
            texts += [completion.text for completion in stream.complete()]
        return texts

    def _stream(
        self, rows: Sequence[Sequence[int]], length: Length | Sequence[int], *,
        stop: str | Sequence[str] | None, seed: int | Sequence[int] | None, slide: bool,
        fast: bool | None,
        draft: DraftSource | None = None, at_once: int = AT_ONCE, **sampling: Any,
    ) -> TextStream:  # fmt: skip
        if length == "usual":
            length = default_length(self.config, rows, slide=slide)
        return stream_text(
            self.model, self.tokenizer, rows, sampling=Sampling(**sampling), max_new_tokens=length,
            stop=stop, seed=seed, slide=slide, fast=fast, at_once=at_once,
            draft=None if draft is None else self.draft_model(draft),
        )  # fmt: skip

    def draft_model(self, draft: DraftSource) -> Model:
        """The model that drafts for this one: any with the same tokens, or a source that opens one.

        "int8", "int6" and "int4" are quantised copies of this model, each made once.
        ValueError for another tokenizer, and for a copy of what is quantised or streamed already.
        """
        if isinstance(draft, str) and draft in ("int8", "int6", "int4"):
            if draft not in self._copies:
                how = Format(bits=int(draft[3:]))
                self._copies[draft] = quantise(deepcopy(self).model, how)
            return self._copies[draft]
        other = draft if isinstance(draft, LanguageModel) else load(draft, dtype=self.dtype)
        check_same_tokens(self.tokenizer, other.tokenizer)
        return other.model

    def _edited_stream(
        self, row: list[int], edit: Mapping[str, Edit] | None, length: Length, *,
        fast: bool | None, **options: Any,
    ) -> Iterator[list[str]]:  # fmt: skip
        if isinstance(length, list | tuple):
            raise ValueError(f"max_new_tokens is {length!r}: expected a whole number")
        if not edit:
            return self._stream([row], length, fast=fast, **options)
        if fast or options.get("draft") is not None:
            raise ValueError("edits act in PyTorch: leave out fast and draft, or edit")
        check_names(self.config, edit=edit)
        return edited(self.model, self._stream([row], length, fast=False, **options), edit)

    def trace(
        self,
        prompt: Prompts,
        only: Globs = "*",
        *,
        edit: Mapping[str, Edit] | None = None,
        gradients: Callable[[Tensor], Tensor] | None = None,
        generate: int = 0,
        max_bytes: int | None = None,
    ) -> Trace:
        """Every named tensor of a run on `prompt`, or those that match a glob of `only`.

        prompt     text or ids; or several, padded on the left: then `mask` hides the padding and
                   ``seen.meta["padding"]`` says how many places of each row are padding
        edit       name, glob or address -> number, tensor or function of a tensor; the result feeds
                   the rest of the run (`edits`)
        gradients  a scalar of the logits (B, T, V); its gradient at every kept name is in
                   ``seen.grad(name)``. The parameters' own ``.grad`` stay untouched
        generate   greedy decoding steps after the prompt, with the KV cache; the names of step i
                   begin with ``step.i.``
        max_bytes  refuse beyond this size (default: half of the free memory)

        ValueError for a glob, KeyError for an edit, that means no tensor of this model.
        """
        several = is_batch(prompt)
        rows = self._rows(prompt)
        if gradients and generate:
            raise ValueError("gradients are traced for one pass: leave out generate")
        if several and generate:
            raise ValueError("generate follows one prompt: trace them one by one")
        if gradients and checkpoints.is_streamed(self.model):
            raise ValueError("gradients need the weights in memory: load without stream")
        check_names(self.config, only, edit or {})
        batch, starts = padded(rows, self.device)
        (count, length), size = batch.shape, self.dtype.itemsize
        held = run_bytes(self.config, count, length, generate, size, only, self.model.dialect)
        remedy = "name fewer tensors with only=, shorten the prompt of "
        remedy += f"{length} tokens, or raise max_bytes"
        check_room(held, self.device, "this trace", remedy, max_bytes)
        with trace(self.model, only, edit=edit, gradients=gradients is not None) as seen:
            if generate:
                rows[0] += self._decode(rows[0], generate)
            else:
                logits = self.model(batch, starts=starts)
                if gradients:
                    backward(gradients(logits), seen)
        seen.meta.update(self._meta(rows, several))
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

    def _meta(self, rows: Sequence[Sequence[int]], several: bool) -> dict[str, Any]:
        """What a trace says of its run; of several prompts, a list for each."""
        ids = [list(row) for row in rows]
        text = [[self.tokenizer.token_string(token) for token in row] for row in ids]
        longest = max(len(row) for row in ids)
        return {
            "model": self.name,
            "family": self.config.family,
            "dtype": str(self.dtype).removeprefix("torch."),
            "dialect": self.model.dialect.name,
            "tokens": ids if several else ids[0],
            "token_strings": text if several else text[0],
            **({"padding": [longest - len(row) for row in ids]} if several else {}),
            "versions": {"pellucid": pellucid.__version__, "torch": torch.__version__},
        }
