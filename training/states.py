"""Checkpoints of a run: weights, optimiser and position, whole or not there at all.

    run/step-00000500/weights.safetensors      what is trained, and buffers
                      optimizer.safetensors    moments and step counts, by the weights' names
                      position.json            step, next micro-batch, sums of the course, settings

A folder is written under another name, brought to the disk, and renamed; whatever is called step-... is complete.
The random numbers of a step are a function of the seed and the step, so there is no generator to store. Sharded
tensors are gathered on the first process, one at a time, so a run goes on with another number of processes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from depthlm_ros.errors import TrainingError
from depthlm_training.parallel import Processes, put, whole

WEIGHTS, OPTIMIZER, POSITION = "weights.safetensors", "optimizer.safetensors", "position.json"
_NAME, _UNFINISHED = "step-", ".unfinished-"


class Checkpoints:
    """The checkpoints of a run.

    Args:
        run: their folder; every process has to see it.
        keep: how many, the newest ones.
        processes: who takes part; the first one writes.
    """

    def __init__(self, run: Path, keep: int, processes: Processes) -> None:
        self._run, self._keep, self._processes = run, keep, processes

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, position: Mapping[str, Any]) -> Path:
        """Writes a checkpoint, then removes the oldest; all processes have to call.

        Args:
            model: whose trained weights and buffers are written.
            optimizer: of these weights.
            step: steps that are done.
            position: what `load` returns, as JSON.

        Raises:
            TrainingError: it could not be written.
        """
        files = {WEIGHTS: self._gathered(trained(model)), OPTIMIZER: self._gathered(_moments(model, optimizer))}
        error = None
        if self._processes.first:
            try:
                _write(self._run, step, files, position)
                self._prune()
            except (OSError, SafetensorError) as caught:
                error = caught
        if self._processes.sum([error is not None]) != [0]:
            raise TrainingError(
                f"the checkpoint of step {step} could not be written to {self._run}: {error}"
            ) from error
        return self._run / folder_name(step)

    def load(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Restores what `save` wrote, and returns its position.

        Raises:
            TrainingError: the checkpoint is of another model.
        """
        load_weights(folder, model)
        _start(optimizer)
        moments = _moments(model, optimizer)
        with safe_open(folder / OPTIMIZER, "pt") as file:
            stored = set(file.keys())
        for name, weight in model.named_parameters():
            if f"{name}.step" not in stored:  # has had no gradient yet
                optimizer.state.pop(weight, None)
        _read(folder / OPTIMIZER, {name: value for name, value in moments.items() if name in stored})
        return json.loads((folder / POSITION).read_text(encoding="utf-8"))

    def _gathered(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole tensors on the CPU of the first process, none on the others."""
        gathered = {}
        for name, tensor in tensors.items():
            tensor = whole(tensor.detach())
            if self._processes.first:
                gathered[name] = tensor.cpu().contiguous()
        return gathered

    def _prune(self) -> None:
        for old in found(self._run)[: -self._keep]:
            # First out of the way: a folder that is half removed must not look complete.
            leaving = old.with_name(_UNFINISHED + old.name)
            old.rename(leaving)
            shutil.rmtree(leaving)


def folder_name(step: int) -> str:
    """The name of a checkpoint's folder; names sort like steps."""
    return f"{_NAME}{step:08d}"


def found(run: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted(path for path in run.glob(f"{_NAME}*") if path.is_dir())


def tidy(run: Path) -> None:
    """Removes what an interrupted write has left."""
    for path in run.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights that are trained, and buffers that belong to the model, by name; frozen weights are in the base model."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in names}
    return {**{name: weight for name, weight in model.named_parameters() if weight.requires_grad}, **buffers}


def load_weights(folder: Path, model: nn.Module) -> None:
    """Puts the weights of a checkpoint into a model with the same parts trained.

    Raises:
        TrainingError: the checkpoint is of another model.
    """
    _read(folder / WEIGHTS, trained(model))


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name, weight in model.named_parameters()
        for key, value in sorted(optimizer.state.get(weight, {}).items())
    }


def _start(optimizer: torch.optim.Optimizer) -> None:
    """Makes the moments, which AdamW does in its first step: one that changes nothing, since its rate is 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _read(path: Path, into: Mapping[str, torch.Tensor]) -> None:
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        if names != into.keys():
            differ = sorted(names ^ into.keys())
            raise TrainingError(
                f"{path} is of another model or another choice of trained parts: {len(differ)} tensors are in one and "
                f"not in the other, {differ[0]} among them; resume with the recipe that the run was started with"
            )
        for name, tensor in into.items():
            value = file.get_tensor(name)
            if value.shape != tensor.shape:
                raise TrainingError(f"{name} is {tuple(value.shape)} in {path} and {tuple(tensor.shape)} in the model")
            put(value, tensor)


def _write(run: Path, step: int, files: Mapping[str, dict[str, torch.Tensor]], position: Mapping[str, Any]) -> None:
    unfinished = run / (_UNFINISHED + folder_name(step))
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        for name, tensors in files.items():
            save_file(tensors, unfinished / name)
        (unfinished / POSITION).write_text(json.dumps(position, indent=1), encoding="utf-8")
        for path in (*unfinished.iterdir(), unfinished):
            _to_disk(path)
        target = run / folder_name(step)
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
        _to_disk(run)
    except (OSError, SafetensorError):
        shutil.rmtree(unfinished, ignore_errors=True)  # the disk may be full of it
        raise


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
