"""The loop that every stage runs in: batches by step, averaged weights, states that survive an interruption."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from depthlm_training.demo.optim import Average, Optimizer, Schedule, load_state, save_state
from depthlm_training.demo.stages import Stage


class Steps(Dataset):
    """`make(step)` for the steps from `first` on."""

    def __init__(self, make: Callable[[int], Any], first: int, steps: int) -> None:
        self.make, self.first, self.steps = make, first, steps

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, i: int) -> Any:
        return self.make(self.first + i)


def run_stage(
    stage: Stage,
    module: nn.Module,
    make: Callable[[int], Any],
    loss: Callable[[Any, int], torch.Tensor],
    measure: Callable[[], Mapping[str, float]],
    run: Path,
    workers: int = 0,
) -> None:
    """Runs or resumes a stage; the module ends with the averaged weights.

    Args:
        module: everything that is trained. `run/NAME.safetensors` holds its state, `run/NAME.jsonl` its course.
        make: a step's batch, the same however often the run was interrupted.
        loss: of a batch and its step.
        measure: what the course says of the averaged weights beside the loss.
        workers: processes that make batches ahead; 0 makes them in between, which is best on one core.
    """
    state = run / f"{stage.name}.safetensors"
    average = Average(module, stage.average)
    whole = nn.ModuleDict({"module": module, "average": average})
    optimizer = Optimizer(module, Schedule(stage.steps, decay=stage.decay), stage.muon_lr, stage.adamw_lr)
    done = load_state(state, whole, optimizer) if state.exists() else 0
    run.mkdir(parents=True, exist_ok=True)
    losses, began = [], time.time()
    batches = DataLoader(
        Steps(make, done, stage.steps), batch_size=None, num_workers=workers, collate_fn=lambda batch: batch
    )
    with (
        (run / f"{stage.name}.jsonl").open("a") as log,
        tqdm(total=stage.steps, initial=done, desc=stage.name, mininterval=5) as bar,
    ):
        for step, batch in enumerate(batches, done):
            value = loss(batch, step)
            value.backward()
            optimizer.step(step)
            average.update(module)
            losses.append(value.item())
            bar.update()
            if (step + 1) % stage.save_every == 0 or step + 1 == stage.steps:
                save_state(state, whole, optimizer, step + 1)
                with average.in_place_of(module):
                    measured = measure()
                row = {
                    "step": step + 1,
                    "images": (step + 1) * stage.batch,
                    "loss": float(np.mean(losses)),
                    "seconds": time.time() - began,
                    **measured,
                }
                losses.clear()
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if isinstance(v, float) and k != "seconds"})
    average.copy_to(module)
