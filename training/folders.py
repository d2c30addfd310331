"""Checkpoint folders that the engine loads: weights in safetensors beside the files of the model they came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from depthlm_ros.engines.checkpoint import HEAD_PREFIX, Checkpoint

# What a processor and a tokenizer read; weights, their index and other programs' formats stay behind.
_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "depthlm_card.yaml")
_LEFT = ("*.index.json", "training*.json", "scores.json")
TIED = "lm_head.weight"


def save_folder(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint folder.

    Args:
        folder: made if it isn't there.
        weights: under the checkpoint's names; where they lack a dense head, that of the checkpoint goes on as it is.
        checkpoint: the model that the training began with.
        dtype: of the stored floating-point weights.
        config: keys of config.json that are new.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in _FILES:
        for file in checkpoint.folder.glob(pattern):
            if not any(file.match(left) for left in _LEFT):
                shutil.copyfile(file, folder / file.name)
    whole = dict(weights)
    if not any(name.startswith(HEAD_PREFIX) for name in whole):
        whole |= {HEAD_PREFIX + name: value for name, value in checkpoint.tensors(HEAD_PREFIX).items()}
    if checkpoint.config.get("tie_word_embeddings"):
        whole.pop(TIED, None)
    stored = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        for name, value in whole.items()
    }
    save_torch_state_dict(stored, folder, safe_serialization=True)
    written = checkpoint.config | {"dtype": str(dtype).removeprefix("torch.")} | dict(config or {})
    settings = folder / "config.json"
    settings.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    for file in folder.glob("*.safetensors"):
        # safetensors lets nobody but the owner read, and a robot's node may be another user.
        file.chmod(settings.stat().st_mode)
