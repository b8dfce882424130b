"""A trained model with another vocabulary: each new token begins as the old tokens that spell it.

    old   " M" "ary"        new   " Mary"  =  the mean of the two rows

So the blocks go on as they are: heads that look at the token before, or copy, find what they know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pellucid.models import Config
from pellucid.tokenizers import Tokenizer

_BY_TOKEN = ("embed.weight", "unembed.weight", "unembed.bias")  # a row for each token


def with_vocabulary(
    config: Config, weights: Mapping[str, Tensor], old: Tokenizer, new: Tokenizer
) -> tuple[Config, dict[str, Tensor]]:
    """The config and the weights of the same model for the `new` tokenizer.

    A token of the same bytes keeps its row, a special token that of the same name; any other has
    the mean of the rows whose tokens `old` writes its text with.
    """
    spelt = spellings(old, new)
    found = dict(weights)
    for name in _BY_TOKEN:
        if name in found:
            rows = found[name].float()
            found[name] = torch.stack([rows[ids].mean(0) for ids in spelt]).to(found[name].dtype)
    return replace(config, vocab_size=new.vocab_size), found


def spellings(old: Tokenizer, new: Tokenizer) -> list[list[int]]:
    """For each token of `new`, in order, the tokens of `old` that spell it.

    ValueError for a token that `old` has no bytes for.
    """
    same = {old.decode_bytes([id]): id for id in range(old.vocab_size) if id not in old.unused_ids}
    specials = {id: name for name, id in new.specials.items()}
    found = []
    for id in range(new.vocab_size):
        if specials.get(id) in old.specials:
            found.append([old.specials[specials[id]]])
            continue
        data = new.decode_bytes([id])
        found.append([same[data]] if data in same else _encode(old, data, same))
        if not found[-1]:
            raise ValueError(f"the old tokenizer cannot write token {id} of the new one, {data!r}")
    return found


def _encode(old: Tokenizer, data: bytes, same: Mapping[bytes, int]) -> list[int]:
    """Bytes in old tokens; those of a cut character one by one."""
    try:
        return old.encode(data.decode("utf-8"))
    except UnicodeDecodeError:
        return [same[bytes([byte])] for byte in data if bytes([byte]) in same]
