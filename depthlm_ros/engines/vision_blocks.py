"""What vision towers are made of: norms, rotary attention over whole images or windows, and their layers.

Images of one size are one (B, N, C) batch, kept as (B * N, C) rows between the layers, so that attention needs no mask
and no splits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from depthlm_ros.engines.linear import Linear

Rows = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Windows:
    """Windows of one shape, which follow one another in the order of tokens.

    Attributes:
        start: first token.
        count: number of windows.
        length: tokens of each.
    """

    start: int
    count: int
    length: int


@dataclass(frozen=True)
class Turns:
    """Rotary angles of each token, as the attention of this device takes them.

    Attributes:
        cos: (N, 1, 1, D / 2).
        sin: likewise.
        unit: (N, 1, 1, D / 2) complex, both in one.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    unit: torch.Tensor

    @classmethod
    def of(cls, angles: torch.Tensor) -> Turns:
        """From (N, D / 2) float32 angles."""
        angles = angles[:, None, None]
        return cls(angles.cos(), angles.sin(), torch.polar(torch.ones_like(angles), angles))

    def at(self, tokens: torch.Tensor) -> Turns:
        """The angles of some tokens, of any shape."""
        return Turns(self.cos[tokens], self.sin[tokens], self.unit[tokens])


class Projection:
    """Rows to queries, keys and values, turned by their positions.

    Args:
        weights: one (3 C, C) weight, or one (C, C) for each of q, k and v.
        biases: likewise, or None.
        heads: number of heads.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None, heads: int) -> None:
        biases = biases or [None] * len(weights)
        self.heads = heads
        first = Linear(weights[0], biases[0])
        self._paired = first.packed
        if self._paired:
            # Where a copy is made anyway, the two halves that turn together are laid side by side: they are then a
            # complex number, turned by one product in place. Queries and keys are mixed alike, so scores don't change.
            weight = torch.cat([w.detach() for w in weights])
            order = _paired_order(len(weight) // 3, heads, weight.device)
            bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])[order]
            self._linears = [Linear(weight[order], bias)]
        else:
            self._linears = [Linear(w, b) for w, b in zip(weights, biases, strict=True)]

    def __call__(self, x: torch.Tensor, batch: int, turns: Turns) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B * N, C) to three (B, N, H, D)."""
        if len(self._linears) == 1:
            qkv = self._linears[0](x).view(batch, -1, 3, self.heads, x.shape[-1] // self.heads)
            turned = self._turn(qkv[:, :, :2], turns)
            return turned[:, :, 0], turned[:, :, 1], qkv[:, :, 2]
        q, k, v = (linear(x).view(batch, -1, 1, self.heads, x.shape[-1] // self.heads) for linear in self._linears)
        return self._turn(q, turns)[:, :, 0], self._turn(k, turns)[:, :, 0], v[:, :, 0]

    def _turn(self, x: torch.Tensor, turns: Turns) -> torch.Tensor:
        if self._paired:
            pairs = x.float().unflatten(-1, (-1, 2))
            torch.view_as_complex(pairs).mul_(turns.unit)
            return pairs.flatten(-2) if x.dtype == torch.float32 else x.copy_(pairs.flatten(-2))
        halves = x.float().unflatten(-1, (2, -1))
        out = torch.empty_like(halves)
        (a, b), (left, right) = halves.unbind(-2), out.unbind(-2)
        torch.mul(a, turns.cos, out=left).addcmul_(b, turns.sin, value=-1)
        torch.mul(b, turns.cos, out=right).addcmul_(a, turns.sin)
        return out.flatten(-2).to(x.dtype)


def _paired_order(width: int, heads: int, device: torch.device) -> torch.Tensor:
    """(3 C,) rows of a q, k, v weight in which value i of a head's q and k is followed by value i + D / 2."""
    rows = torch.arange(3 * width, device=device).view(3, heads, 2, -1)
    paired = rows[:2].transpose(2, 3).reshape(-1)
    return torch.cat([paired, rows[2].reshape(-1)])


@dataclass(frozen=True)
class Layer:
    """One layer of a tower.

    Attributes:
        norm: before attention.
        project: to queries, keys and values.
        output: after attention; adds the residual.
        mlp_norm: before the MLP.
        mlp: rows and residual to rows.
        windowed: whether a token sees its window only.
    """

    norm: Rows
    project: Projection
    output: Linear
    mlp_norm: Rows
    mlp: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    windowed: bool = False

    def __call__(
        self, x: torch.Tensor, batch: int, turns: Turns, windows: Sequence[Windows], seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B * N, C) to (B * N, C).

        Args:
            x: the tokens of B images, or of B windows.
            batch: B.
            turns: of the N tokens.
            windows: of an image, used where the layer is `windowed`; empty for none.
            seen: (B, 1, 1, N) bool, which tokens are there where a batch's windows differ in length.
        """
        q, k, v = self.project(self.norm(x), batch, turns)
        if self.windowed and windows:
            attended = windowed_attention(q, k, v, windows)
        else:
            attended = attention(q, k, v, seen)
        return self.finish(x, attended)

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What follows attention: (B * N, C) residual and (B, N, H, D) to (B * N, C)."""
        x = self.output(attended.reshape(x.shape), x)
        return self.mlp(self.mlp_norm(x), x)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Each image's tokens to each other: (B, N, H, D) to the same."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def windowed_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, windows: Sequence[Windows]) -> torch.Tensor:
    """Each window's tokens to each other, for tokens that are ordered by window."""
    parts = []
    for some in windows:
        inside = slice(some.start, some.start + some.count * some.length)
        cut = [x[:, inside].reshape(-1, some.length, *x.shape[2:]) for x in (q, k, v)]
        parts.append(attention(*cut).reshape(len(q), -1, *q.shape[2:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def layer_norm(norm: torch.nn.LayerNorm) -> Rows:
    """Over the last dimension, with the module's weights."""
    return lambda x: F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def rms_norm(weight: torch.Tensor, eps: float) -> Rows:
    """Over the last dimension."""
    return lambda x: F.rms_norm(x, weight.shape, weight, eps)


def plain_mlp(up: torch.nn.Linear, down: torch.nn.Linear, activation: str) -> Callable:
    """`down(activation(up(x)))`, plus a residual where one is given."""
    widen, narrow = Linear(up.weight, up.bias, activation), Linear(down.weight, down.bias)
    return lambda x, residual=None: narrow(widen(x), residual)


def gated_mlp(gate: torch.nn.Linear, up: torch.nn.Linear, down: torch.nn.Linear, activation: str) -> Callable:
    """`down(activation(gate(x)) * up(x))` plus a residual."""
    open_, widen, narrow = Linear(gate.weight, gate.bias, activation), Linear(up.weight, up.bias), Linear(
        down.weight, down.bias)  # fmt: skip
    return lambda x, residual=None: narrow(open_(x).mul_(widen(x)), residual)
