"""Finds a checkpoint on disk or on the hub and says what is in it, before anything heavy is loaded.

Only safetensors are read: a pickled file can run code while it is loaded.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from depthlm_ros.errors import ModelError
from depthlm_ros.weights import ARCHITECTURES, check_weights, folder_config

if TYPE_CHECKING:
    import torch

HEAD_PREFIX = "depth_head."
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.yaml"]
HUB_FILES = [*SMALL_FILES, "*.safetensors"]
OTHER_FORMATS = ["consolidated*", "original/*"]  # the same weights once more, as other programs want them
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds a model we can load.

    Attributes:
        folder: where its files are.
        name: what the user asked for, a folder or a hub id.
        config: its config.json.
        shapes: shape of each stored tensor by name.
        shards: file that holds each tensor.
    """

    folder: Path
    name: str
    config: dict
    shapes: dict[str, tuple[int, ...]]
    shards: dict[str, Path]

    @property
    def architecture(self) -> str:
        """`model_type` of the config."""
        return self.config["model_type"]

    @property
    def parameters(self) -> int:
        """Number of stored weights."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def has_dense_head(self) -> bool:
        """Whether weights of a depth head are stored."""
        return any(name.startswith(HEAD_PREFIX) for name in self.shapes)

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Loads the tensors whose name starts with `prefix`, under their names without it."""
        names = [name for name in self.shapes if name.startswith(prefix)]
        loaded = {}
        for shard in {self.shards[name] for name in names}:
            with safe_open(shard, framework="pt") as file:
                loaded |= {n.removeprefix(prefix): file.get_tensor(n) for n in names if self.shards[n] == shard}
        return loaded


def open_checkpoint(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Opens a local folder, or fetches a hub repository into the hub's cache first.

    Args:
        source: folder, or hub id such as "Qwen/Qwen3-VL-4B-Instruct".
        revision: branch, tag or commit of the hub repository.

    Raises:
        ModelError: no such folder or repository, no config.json, an architecture we don't run,
            no safetensors, a missing or damaged file.
    """
    folder = _folder(source, revision)
    config = folder_config(folder)
    check_architecture(config, str(source))
    check_weights(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    shards: dict[str, Path] = {}
    for path in _weight_files(folder):
        for name, shape in _shapes(path).items():
            shapes[name], shards[name] = shape, path
    return Checkpoint(folder, str(source), config, shapes, shards)


def open_processor(source: str | Path, revision: str | None = None) -> Checkpoint:
    """What `PromptProcessor` needs of a checkpoint, without its weights: for engines that have them elsewhere.

    Args:
        source: folder, or hub id, of which only the small files are fetched.
        revision: of the hub repository.

    Raises:
        ModelError: as `open_checkpoint`, but for the weights.
    """
    folder = _folder(source, revision, SMALL_FILES)
    config = folder_config(folder)
    check_architecture(config, str(source))
    return Checkpoint(folder, str(source), config, {}, {})


def load_part(factory: type, folder: Path) -> Any:
    """Makes a tokenizer or an image processor of the files in a folder.

    Args:
        factory: transformers' class.
        folder: of the checkpoint.

    Raises:
        ModelError: the files are missing or damaged.
    """
    try:
        return factory.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder}: {factory.__name__} can't be loaded ({str(error).splitlines()[0]}); copy its files again"
        ) from error


def read_json(path: Path) -> dict:
    """The JSON mapping in a small file of a checkpoint; empty where there is no file, or no mapping in it.

    Raises:
        ModelError: it isn't JSON.
    """
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); copy it again") from error
    return data if isinstance(data, dict) else {}


def check_architecture(config: dict, name: str) -> None:
    """Refuses what we have no engine for.

    Args:
        config: config.json.
        name: of the model, for the message.

    Raises:
        ModelError: names the `model_type` seen.
    """
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ModelError(f"{name}: model_type {architecture!r} is not supported; known are {', '.join(ARCHITECTURES)}")
    vision = config.get("vision_config", {}).get("model_type")
    if architecture == "llava" and vision != "pixtral":
        raise ModelError(f"{name}: llava with a {vision!r} vision tower is not supported; only Pixtral checkpoints are")


def _folder(source: str | Path, revision: str | None, files: list[str] = HUB_FILES) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(source, Path) or not HUB_ID.fullmatch(source):
        raise ModelError(
            f"{source} is not a folder; give the folder of a checkpoint or a hub id like 'Qwen/Qwen3-VL-4B-Instruct'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=files, ignore_patterns=OTHER_FORMATS)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"can't fetch {source} from the hub ({type(error).__name__}: {str(error).splitlines()[0]}); check the id "
            "and the network, run `hf auth login` if the repository is gated, or give a local folder"
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in sorted(set(weight_map.values()))]
    single = folder / "model.safetensors"
    if not single.is_file():
        seen = sorted(path.name for path in folder.glob("*.safetensors"))
        raise ModelError(f"{folder} has {seen[0]} but no model.safetensors; convert it to the layout of transformers")
    return [single]


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file ({error}); copy it again "
            "(git lfs pull, where it is in git)"
        ) from error
