"""Which parameters a fine-tuning run changes."""

from __future__ import annotations

from pellucid.models import Model


def train_last_blocks(model: Model, blocks: int) -> None:
    """Freeze all but the last so many blocks and, if there are any, the norm after them.

    0 blocks freeze the whole model, for a head that is added to it. ValueError for more blocks than
    there are.
    """
    if not 0 <= blocks <= len(model.layers):
        raise ValueError(f"{blocks} blocks to train: the model has {len(model.layers)}")
    model.requires_grad_(False)
    if blocks:
        model.norm.requires_grad_(True)
        for layer in list(model.layers)[len(model.layers) - blocks :]:
            layer.requires_grad_(True)


def trainable(model: Model) -> tuple[int, int]:
    """Parameters that are trained, and all there are; tied ones count once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
