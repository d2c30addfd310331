"""Parity checks that were made, so that they needn't be made again: in the export, else in the user's cache."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthlm_ros.errors import ModelError
from depthlm_ros.machine import Machine, this_machine

if TYPE_CHECKING:
    from depthlm_ros.manifest import Manifest


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
        variant: how the engine was set up: device, number format, guides and the like.
    """

    engine: str
    version: str
    machine: Mapping[str, str]
    files: str
    passed: bool
    figures: Mapping[str, Any]
    date: str
    variant: str = ""

    @classmethod
    def read(cls, data: Any) -> ParityRecord:
        """From JSON.

        Raises:
            ValueError, TypeError: it isn't one.
        """
        record = cls(**data)
        texts = (record.engine, record.version, record.files, record.date, record.variant)
        mappings = (record.machine, record.figures)
        if not (
            all(isinstance(value, str) for value in texts)
            and all(isinstance(value, dict) for value in mappings)
            and all(isinstance(value, str) for value in record.machine.values())
            and isinstance(record.passed, bool)
        ):
            raise ValueError("a parity record of other types")
        return record

    @property
    def of(self) -> tuple[Any, ...]:
        """What it is a check of; a newer one of the same takes its place."""
        return self.engine, self.version, self.variant, self.files, tuple(sorted(self.machine.items()))


def add_record(folder: Path, record: ParityRecord) -> Path:
    """Keeps a check: in the export, or where that can't be written, in the user's cache.

    Returns:
        The file that it was written to.

    Raises:
        ModelError: `folder` holds no export.
        OSError: it can't be written anywhere.
    """
    from depthlm_ros.manifest import ENGINE_FILE, read_manifest, write_json, write_manifest

    manifest = read_manifest(folder)
    if manifest is None:
        raise ModelError(f"{folder} has no {ENGINE_FILE}")
    cached = [other for other in _cached_records(manifest) if other.of != record.of]
    kept = tuple(other for other in manifest.parity if other.of != record.of)
    path = _cache_file(manifest)
    try:
        write_manifest(folder, replace(manifest, parity=(*kept, record)))
    except OSError:
        if path is None:
            raise
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, [asdict(other) for other in (*cached, record)])
        return path
    return folder / ENGINE_FILE


def known_record(
    manifest: Manifest, engine: str, version: str, variant: str = "", machine: Machine | None = None
) -> ParityRecord | None:
    """The newest check of an engine, its version and variant, these files and this machine; None without one."""
    here = (machine or this_machine()).as_dict()
    wanted = (engine, version, variant, manifest.digest, tuple(sorted(here.items())))
    same = [record for record in parity_records(manifest) if record.of == wanted]
    return max(same, key=lambda record: record.date) if same else None


def parity_records(manifest: Manifest) -> tuple[ParityRecord, ...]:
    """All checks that were kept, in the user's cache and in the export."""
    return (*_cached_records(manifest), *manifest.parity)


def _cache_file(manifest: Manifest) -> Path | None:
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        # No home.
        return None
    return cache / "depthlm_ros" / "parity" / f"{manifest.digest}.json"


def _cached_records(manifest: Manifest) -> list[ParityRecord]:
    path = _cache_file(manifest)
    try:
        return [ParityRecord.read(told) for told in json.loads(path.read_text(encoding="utf-8"))] if path else []
    except (OSError, ValueError, TypeError, RecursionError):
        return []
