"""What a training is asked to do (`Objective`), with what settings, and what a micro-batch comes to (`Loss`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from depthlm_ros.errors import ConfigError
from depthlm_training.rows import BadRows


@dataclass(frozen=True)
class TrainSettings:
    """What every training is run with, whatever it teaches.

    Attributes:
        steps: optimiser steps of the whole run.
        micro_batches: micro-batches of a step, over all processes together; a multiple of their number.
        lr: largest learning rate.
        schedule: cosine goes down to 0 at the last step, constant stays.
        warmup: share of the steps over which the rate rises, linearly.
        clip: largest norm of the gradient; 0 does not clip.
        weight_decay: AdamW's, on matrices only.
        betas: AdamW's.
        dtype: number format of products and of frozen weights; trained ones, gradients and moments are float32.
        checkpoint_every: steps between checkpoints; there is always one after the last step.
        keep: checkpoints that are kept, the newest ones.
        workers: processes that make micro-batches, for each training process; 0 makes them in the loop.
        seed: of the order of the data, of its making and of dropout.
        device: cpu, cuda, or auto: cuda where there is one.
        parallel: none for one process. Under torchrun: ddp, every process has the whole model; fsdp2, weights,
            gradients and moments are sharded over all; hybrid, sharded over a host's processes, the same on each host.
        log_every: steps between rows of the course.
        bad_rows: rows that may be bad before the run ends: below 1 a share of all rows, else a number.

    Raises:
        ConfigError: a value out of range.
    """

    steps: int = 1000
    micro_batches: int = 1
    lr: float = 1e-5
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.1
    clip: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: int = 500
    keep: int = 2
    workers: int = 0
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallel: Literal["none", "ddp", "fsdp2", "hybrid"] = "none"
    log_every: int = 10
    bad_rows: float = 0.01

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batches", "checkpoint_every", "keep", "log_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("lr", "clip", "weight_decay", "workers", "seed", "bad_rows"):
            _at_least(name, getattr(self, name), 0)
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup is {self.warmup}; give a share from 0 to 1")


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ConfigError(f"{name} is {value}; give at least {least}")


@dataclass(frozen=True)
class Loss:
    """What a micro-batch came to.

    Attributes:
        total: () sum of the loss over the units, float32, with its graph. The step's loss is the sum of `total`
            divided by the sum of `units`, over all its micro-batches and processes.
        units: what the loss is a mean over: supervised tokens, or images.
        parts: for the course: name -> (sum, number it is a mean over), detached; the same names in every micro-batch.
        tokens: through the language model, padding left out.
        images: encoded.
        waste: share of the rows that is padding.
        flop: multiplications and additions of a forward and backward pass (`throughput.training_flop`); 0: not counted.
    """

    total: torch.Tensor
    units: int
    parts: Mapping[str, tuple[torch.Tensor, int]] = field(default_factory=dict)
    tokens: int = 0
    images: int = 0
    waste: float = 0.0
    flop: int = 0


class Objective(Protocol):
    """What is taught: a model, the data and a loss.

    Attributes:
        model: what is trained; parameters that aren't have `requires_grad` off. Use submodules through their
            forward: under fsdp2 a weight outside it is a shard, and every micro-batch has to run the same modules.
        make: builds micro-batch k on the CPU, often in another process: a pure function of k, picklable, and without
            the model (a frozen dataclass with `__call__`, say).
        bad_rows: of the mixture that `make` draws from; None where no row can be bad.
    """

    model: nn.Module
    make: Callable[[int], Any]
    bad_rows: BadRows | None

    def loss(self, batch: Any, device: torch.device) -> Loss:
        """Moves a micro-batch to the device and computes its loss; runs under autocast to `dtype`."""

    def save(self, folder: Path) -> None:
        """Writes a checkpoint folder that the engine loads."""
