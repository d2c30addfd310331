"""Muon for matrices, AdamW for the rest, one trapezoid for both; states that survive an interruption."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


@dataclass(frozen=True)
class Schedule:
    """Learning rate: up over `warmup` steps, flat, then linearly down to 0 over the last `decay` share (0: not)."""

    steps: int
    warmup: int = 50
    decay: float = 0.4

    def factor(self, step: int) -> float:
        down = (self.steps - step) / (self.decay * self.steps) if self.decay else 1.0
        return min(1.0, (step + 1) / self.warmup, down)


class Optimizer:
    """Muon (RMS matched to AdamW, so one rate scale serves both) on hidden matrices, AdamW on everything else."""

    def __init__(
        self, module: nn.Module, schedule: Schedule, muon_lr: float, adamw_lr: float, clip: float = 1.0
    ) -> None:
        self.module, self.schedule, self.clip = module, schedule, clip
        matrices, rest = [], []
        for name, p in module.named_parameters():
            # Muon is for hidden matrices; the mergers' 768 x 768 ones would take half of a step to orthogonalise.
            hidden = p.ndim == 2 and "embed" not in name and "merger" not in name and not name.endswith("mlp.2.weight")
            (matrices if hidden else rest).append(p)
        self.parts = [
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rates = (muon_lr, adamw_lr)

    def step(self, step: int) -> float:
        """Applies the gradients that were accumulated and clears them; returns their norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * self.schedule.factor(step)
            part.step()
            part.zero_grad(set_to_none=True)
        return float(norm)


class Average(nn.Module):
    """A running mean of a module's parameters: nearly what a learning rate that goes to zero makes of them.

    Args:
        module: whose parameters to follow.
        half_life: steps after which a step's weights count half.
    """

    def __init__(self, module: nn.Module, half_life: float) -> None:
        super().__init__()
        self.share = 1 - 0.5 ** (1 / half_life)
        self.values = nn.ParameterList([nn.Parameter(p.detach().clone(), False) for p in module.parameters()])

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        for value, p in zip(self.values, module.parameters(), strict=True):
            value.lerp_(p, self.share)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for p, value in zip(module.parameters(), self.values, strict=True):
            p.copy_(value)

    @contextmanager
    def in_place_of(self, module: nn.Module) -> Iterator[None]:
        """The module has the mean's values within the block."""
        own = [p.detach().clone() for p in module.parameters()]
        self.copy_to(module)
        yield
        with torch.no_grad():
            for p, value in zip(module.parameters(), own, strict=True):
                p.copy_(value)


def save_state(path: Path, module: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Weights, optimiser states and position in one safetensors file, replaced atomically."""
    tensors = {f"module.{k}": v.detach().contiguous().clone() for k, v in module.state_dict().items()}
    for i, part in enumerate(optimizer.parts):
        for j, state in part.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{i}.{j}.{key}"] = value.contiguous().clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"step": str(step)})
    os.replace(part, path)


def load_state(path: Path, module: nn.Module, optimizer: Optimizer | None = None) -> int:
    """Restores what `save_state` wrote; returns the number of steps that were done."""
    from safetensors import safe_open

    tensors = load_file(path)
    module.load_state_dict({k.removeprefix("module."): v for k, v in tensors.items() if k.startswith("module.")})
    if optimizer is not None:
        for i, part in enumerate(optimizer.parts):
            whole = part.state_dict()
            for name, value in tensors.items():
                if name.startswith(f"optimizer.{i}."):
                    _, _, j, key = name.split(".")
                    whole["state"].setdefault(int(j), {})[key] = value
            part.load_state_dict(whole)
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])
