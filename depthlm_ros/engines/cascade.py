"""Attention of many short continuations to one shared prefix, and of each to itself.

Softmax over a joined key set splits: with `o, lse` of the prefix and `o', lse'` of the continuation,
the joint output is `lerp(o', o, sigmoid(lse - lse'))`, exactly. So the prefix's keys are stored and
read once for all continuations, as one matrix product with a very tall left side, and never copied
(cascade attention; Ye et al. 2024, and Juravsky et al., "Hydragen", arXiv 2402.05099).

Shapes: B continuations, T new tokens in each, S keys of each, P keys of the prefix, H query heads,
K key/value heads (H a multiple of K), D head size.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

# Runs of each backend when a shape first comes; the best one counts.
ROUNDS = 3

# (query, key, value, mask, causal) -> output (N, T, H, D) and log-sum-exp (N, T, H, 1) in float32.
Attention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, bool], tuple[torch.Tensor, torch.Tensor]
]

_LOWEST = torch.finfo(torch.float32).min


def matmul_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention with its log-sum-exp, on any device.

    Args:
        query: (N, T, H, D).
        key: (N, S, K, D).
        value: (N, S, K, D).
        mask: bool, broadcast to (N, T, S), True where a key is seen; None sees all.
        causal: token t sees keys up to t (S = T).

    Returns:
        (N, T, H, D) in the query's dtype and (N, T, H, 1) float32; of a token that sees nothing 0 and -inf, which
        `merge` gives no weight.
    """
    n, length, heads, size = query.shape
    seen, groups = key.shape[1], key.shape[2]
    share = heads // groups
    query = query.view(n, length, groups, share, size)
    output = torch.empty_like(query)
    total = torch.empty(n, length, groups, share, 1, dtype=torch.float32, device=query.device)
    # Group by group, because keys of several groups lie so that one product for all would copy them first.
    for group in range(groups):
        q = query[:, :, group].transpose(1, 2).reshape(n, share * length, size)
        # In float32 from here on, so that short formats don't round the scores.
        scores = (q.float() @ key[:, :, group].transpose(1, 2).float()).mul_(size**-0.5).view(n, share, length, seen)
        if causal:
            scores = scores.masked_fill_(_future(length, scores.device), -torch.inf)
        if mask is not None:
            scores = scores.masked_fill_(~mask[:, None], -torch.inf)
        sums = scores.logsumexp(-1, keepdim=True)
        # The clamp keeps a token that sees nothing from being -inf less -inf.
        weights = scores.sub_(sums.clamp(min=_LOWEST)).exp_().to(value.dtype).view(n, share * length, seen)
        output[:, :, group] = (weights @ value[:, :, group]).view(n, share, length, size).transpose(1, 2)
        total[:, :, group] = sums.transpose(1, 2)
    return output.view(n, length, heads, size), total.view(n, length, heads, 1)


class CpuFlash:
    """`matmul_attention` by torch's flash kernel for CPUs, which never writes the scores to memory."""

    def __init__(self) -> None:
        # What all layers of a pass are given is the same mask.
        self._masked: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `matmul_attention`."""
        bias = blind = None
        if mask is not None:
            bias, blind = self._bias(mask, query.dtype)
        output, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), 0.0, causal, attn_mask=bias
        )
        total = total.transpose(1, 2).unsqueeze(-1)
        if blind is not None:
            # The kernel says 0 for a token that sees nothing.
            total = total.masked_fill(blind, -torch.inf)
        return output.transpose(1, 2), total

    def _bias(self, mask: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is added to the scores, and the tokens that see nothing; None where all see something."""
        known = self._masked
        if known is None or known[0] is not mask or known[1].dtype != dtype:
            bias = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)[:, None]
            sees = mask.any(-1)
            known = self._masked = mask, bias, None if sees.all() else ~sees[..., None, None]
        return known[1], known[2]


def cuda_flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`matmul_attention` by the flash kernel of CUDA; masks and float32, which it doesn't take, go the plain way."""
    if mask is not None or query.dtype == torch.float32:
        return matmul_attention(query, key, value, mask, causal)
    share = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(share, 2) if share > 1 else x for x in (key, value))
    out = torch.ops.aten._scaled_dot_product_flash_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), 0.0, causal, False
    )
    return out[0].transpose(1, 2), out[1].transpose(1, 2).unsqueeze(-1)


def backends(device: torch.device) -> dict[str, Attention]:
    """What may run on this device, by name."""
    known: dict[str, Attention] = {"matmul": matmul_attention}
    if device.type == "cpu":
        known["flash"] = CpuFlash()
    if device.type == "cuda":
        known["flash"] = cuda_flash_attention
    return known


class Measured:
    """Attention by whichever backend is the fastest at such a shape, measured when one first comes.

    Args:
        device: where.

    Attributes:
        chosen: name of the backend for each kind of shape.
    """

    def __init__(self, device: torch.device) -> None:
        self._backends = backends(device)
        self._device = device
        self._times: dict[tuple[int, int, int, bool], dict[str, float]] = {}
        self.chosen: dict[tuple[int, int, int, bool], str] = {}

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `matmul_attention`."""
        kind = (*map(_bucket, (query.shape[0], query.shape[1], key.shape[1])), mask is not None)
        if kind not in self.chosen:
            self._measure(kind, query, key, value, mask, causal)
        return self._backends[self.chosen[kind]](query, key, value, mask, causal)

    def told(self) -> str:
        """What was measured, for people: batch x new tokens x keys, all rounded up to powers of two."""
        lines = [
            f"{n}x{t}x{s}{' masked' if masked else ''}: "
            + ", ".join(f"{name} {1e3 * time_s:.2f} ms" for name, time_s in times.items())
            for (n, t, s, masked), times in self._times.items()
        ]
        return "attention, the fastest of " + "; ".join(lines) if lines else "attention: nothing measured yet"

    def _measure(self, kind, query, key, value, mask, causal) -> None:
        times = {}
        for name, attention in self._backends.items():
            try:
                runs = [_seconds(attention, query, key, value, mask, causal, self._device) for _ in range(ROUNDS)]
            except RuntimeError:
                # A build without this kernel, a shape that it doesn't take, or memory that is short just now.
                continue
            times[name] = min(runs)
        self._times[kind] = times
        # Where nothing ran, what takes every shape is left.
        self.chosen[kind] = min(times, key=times.__getitem__, default="matmul")


def merge(ours: tuple[torch.Tensor, torch.Tensor], prefix: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Joins two attentions of the same queries over disjoint keys; (N, T, H, D)."""
    weight = torch.sigmoid(prefix[1] - ours[1]).to(ours[0].dtype)
    return torch.lerp(ours[0], prefix[0], weight)


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attention without log-sum-exp, shapes as in `matmul_attention`; (N, T, H, D)."""
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        is_causal=causal,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return output.transpose(1, 2)


def _future(length: int, device: torch.device) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def _bucket(length: int) -> int:
    return 1 << (length - 1).bit_length()


def _seconds(
    attention: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    device: torch.device,
) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    attention(query, key, value, mask, causal)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
