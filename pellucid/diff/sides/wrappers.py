"""What wraps a module for compiling, for several ranks or for an adapter, taken off its names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from pellucid.checkpoints.wrappers import KEPT_UNDER

_ADAPTED = "base_layer"  # where PEFT keeps the layer that an adapter changes


def plain_name(path: str) -> str:
    """A path without the parts that wrappers add, wherever they stand."""
    return ".".join(part for part in path.split(".") if part not in KEPT_UNDER)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DDP, FSDP, torch.compile and PEFT, however often it is wrapped."""
    while True:
        inner = _inside(module)
        if inner is None:
            return module
        module = inner


def gathered_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights of the module inside; FSDP's own wrapper alone can give whole ones by name."""
    while (inner := _inside(module)) is not None:
        if inner is getattr(module, "_fsdp_wrapped_module", None):
            break
        module = inner
    return plain_weights(module)


def _inside(module: nn.Module) -> nn.Module | None:
    children = dict(module.named_children())
    for name in KEPT_UNDER:
        if name in children:
            return children[name]
    if type(module).__name__ in ("DistributedDataParallel", "DataParallel"):
        return children["module"]
    base = getattr(module, "get_base_model", None)
    if hasattr(module, "peft_config") and callable(base):
        found = base()
        return found if isinstance(found, nn.Module) and found is not module else None
    return None


def plain_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of `root` but wrappers and what belongs to adapters, under its plain path."""
    adapted: list[str] = []
    for path, module in root.named_modules():
        if any(path.startswith(layer) for layer in adapted):
            continue
        children = {name for name, _ in module.named_children()}
        if _ADAPTED in children:
            adapted.append(f"{path}.")
        if not children & set(KEPT_UNDER):
            yield plain_name(path), module


def plain_weights(root: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of `root` as it computes with them, under their plain names.

    Adapters are added to the weights they change; shards of FSDP are gathered. Tied ones are there
    under each of their names.
    """
    found: dict[str, Tensor] = {}
    adapted = [path for path, module in root.named_modules() if _is_adapted(module)]
    for name, tensor in root.state_dict(keep_vars=True).items():
        if any(name.startswith(f"{path}.") for path in adapted) or not isinstance(tensor, Tensor):
            continue
        found[plain_name(name)] = _whole(tensor)
    for path in adapted:
        layer: Any = root.get_submodule(path)
        for kind, tensor in layer.base_layer.named_parameters(recurse=False):
            whole = _whole(tensor)
            found[f"{plain_name(path)}.{kind}"] = whole
            if kind == "weight" and not layer.merged and not layer.disable_adapters:
                for adapter in layer.active_adapters:
                    if adapter in layer.lora_A:
                        whole = whole + layer.get_delta_weight(adapter).to(whole.dtype).detach()
                found[f"{plain_name(path)}.{kind}"] = whole
    return found


def _is_adapted(module: nn.Module) -> bool:
    return any(name == _ADAPTED for name, _ in module.named_children())


def _whole(tensor: Tensor) -> Tensor:
    gather: Any = getattr(tensor, "full_tensor", None)  # of a DTensor
    return (tensor if gather is None else gather()).detach()
