"""A checkpoint as TensorRT Edge-LLM's exporter can read it: its weights in float16, none of them out of range.

The exporter casts bfloat16 to float16 by itself, where what is too large becomes infinite without a word; float32 it
leaves as it is and then fails half way.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from depthlm_ros.engines.checkpoint import SMALL_FILES, Checkpoint
from depthlm_ros.errors import ModelError

LARGEST = torch.finfo(torch.float16).max
_WIDER = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Staged:
    """A folder for the exporter.

    Attributes:
        folder: small files, and weights: links to the checkpoint's own, or copies in float16.
        dtypes: number formats of the checkpoint's weights, such as ("bfloat16",).
        flushed: share of the weights, those that are zero aside, that are zero in float16.
    """

    folder: Path
    dtypes: tuple[str, ...]
    flushed: float


def stage(checkpoint: Checkpoint, folder: Path) -> Staged:
    """Writes what the exporter reads.

    Args:
        checkpoint: of any number format.
        folder: empty.

    Raises:
        ModelError: a weight that is no number, or beyond float16; its tensor is named.
    """
    for pattern in SMALL_FILES:
        for path in checkpoint.folder.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    dtypes: set[torch.dtype] = set()
    lost = kept = 0
    for shard in sorted(set(checkpoint.shards.values())):
        own = set()
        for name, tensor in _tensors(shard):
            if tensor.is_floating_point():
                own.add(tensor.dtype)
                one_lost, one_kept = _checked(name, tensor, checkpoint.name)
                lost, kept = lost + one_lost, kept + one_kept
        dtypes |= own
        target = folder / shard.name
        if own & set(_WIDER):
            save_file({name: _narrowed(tensor) for name, tensor in _tensors(shard)}, target, metadata={"format": "pt"})
        else:
            target.symlink_to(shard.resolve())
    told = tuple(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return Staged(folder, told, lost / kept if kept else 0.0)


def _tensors(shard: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(shard, framework="pt") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)


def _checked(name: str, tensor: torch.Tensor, model: str) -> tuple[int, int]:
    """How many values other than zero float16 makes zero, and how many such values there are."""
    if tensor.dtype == torch.float16:
        largest = tensor.abs().max().item() if tensor.numel() else 0.0
        if not largest <= LARGEST:
            raise ModelError(f"{model}: {name} holds {largest}, which is no finite number; train or copy it again")
        count = int(tensor.count_nonzero())
        return 0, count
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    if not largest <= LARGEST:
        raise ModelError(
            f"{model}: {name} holds {largest:g}; Edge-LLM computes in float16, whose largest number is {LARGEST:g}. "
            "Export to target onnx (float32), or serve the checkpoint with --target tensorrt-llm (bfloat16)"
        )
    count = int(tensor.count_nonzero())
    return count - int(tensor.half().count_nonzero()), count


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor
