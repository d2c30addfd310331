"""`engine.json`: what an exported engine was made of and for, and where it has proved itself.

Engines that look right and are wrong are the commonest fault of depth nodes on devices: a plan of another TensorRT, of
another board, of another camera, an export whose files were mixed. None of the runtimes refuses all of them, so the
manifest does, naming what was expected and what was found.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from depthlm_ros.errors import ConfigError, ModelError
from depthlm_ros.machine import Machine, this_machine
from depthlm_ros.parity_records import ParityRecord

ENGINE_FILE = "engine.json"
REFERENCE_FOLDER = "reference"
FORMAT = 1
TARGETS = {"onnx": ("onnxruntime", "tensorrt"), "edge-llm": ("edge_llm",), "tensorrt-llm": ("tensorrt_llm", "openai")}
"""What `depthlm export --target` makes, and the engines that run it."""

_BLOCK = 1 << 22
_MOST_JSON_BYTES = 4 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
# Files that engines and the gate find by their names.
_READ = ("*.onnx*", "*.safetensors", "*.json", "*.plan", "reference/*")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `engine.json`.

    Attributes:
        target: one of `TARGETS`.
        model: name of the model's card.
        source: what was exported, a folder's name or a hub id.
        source_sha256: hex digest of each weight file of the source.
        made: when, ISO 8601.
        versions: of the packages that made it, by name.
        precision: of weights and products in the engine, such as "float32".
        dialects: that the engine can be asked in.
        focal_px: focal length in pixels that images were brought to.
        policy: how, "published" or "exact".
        image: what the engine is shown: `width` and `height` in pixels where they are fixed, else `max_width`,
            `max_height`; and sizes that follow from them, such as `image_tokens`.
        camera: width, height, fx, fy, cx, cy and distortion of the camera that it was made for; None for any.
        files: hex sha256 of every file that the engine reads, by path in the folder.
        built: `Machine.as_dict` of where a plan was built and `precision`, for engines that only run there; None else.
        parity: checks that were made.
        extra: what only one engine knows of.
    """

    target: str
    model: str
    source: str
    source_sha256: Mapping[str, str]
    made: str
    versions: Mapping[str, str]
    precision: str
    dialects: tuple[str, ...]
    focal_px: float | None
    policy: str
    image: Mapping[str, int]
    camera: Mapping[str, Any] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    built: Mapping[str, str] | None = None
    parity: tuple[ParityRecord, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """One digest of all files, for parity records."""
        told = json.dumps(dict(sorted(self.files.items()))).encode()
        return hashlib.sha256(told).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """Reads a folder's `engine.json`; None where there is none.

    Raises:
        ModelError: it is damaged, of another format, or names files outside of the folder.
    """
    path = folder / ENGINE_FILE
    if not path.is_file():
        return None
    try:
        data = read_json(path)
        form = data.pop("format")
        if form != FORMAT:
            raise ModelError(f"{path} has format {form!r}, this version reads {FORMAT}; export the model again")
        parity = tuple(ParityRecord.read(record) for record in data.pop("parity", ()))
        manifest = Manifest(**{**data, "dialects": tuple(data["dialects"])}, parity=parity)
        _check_types(manifest)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} can't be read ({type(error).__name__}: {error}); export the model again") from error
    if manifest.target not in TARGETS:
        raise ModelError(f"{path} has target {manifest.target!r}; known are {', '.join(TARGETS)}")
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping of at most some megabytes.

    Raises:
        OSError, ValueError, RecursionError: it can't be read.
    """
    if path.stat().st_size > _MOST_JSON_BYTES:
        raise ValueError(f"it has {path.stat().st_size} bytes, at most {_MOST_JSON_BYTES}")
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError(f"it holds {type(data).__name__} instead of a mapping")
    return data


def _check_types(manifest: Manifest) -> None:
    """Raises ValueError for a value of another type: whoever uses it would fail later and say less."""
    texts = ("target", "model", "source", "made", "precision", "policy")
    for name in texts:
        _must(isinstance(getattr(manifest, name), str), name, "a text")
    _must(all(isinstance(d, str) for d in manifest.dialects), "dialects", "a list of texts")
    focal = manifest.focal_px
    _must(focal is None or (isinstance(focal, int | float) and not isinstance(focal, bool)), "focal_px", "a number")
    for name in ("source_sha256", "versions", "files", "image", "extra"):
        _must(isinstance(getattr(manifest, name), dict), name, "a mapping")
    for name in ("camera", "built"):
        _must(isinstance(getattr(manifest, name), dict | None), name, "a mapping or null")
    _must(all(type(value) is int for value in manifest.image.values()), "image", "a mapping to whole numbers")
    for name in ("source_sha256", "versions", "built"):
        told = getattr(manifest, name) or {}
        _must(all(isinstance(value, str) for value in told.values()), name, "a mapping to texts")
    for name, digest in manifest.files.items():
        inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        _must(bool(name) and inside and "\0" not in name, "files", "a mapping of paths in the folder")
        _must(isinstance(digest, str) and bool(_SHA256.fullmatch(digest)), "files", "a mapping to 64 hex digits")


def _must(good: bool, name: str, what: str) -> None:
    if not good:
        raise ValueError(f"{name} must be {what}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `engine.json` in one step, so that nobody ever reads half of it."""
    write_json(folder / ENGINE_FILE, {"format": FORMAT, **asdict(manifest)})


def write_json(path: Path, data: Any) -> None:
    """Writes JSON in one step, also if the power fails; numbers that JSON doesn't have become null."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(_finite(data), file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def require_manifest(folder: Path, engine: str) -> Manifest:
    """The manifest of an export that this engine runs, its files checked.

    Raises:
        ModelError: no export, one for another engine, a file that isn't the one that was exported, or a plan that was
            built elsewhere; both values are named.
    """
    manifest = read_manifest(folder)
    target = next(name for name, engines in TARGETS.items() if engine in engines)
    if manifest is None:
        raise ModelError(
            f"{folder} has no {ENGINE_FILE}, so it is no export; make one: depthlm export {folder} OUT --target "
            f"{target} --camera CALIBRATION.yaml"
        )
    if engine not in TARGETS[manifest.target]:
        raise ModelError(
            f"{folder} was exported for target {manifest.target!r}, which engine {engine} doesn't run; choose engine "
            f"{' or '.join(TARGETS[manifest.target])}, or export with --target {target}"
        )
    check_files(folder, manifest)
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Makes sure that every file is the one that was exported, and that there are no others that an engine reads.

    Raises:
        ModelError: one is absent, another one or too many; digests are named.
    """
    for pattern in _READ:
        for path in sorted(folder.glob(pattern)):
            name = path.relative_to(folder).as_posix()
            if name != ENGINE_FILE and not path.name.startswith(".") and name not in manifest.files:
                raise ModelError(
                    f"{path} is not named in {ENGINE_FILE}, so it is of another export; remove it, or export again"
                )
    for name, wanted in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{folder} lacks {name}, which its {ENGINE_FILE} names; copy the whole export again")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ModelError(f"{path} is a link to outside of the export; copy the whole export, not links")
        seen = sha256_of(path)
        if seen != wanted:
            raise ModelError(
                f"{path} has sha256 {seen}, its {ENGINE_FILE} says {wanted}; it is damaged or of another export: copy "
                "the whole export again, or export again"
            )


def check_built(manifest: Manifest, machine: Machine | None = None) -> None:
    """Makes sure that a plan was built on a machine like this.

    TensorRT only warns of a plan from another board with the same compute capability, and runs it.

    Raises:
        ModelError: names what differs, there and here.
    """
    if manifest.built is None:
        return
    here = (machine or this_machine()).as_dict()
    # What can't be found out in a container or for the moment is no difference. A Jetson's GPU has several names.
    jetson = bool(manifest.built.get("l4t") and here.get("l4t"))
    unsure = ("board", "l4t", *(() if jetson else ("gpu",)))
    for name in ("compute_capability", "tensorrt", *unsure):
        there = manifest.built.get(name, "")
        if name in unsure and not (there and here.get(name)):
            continue
        if there != here.get(name, ""):
            raise ModelError(
                f"the plan was built with {name.replace('_', ' ')} {there or 'none'}, this machine has "
                f"{here.get(name) or 'none'}; build it here: depthlm build FOLDER"
            )


def check_card(manifest: Manifest, focal_px: float | None, policy: str) -> None:
    """Makes sure that images will be brought to what the engine was made for.

    Raises:
        ConfigError: names both values.
    """
    for name, made, asked in (("focal_px", manifest.focal_px, focal_px), ("policy", manifest.policy, policy)):
        if made != asked:
            raise ConfigError(
                f"{name} is {asked!r}, the engine was exported for {made!r}; export again, or use what it was made for"
            )


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
