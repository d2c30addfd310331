"""AdamW with a warm-up, and gradients that are scaled and clipped once a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from depthlm_training.parallel import whole

if TYPE_CHECKING:
    from depthlm_training.objective import TrainSettings


def adamw(weights: Sequence[nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over weights that lie where they will stay; only matrices decay."""
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    fused = weights[0].device.type == "cuda"
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=settings.lr, betas=settings.betas, fused=fused)


def rate(settings: TrainSettings, step: int) -> float:
    """The learning rate of a step, the first being 0."""
    rising = math.ceil(settings.warmup * settings.steps)
    if step < rising:
        return settings.lr * (step + 1) / rising
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * (1 + math.cos(math.pi * (step - rising) / (settings.steps - rising))) / 2


def gradient_norm(weights: Sequence[nn.Parameter]) -> float:
    """The norm of the whole gradient, all shards together; 0 where there is none."""
    gradients = [w.grad for w in weights if w.grad is not None]
    return whole(nn.utils.get_total_norm(gradients)).item() if gradients else 0.0


def apply(optimizer: torch.optim.Optimizer, lr: float, factor: float) -> None:
    """Multiplies gradients by a factor, does a step, and clears them."""
    gradients = [w.grad for group in optimizer.param_groups for w in group["params"] if w.grad is not None]
    torch._foreach_mul_(gradients, factor)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def step_seed(seed: int, step: int, rank: int) -> int:
    """What seeds the random numbers of a step in a process (dropout): none of them has to be stored."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
