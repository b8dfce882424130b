"""The stored tensors of a model, and how a file at hand spells their names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from pellucid.families.config import family_of
from pellucid.families.names import Entry, Shape, buffers
from pellucid.models import ModelConfig

# Files of models with a text part begin its names so: transformers 4, transformers 5.
_WRAPPED = ("language_model.model.", "model.language_model.")


def table(config: ModelConfig) -> Iterator[Entry]:
    """Every stored tensor of a model with `config`, in the order of the forward pass."""
    return family_of(config.family, "config").entries(config)


def known_buffers(config: ModelConfig) -> Iterable[tuple[str, Shape | None]]:
    """Stored name and shape, None for any, of what old files hold beside the parameters."""
    return buffers(config, family_of(config.family, "config").names)


def left_out_prefix(config: ModelConfig, stored: Collection[str]) -> Callable[[str], str]:
    """From a name of `table` to what a file with the names `stored` calls the same tensor.

    Files of the bare model leave out ``model.`` or ``transformer.``, as the original GPT-2
    repository does; files of a model that also sees pictures put more before it.
    """
    prefix = family_of(config.family, "config").names.prefix
    wrapped = next((w for w in _WRAPPED if any(n.startswith(w) for n in stored)), None)
    if wrapped is not None:
        return lambda name: _within(name, prefix, wrapped, stored)
    if any(name.startswith(prefix) for name in stored):
        return lambda name: name
    return lambda name: name.removeprefix(prefix)


def _within(name: str, prefix: str, wrapped: str, stored: Collection[str]) -> str:
    if name.startswith(prefix):
        return wrapped + name.removeprefix(prefix)
    outer = f"language_model.{name}"  # the head
    return outer if outer in stored else name
