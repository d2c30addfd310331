"""A small training, for tests and for the processes that they start.

    python tests/toy_training.py RUN [key=value ...]     key: of TrainSettings
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import conftest  # noqa: F401  names depthlm_training in a checkout
import numpy as np
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from depthlm_ros.errors import DepthLMError
from depthlm_training.config import load
from depthlm_training.trainer import Loss, TrainSettings, train

WIDTH = 12


class Layer(GradientCheckpointingLayer):
    """A layer as transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(torch.tanh(self.inner(self.norm(x))))


class Toy(nn.Module):
    """Two layers and a head; the first weights are frozen, as a vision tower would be."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(5, WIDTH).requires_grad_(False)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.frozen(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)[..., 0]


@dataclass(frozen=True)
class Make:
    """Micro-batch k: another number of rows for each k; `nan_from` on, no number."""

    nan_from: int = 1 << 30

    def __call__(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([7, k])
        x = rng.normal(size=(1 + k % 5, 5)).astype(np.float32)
        if k >= self.nan_from:
            x[0] = np.nan
        return x, np.sin(x.sum(1))


class ToyObjective:
    """Regression, the mean over rows."""

    bad_rows = None

    def __init__(self, make=None, dropout: float = 0.1, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = Toy()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        self.make = make or Make()

    def loss(self, batch: tuple[np.ndarray, np.ndarray], device: torch.device) -> Loss:
        x, y = (torch.from_numpy(part).to(device) for part in batch)
        error = self.model(x).float() - y
        return Loss(
            (error**2).sum(),
            len(x),
            {"absolute": (error.detach().abs().sum(), len(x))},
            tokens=len(x),
            images=1,
            waste=0.25,
            flop=1000 * len(x),
        )

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def settings(*arguments: str, **values: object) -> TrainSettings:
    """Few steps, without a warm-up that would hide differences; keywords in Python, arguments as key=value."""
    defaults = {"steps": 6, "micro_batches": 4, "lr": 1e-2, "warmup": 0.0, "log_every": 1, "checkpoint_every": 100}
    return load(TrainSettings, [*(f"{k}={v}" for k, v in {**defaults, "device": "cpu", **values}.items()), *arguments])


def main() -> int:
    """As the commands of depthlm_training do it; `dropout=` and `nan_from=` are the toy's own."""
    run, *arguments = sys.argv[1:]
    own = {key: [a.split("=")[1] for a in arguments if a.startswith(f"{key}=")] for key in ("dropout", "nan_from")}
    rest = [a for a in arguments if a.partition("=")[0] not in own]
    objective = ToyObjective(Make(*map(int, own["nan_from"])), *map(float, own["dropout"]))
    try:
        train(objective, settings(*rest), Path(run), resume=True)
    except DepthLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
