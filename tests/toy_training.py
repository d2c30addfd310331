"""A small training, for tests and for the processes that they start.

python tests/toy_training.py FOLDER [key=value ...]     of TrainSettings, and dropout=, slow_from=, ways=
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import conftest  # noqa: F401  names depthlm_training in a checkout
import numpy as np
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from depthlm_training.config import load
from depthlm_training.parallel import end_process
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
    """Micro-batch k: another number of rows for each k; from some k on without a number, or not for a long time."""

    nan_from: int = 1 << 30
    slow_from: int = 1 << 30

    def __call__(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([7, k])
        x = rng.normal(size=(1 + k % 5, 5)).astype(np.float32)
        if k >= self.nan_from:
            x[0] = np.nan
        if k >= self.slow_from:
            time.sleep(3600)
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


def main() -> None:
    """Trains once; under torchrun once for each of `ways`, a value of `parallel`, and after a colon how many steps."""
    folder, *arguments = sys.argv[1:]
    given = dict(argument.split("=") for argument in arguments)
    dropout = float(given.pop("dropout", 0.1))
    make = Make(slow_from=int(given.pop("slow_from", 1 << 30)))
    if "ways" not in given:
        train(ToyObjective(make, dropout), settings(**given), Path(folder))
        return
    # One group for all: a second one of the same torchrun would find the first one's addresses.
    torch.distributed.init_process_group("gloo")
    for way in given.pop("ways").split(","):
        parallel, _, steps = way.partition(":")
        how = settings(**{**given, "parallel": parallel, "steps": steps or 6})
        train(ToyObjective(make, dropout), how, Path(folder) / parallel, resume=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    end_process(0)
