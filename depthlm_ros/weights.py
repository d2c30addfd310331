"""What lies in a model folder: config.json, and weights that are complete and safe to load. No torch needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from depthlm_ros.errors import ModelError

ARCHITECTURES = ("qwen3_vl", "qwen2_5_vl", "llava")
"""`model_type` of the checkpoints that we run; of llava only those with Pixtral's vision tower."""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DEPTH_HEAD = "depth_head."


def folder_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises:
        ModelError: there is none, or it isn't a JSON mapping.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json; pass the folder of a Hugging Face checkpoint")
    return _read_json(path)


def hub_config(hub_id: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of a hub repository, fetched or from the local cache.

    Raises:
        ModelError: it can't be had: no network, no such repository, or a gated one.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        path = hf_hub_download(hub_id, "config.json", revision=revision)
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"config.json of {hub_id!r} can't be fetched ({type(error).__name__}: {error}); check the id, accept the "
            "model's licence and log in if it is gated, or download it and pass the folder"
        ) from error
    return _read_json(Path(path))


def check_weights(folder: Path) -> None:
    """Makes sure that a folder holds safetensors, and every shard that its index names.

    Raises:
        ModelError: no weights, only pickled ones, or shards missing.
    """
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
        if pickled:
            raise ModelError(
                f"{folder} holds only pickled weights ({', '.join(pickled[:4])}), which can run code when loaded; "
                "convert them to safetensors where you trust them (load there, then model.save_pretrained(folder))"
            )
        raise ModelError(f"{folder} has no *.safetensors; copy or train the weights into it")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set((_read_json(index).get("weight_map") or {}).values())
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of the {len(shards)} shards in its index, such as {missing[0]}; "
                "copy them too"
            )


def has_depth_head(folder: Path) -> bool:
    """Whether a tensor's name starts with `depth_head.` (DepthVLM's keys), read from the files' headers alone.

    Raises:
        ModelError: a file that isn't safetensors, such as a git-lfs pointer, or a truncated one.
    """
    return any(name.startswith(_DEPTH_HEAD) for path in folder.glob("*.safetensors") for name in _tensor_names(path))


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="np") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} isn't a whole safetensors file ({error}); copy it again (git lfs pull, where it is in git)"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} isn't valid JSON ({error}); copy the checkpoint again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds {type(data).__name__} instead of a mapping; copy the checkpoint again")
    return data
