"""Linear layers at the speed of the machine: packed for oneDNN on a CPU, with activation and residual in one pass.

On a CPU torch multiplies with MKL, which repacks the weights in every call; oneDNN with weights packed once is
10 to 30 % faster at the sizes of these models, and it adds bias, activation and residual while the tile is in cache.
The packed weights are a copy. Elsewhere the weights stay the module's own.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

# transformers' names of activations to oneDNN's and torch's.
ACTIVATIONS = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}
PACKED_DTYPES = (torch.float32, torch.bfloat16)


class Linear:
    """`activation(x W^T + b)`, optionally plus a residual.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        activation: a key of `ACTIVATIONS`.
        pack: False shares the weights with the module in any case.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "none", *, pack: bool = True
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is unknown; known are {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self._bias = None if bias is None else bias.detach()
        self._weight = weight.detach()
        self.packed = pack and packable(weight)
        if self.packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight.contiguous())

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, factor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(rows, in) to (rows, out).

        Args:
            x: rows that follow one another in memory.
            residual: (rows, out) that is added, for a layer without activation.
            factor: (rows, out) that is multiplied with instead.
        """
        if self.packed:
            if factor is not None:
                return torch.ops.mkldnn._linear_pointwise.binary(x, factor, self._weight, self._bias, "mul")
            if residual is not None:
                return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
            name, how = ACTIVATIONS[self.activation]
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, name, [], how)
        if self.activation == "gelu_pytorch_tanh" and x.is_cuda and self._bias is not None:
            return torch._addmm_activation(self._bias, x, self._weight.t(), use_gelu=True)
        if residual is not None and self._bias is None:
            return torch.addmm(residual, x, self._weight.t())
        y = F.linear(x, self._weight, self._bias)
        if factor is not None:
            return y.mul_(factor)
        if residual is not None:
            return y.add_(residual)
        return activated(y, self.activation)


def activated(x: torch.Tensor, name: str) -> torch.Tensor:
    """Applies an activation of `ACTIVATIONS`."""
    if name == "silu":
        return F.silu(x, inplace=True)
    return F.gelu(x, approximate=ACTIVATIONS[name][1]) if name != "none" else x


def packable(weight: torch.Tensor) -> bool:
    """Whether oneDNN can take these weights here."""
    return weight.device.type == "cpu" and weight.dtype in PACKED_DTYPES and torch.backends.mkldnn.is_available()
