"""The walk of a prompt through a checkpoint, whose weights are read one at a time.

    walk = walk_prompt("demo", "import os")
    for step in walk:
        print(step.address, step.shape)
    walk.result["next_text"]

This is what ``pellucid walk`` runs. For a model that is in memory there is ``LanguageModel.walk``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pellucid import checkpoints, numerics, tokenizers
from pellucid.devices import as_device, as_dtype, check_room
from pellucid.generate import encode_prompt
from pellucid.language_model import load
from pellucid.models.finite import is_finite
from pellucid.prompts import check_tokens
from pellucid.trace_plan import estimated_bytes
from pellucid.walk import Step, Walk, walk

if TYPE_CHECKING:
    from pellucid.checkpoints import Checkpoint
    from pellucid.tokenizers import Tokenizer

# The prompt of the notebook "llama3 implemented from scratch", whose vocabulary is Llama 3's; the
# shipped models of the small world were taught it too.
LLAMA3_VOCABULARY = 128_256
LLAMA3_PROMPT = "the answer to the ultimate question of life, the universe, and everything is "
CODE_PROMPT = "if not isinstance(value, str"
_AT_ONCE = ("mask", "embed", "layers.0.*")  # names whose tensors are held together
TOP = 10  # likeliest next tokens in the result


class PromptWalk:
    """The steps of one prompt, to be iterated over once.

    model          where the weights come from, as it was given
    prompt         the text; `tokens` its token ids (T), `token_strings` the text of each
    n_layers       of the model, whose config is `config`; `dialect`: whose rounding
    result         after the last step: ``top`` (the likeliest next tokens, each with id, text and
                   probability), ``next_token`` (id) and ``next_text``
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        prompt: str,
        tokens: Sequence[int],
        dialect: str,
    ) -> None:
        self.model, self.n_layers = checkpoint.source, checkpoint.config.n_layers
        self.config, self.dialect = checkpoint.config, dialect
        self.prompt, self.tokens = prompt, list(tokens)
        self.token_strings = [tokenizer.token_string(token) for token in tokens]
        self.result: dict[str, Any] = {}
        self.steps: Iterator[Step] = iter(())
        self._tokenizer = tokenizer

    def __iter__(self) -> Iterator[Step]:
        for step in self.steps:
            self.result.update(outcome(step, self._tokenizer))
            yield step
            del step  # its tensor may be large, and the next step needs room

    def _repr_html_(self) -> str:
        return self.steps._repr_html_() if isinstance(self.steps, Walk) else repr(self)

    def to_json(self, steps: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """The object that ``pellucid walk --json`` prints; `steps` as `Step.to_json` gives them."""
        return {
            "model": self.model,
            "prompt": self.prompt,
            "tokens": self.tokens,
            "token_strings": self.token_strings,
            "steps": list(steps),
            **self.result,
        }


def walk_prompt(
    source: str | Path = "demo",
    prompt: str | None = None,
    *,
    layer: int = 0,
    head: int = 0,
    everything: bool = False,
    bos: bool | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    dialect: str | None = None,
    adapter: str | Path | None = None,
) -> PromptWalk:
    """Every step between a prompt and its next token; the model is never loaded whole.

    prompt       None: an example that suits the vocabulary
    layer, head  shown in full, everything: each head of each layer; see `pellucid.walk.walk`
    bos          whether the begin token comes first; None: as the tokenizer's models expect it
    dtype        of the activations; None: as the weights are stored
    dialect      whose rounding; None: that of the checkpoint's layout
    adapter      a folder with a LoRA adapter; with one, the model is loaded whole and merged

    Nothing is computed before the first step is asked for. Raises ValueError or OSError, in one
    line, for a model that cannot be opened, an empty prompt, a layer, head or device that is not
    there.
    """
    place = as_device(device)
    checkpoint = checkpoints.open_checkpoint(source)
    tokenizer = tokenizers.load(checkpoint.folder)
    text = example_prompt(checkpoint) if prompt is None else prompt
    if not text:
        raise ValueError("the prompt is empty: give some text, or leave it out for an example")
    tokens = encode_prompt(tokenizer, text, bos=bos)
    check_tokens(tokens, checkpoint.config)
    size = (as_dtype(dtype) or torch.float32).itemsize
    held = estimated_bytes(checkpoint.config, 1, len(tokens), len(tokens), size, _AT_ONCE)
    check_room(held, place, "this walk", f"shorten the prompt of {len(tokens):,} tokens")
    found = PromptWalk(checkpoint, tokenizer, text, tokens, dialect or checkpoint.dialect)
    shown: dict[str, Any] = {"layer": layer, "head": head, "everything": everything}
    if adapter is not None:
        lm = load(source, dtype=dtype, device=place, dialect=dialect, adapter=adapter)
        found.model, found.steps = lm.name, lm.walk(tokens, **shown)
        return found
    weights = checkpoints.WeightsInOrder(checkpoint.weights)
    found.steps = walk(
        checkpoint.config,
        weights if place.type == "cpu" else WeightsOnDevice(weights, place),
        tokens,
        token_strings=found.token_strings,
        specials=tokenizer.specials,
        dialect=numerics.dialect(found.dialect, checkpoint.config.rounding),
        dtype=as_dtype(dtype),
        **shown,
    )
    return found


def example_prompt(checkpoint: Checkpoint) -> str:
    """A prompt that the model probably has an answer to."""
    llama3 = checkpoint.config.vocab_size == LLAMA3_VOCABULARY
    taught = checkpoint.folder.parent.name == "demos" and checkpoint.folder.name.startswith("demo")
    return LLAMA3_PROMPT if llama3 or taught else CODE_PROMPT


def outcome(step: Step, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the last two steps add to a walk's result; nothing for the steps before them."""
    if step.name == "logits":
        if not is_finite(step.value):
            warnings.warn(
                "the logits are not numbers (NaN, or infinite): the file is damaged, or the dtype "
                "too narrow; the first step above that has none says where",
                stacklevel=2,
            )
        shares = step.value.double().softmax(-1)  # of the last token: its row (V)
        likeliest = shares.topk(min(TOP, len(shares)))
        return {
            "top": [
                {"token": token, "text": tokenizer.token_string(token), "probability": share}
                for share, token in zip(*(part.tolist() for part in likeliest), strict=True)
            ]
        }
    if step.name == "next_token":
        token = int(step.value)
        return {"next_token": token, "next_text": tokenizer.token_string(token)}
    return {}


class WeightsOnDevice(Mapping[str, Tensor]):
    """Weights that are moved to `device` one at a time, each when it is asked for."""

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device) -> None:
        self.weights, self.device = weights, device

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name].to(self.device)

    def __contains__(self, name: object) -> bool:
        return name in self.weights  # asked often: without reading a tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)
