"""Products in bfloat16 that keep no copy of a weight from the forward pass to the backward pass.

Autocast makes a bfloat16 copy of each matrix and saves it for the backward pass, so that all of
them are held at once, a quarter of the weights again; and it casts the same activations anew for
queries, keys and values. Here each copy goes after its product and is made again for its gradients,
which costs one reading of the weight. The numbers are autocast's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class LeanProducts(TorchFunctionMode):
    """While it is open, inside autocast, every `F.linear` with float32 weights is one of these."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.dtype = dtype
        self._last: tuple[Tensor, Tensor] | None = None  # activations, and the same cast

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """`func`, or ours in place of a linear map."""
        if func is not F.linear or kwargs or torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        x: Tensor = args[0]
        weight: Tensor = args[1]
        bias: Tensor | None = args[2] if len(args) > 2 else None
        ordinary = not hasattr(weight, "device_mesh")  # else it is a part of one, on a rank
        if not ordinary or weight.dtype != torch.float32 or not torch.is_grad_enabled():
            return func(*args)
        if self._last is None or self._last[0] is not x:
            self._last = (x, x.detach().to(self.dtype))
        return _Linear.apply(x, self._last[1], weight, bias)

    def __exit__(self, *exception: Any) -> None:
        self._last = None
        super().__exit__(*exception)


class _Linear(torch.autograd.Function):
    """x (…, in), the same narrow, weight (out, in), bias (out) in float32 -> (…, out), narrow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, narrow: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(narrow, weight)
        ctx.dtype, ctx.bias = x.dtype, bias is not None
        rows = narrow.flatten(0, -2)
        matrix = weight.to(narrow.dtype).t()
        out = rows @ matrix if bias is None else torch.addmm(bias.to(narrow.dtype), rows, matrix)
        return out.view(*narrow.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        narrow, weight = ctx.saved_tensors
        rows = grads[0].flatten(0, -2)  # (N, out)
        for_x, _, for_weight, for_bias = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if for_x:
            grad_x = (rows @ weight.to(rows.dtype)).view_as(narrow).to(ctx.dtype)
        if for_weight:
            grad_weight = (rows.t() @ narrow.flatten(0, -2)).to(weight.dtype)
        if ctx.bias and for_bias:
            grad_bias = rows.sum(0).to(weight.dtype)
        return grad_x, None, grad_weight, grad_bias
