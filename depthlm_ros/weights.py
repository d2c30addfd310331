"""What lies in a model folder: config.json, and weights that are complete and safe to load. No torch needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from depthlm_ros.errors import ModelError

ARCHITECTURES = ("qwen3_vl", "qwen2_5_vl", "llava")
"""`model_type` of the checkpoints that we run; of llava only those with Pixtral's vision tower."""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DEPTH_HEAD = "depth_head."
_BLOCK = 1 << 22


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
        ModelError: no weights, only pickled ones, or shards missing; an export, whose weights are in another form.
    """
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
        if pickled:
            raise ModelError(
                f"{folder} holds only pickled weights ({', '.join(pickled[:4])}), which can run code when loaded; "
                "convert them to safetensors where you trust them (load there, then model.save_pretrained(folder))"
            )
        _refuse_export(folder)
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


def _refuse_export(folder: Path) -> None:
    """Raises ModelError for what `depthlm export --target` made, naming the engines that run it."""
    # Only here, so that a checkpoint needs nothing that exports need.
    from depthlm_ros.manifest import TARGETS, read_manifest

    manifest = read_manifest(folder)
    if manifest is not None:
        raise ModelError(
            f"{folder} is an export for target {manifest.target!r} and has no weights that transformers reads; choose "
            f"engine {' or '.join(TARGETS[manifest.target])}, or name the checkpoint that it was made of, "
            f"{manifest.source}"
        )


def processor_differences(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """What a folder's image processor does otherwise than a card says, a phrase for each setting.

    Only settings that the folder's preprocessor_config.json has are compared.

    Args:
        folder: of the checkpoint.
        settings: `patch_size`, `shortest_edge`, `image_mean` and the like, as in `ModelCard.processor`.

    Raises:
        ModelError: preprocessor_config.json isn't a JSON mapping.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return []
    found = _read_json(path)
    size = found.get("size")
    found = {**found, **(size if isinstance(size, dict) else {})}
    for new, old in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        found.setdefault(new, found.get(old))
    if isinstance(found.get("patch_size"), dict):
        found["patch_size"] = found["patch_size"].get("height")
    return [
        f"{name} is {found[name]}, published {wanted}"
        for name, wanted in settings.items()
        if found.get(name) is not None and found[name] != wanted
    ]


def depth_head(folder: Path) -> str | None:
    """Which depth head lies in a folder, from the names in the files' headers alone: "dpt", "mlp" or None.

    DepthVLM's keys start with `depth_head.`; those of its two-layer head go on with `mlp.`.

    Raises:
        ModelError: a file that isn't safetensors, such as a git-lfs pointer, or a truncated one.
    """
    names = [name for path in folder.glob("*.safetensors") for name in _tensor_names(path)]
    own = [name for name in names if name.startswith(_DEPTH_HEAD)]
    if not own:
        return None
    return "mlp" if any(name.startswith(f"{_DEPTH_HEAD}mlp.") for name in own) else "dpt"


def check_sha256(folder: Path, digests: Mapping[str, str]) -> None:
    """Makes sure that files are the very ones a card names.

    Args:
        folder: of the checkpoint.
        digests: file name to SHA-256 in hex.

    Raises:
        ModelError: a file is absent or another one.
    """
    for name, wanted in digests.items():
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{folder} lacks {name}, whose sha256 its card names; fetch the model again")
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        if digest.hexdigest() != wanted:
            raise ModelError(
                f"{path} has sha256 {digest.hexdigest()} but its card says {wanted}; fetch the file again, or correct "
                "the card where the weights were changed on purpose"
            )


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
