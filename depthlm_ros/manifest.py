"""`engine.json`: what an exported engine was made of and for, and where it has proved itself.

Engines that look right and are wrong are the commonest fault of depth nodes on devices: a plan of another TensorRT, of
another board, of another camera, an export whose files were mixed. None of the runtimes refuses all of them, so the
manifest does, naming what was expected and what was found.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from depthlm_ros.errors import ConfigError, ModelError
from depthlm_ros.machine import Machine, this_machine

ENGINE_FILE = "engine.json"
REFERENCE_FOLDER = "reference"
FORMAT = 1
TARGETS = {"onnx": ("onnxruntime", "tensorrt"), "edge-llm": ("edge_llm",), "tensorrt-llm": ("tensorrt_llm", "openai")}
"""What `depthlm export --target` makes, and the engines that run it."""

_BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class ParityRecord:
    """A parity check that was made.

    Attributes:
        engine: such as "onnxruntime".
        version: of the program behind it, as in `EngineInfo`.
        machine: where; `Machine.as_dict`.
        files: digest of all files of the export, `Manifest.digest`.
        passed: the verdict.
        figures: what was measured, by name.
        date: when, ISO 8601.
    """

    engine: str
    version: str
    machine: Mapping[str, str]
    files: str
    passed: bool
    figures: Mapping[str, Any]
    date: str


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

    def record(self, engine: str, version: str, machine: Machine | None = None) -> ParityRecord | None:
        """The newest check of this engine, this version of it, these files and this machine; None without one."""
        here = (machine or this_machine()).as_dict()
        same = [
            record
            for record in self.parity
            if (record.engine, record.version, record.files) == (engine, version, self.digest)
            and dict(record.machine) == here
        ]
        return same[-1] if same else None


def read_manifest(folder: Path) -> Manifest | None:
    """Reads a folder's `engine.json`; None where there is none.

    Raises:
        ModelError: it is damaged or of another format.
    """
    path = folder / ENGINE_FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        form = data.pop("format")
        if form != FORMAT:
            raise ModelError(f"{path} has format {form}, this version reads {FORMAT}; export the model again")
        parity = tuple(ParityRecord(**record) for record in data.pop("parity", ()))
        manifest = Manifest(**{**data, "dialects": tuple(data["dialects"])}, parity=parity)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelError(
            f"{path} can't be read ({type(error).__name__}: {error}); export the model again"
        ) from error
    if manifest.target not in TARGETS:
        raise ModelError(f"{path} has target {manifest.target!r}; known are {', '.join(TARGETS)}")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `engine.json` in one step, so that nobody ever reads half of it."""
    data = {"format": FORMAT, **asdict(manifest)}
    handle, scratch = tempfile.mkstemp(dir=folder, prefix=f".{ENGINE_FILE}-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2)
        file.write("\n")
    os.chmod(scratch, 0o644)
    os.replace(scratch, folder / ENGINE_FILE)


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
            f"{target}"
        )
    if engine not in TARGETS[manifest.target]:
        raise ModelError(
            f"{folder} was exported for target {manifest.target!r}, which engine {engine} doesn't run; choose engine "
            f"{' or '.join(TARGETS[manifest.target])}, or export with --target {target}"
        )
    check_files(folder, manifest)
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Makes sure that every file is the one that was exported.

    Raises:
        ModelError: one is absent or another one; both digests are named.
    """
    for name, wanted in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{folder} lacks {name}, which its {ENGINE_FILE} names; copy the whole export again")
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
    for name in ("compute_capability", "gpu", "board", "tensorrt", "l4t"):
        there = manifest.built.get(name, "")
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


def add_record(folder: Path, record: ParityRecord) -> Path:
    """Keeps a check: in the export, or where that can't be written, in the user's cache.

    Returns:
        The file that it was written to.

    Raises:
        ModelError: `folder` holds no export.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ModelError(f"{folder} has no {ENGINE_FILE}")
    # A newer check of the same takes the place of an older one.
    told = _same(record)
    kept = tuple(other for other in manifest.parity if _same(other) != told)
    try:
        write_manifest(folder, replace(manifest, parity=(*kept, record)))
        return folder / ENGINE_FILE
    except OSError:
        path = _cached(manifest)
        path.parent.mkdir(parents=True, exist_ok=True)
        records = [asdict(other) for other in _cached_records(manifest) if _same(other) != told] + [asdict(record)]
        path.write_text(json.dumps(records, indent=2), encoding="utf-8")
        return path


def known_record(manifest: Manifest, engine: str, version: str) -> ParityRecord | None:
    """The newest check made here, from the export or from the user's cache."""
    return replace(manifest, parity=parity_records(manifest)).record(engine, version)


def parity_records(manifest: Manifest) -> tuple[ParityRecord, ...]:
    """All checks that were kept, in the export and in the user's cache, the newest last in each."""
    return (*manifest.parity, *_cached_records(manifest))


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _same(record: ParityRecord) -> tuple[Any, ...]:
    return record.engine, record.version, record.files, tuple(sorted(record.machine.items()))


def _cached(manifest: Manifest) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "depthlm_ros" / "parity" / f"{manifest.digest}.json"


def _cached_records(manifest: Manifest) -> list[ParityRecord]:
    try:
        return [ParityRecord(**record) for record in json.loads(_cached(manifest).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, RuntimeError):
        return []
