"""What dense depth is trained with: SILog, and a term for depth edges. Both compute in float32.

Predictions are read where the labels are, so that no label is moved, averaged or dropped; what is compared is the
natural logarithm of both.
"""

from __future__ import annotations

import torch

SILOG_LAMBDA = 0.5  # DepthVLM (arXiv 2605.15876); 0 punishes scale fully, 1 not at all
SILOG_FLOOR = 1e-8  # DepthVLM's; keeps the root's slope finite where nothing is wrong any more
GRADIENT_SCALES = 4  # Li and Snavely, MegaDepth (arXiv 1804.00607)


def read_map(depth_map: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Reads a map between its pixels, as `depthlm_ros.map_reading` does at inference; gradients flow to the map.

    Args:
        depth_map: (H, W).
        places: (N, 2) `(u, v)`, whole numbers at pixel centres; beyond the outer centres the border's value holds.

    Returns:
        (N,) bilinear values.
    """
    height, width = depth_map.shape
    last = places.new_tensor([width - 1, height - 1])
    safe = places.clamp(min=0).minimum(last)
    low = safe.floor()
    right, below = (safe - low).unbind(1)
    (u0, v0), (u1, v1) = low.long().unbind(1), (low + 1).minimum(last).long().unbind(1)
    flat = depth_map.reshape(-1)
    above = torch.lerp(flat[v0 * width + u0], flat[v0 * width + u1], right)
    under = torch.lerp(flat[v1 * width + u0], flat[v1 * width + u1], right)
    return torch.lerp(above, under, below)


def log_ratio(predicted_m: torch.Tensor, true_m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) float32 ln(predicted / true), and (N,) bool where both are above zero; 0 elsewhere.

    A prediction of exactly 0 m (Softplus gives it far below zero) has no logarithm and is left out, as published.
    """
    predicted_m, true_m = predicted_m.float(), true_m.float()
    good = (predicted_m > 0) & (true_m > 0)
    ratio = torch.where(good, predicted_m, 1.0).log() - torch.where(good, true_m, 1.0).log()
    return ratio, good


def silog(ratio: torch.Tensor, good: torch.Tensor, lam: float = SILOG_LAMBDA) -> torch.Tensor:
    """Scale-invariant logarithmic error of one image: sqrt(mean(d^2) - lam mean(d)^2 + 1e-8).

    Eigen et al. 2014 (arXiv 1406.2283), with the root as DepthVLM takes it.

    Args:
        ratio: (N,) d = ln(predicted / true), 0 where it doesn't count.
        good: (N,) bool, what counts.
        lam: how much of a common error of scale is forgiven.

    Returns:
        A number; 1e-4 where nothing counts.
    """
    count = good.sum().clamp(min=1)
    mean = ratio.sum() / count
    # Not mean(d^2) - mean(d)^2 in one go: their difference is small where the error is mostly one of scale.
    spread = torch.where(good, ratio - mean, 0.0).square().sum() / count
    return (spread + (1 - lam) * mean.square() + SILOG_FLOOR).sqrt()


def gradient_term(
    ratio: torch.Tensor, good: torch.Tensor, grid: torch.Tensor, scales: int = GRADIENT_SCALES
) -> torch.Tensor:
    """How much the error changes from label to label: edges at the wrong place and slanted planes, not scale.

    The multi-scale scale-invariant gradient matching of MegaDepth (arXiv 1804.00607): the mean of |d(x + s) - d(x)|
    over neighbours to the right and below, at every s-th cell, s = 1, 2, 4, ...; then the mean over scales.

    Args:
        ratio: (N,) d = ln(predicted / true).
        good: (N,) bool, what counts.
        grid: (h, w) int, the number of each cell's label; -1 where there is none.
        scales: how many.
    """
    known = (grid >= 0) & good[grid]
    field = torch.where(known, ratio[grid], 0.0)
    total = ratio.new_zeros(())
    for scale in range(scales):
        values, there = field[:: 2**scale, :: 2**scale], known[:: 2**scale, :: 2**scale]
        change, pairs = ratio.new_zeros(()), 0
        for axis in (0, 1):
            both = there.narrow(axis, 1, there.shape[axis] - 1) & there.narrow(axis, 0, there.shape[axis] - 1)
            change = change + torch.where(both, values.diff(dim=axis), 0.0).abs().sum()
            pairs = pairs + both.sum()
        total = total + change / pairs.clamp(min=1)
    return total / scales
