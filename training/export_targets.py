"""From a checkpoint to an engine of a robot's accelerator: `depthlm export CHECKPOINT OUT --target ...`.

Whatever the target, OUT is a model folder: the node takes it as `model`, with the engine that runs the target. Beside
the target's own files it holds the card, the small files of the processor, `reference/` with what the checkpoint
answers in float32 about rendered frames, and `engine.json`, which names them all.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from depthlm_ros.camera import Camera
from depthlm_ros.cards import CARD_FILE, load_card
from depthlm_ros.engines.checkpoint import SMALL_FILES, open_processor
from depthlm_ros.errors import ConfigError, EngineError
from depthlm_ros.estimator import Estimator
from depthlm_ros.manifest import (
    ENGINE_FILE,
    REFERENCE_FOLDER,
    TARGETS,
    Manifest,
    read_manifest,
    sha256_of,
    write_manifest,
)
from depthlm_ros.modelcard import ModelCard
from depthlm_ros.parity import ask_reference, compare_maps, record_reference, same_answer, steady
from depthlm_ros.references import (
    Reference,
    ReferenceFrame,
    camera_values,
    default_frames,
    recorded_frames,
    write_reference,
)
from depthlm_training.config import as_yaml

Exporter = Callable[..., Manifest]
PRECISIONS = {"onnx": "float32", "edge-llm": "float16", "tensorrt-llm": "bfloat16"}
"""What each target computes in when nobody says otherwise."""
OWN = {
    "onnx": (),
    "edge-llm": ("exporter", "batch", "question_tokens", "answer_tokens"),
    "tensorrt-llm": ("gpu", "quantised"),
}
"""Options that only one target has."""
# Questions in words about a frame, of which those are kept whose answers don't hang on rounding: in bfloat16 one of
# ten answers of the demo is another one, in float16 one of fifty.
ASKED_POINTS = 48
FEWER_BITS = ("float16", "bfloat16")


@dataclass(frozen=True)
class TargetOptions:
    """What an export is told.

    Attributes:
        precision: of the engine; empty takes the target's own.
        reference_dtype: of the checkpoint when it gives the reference answers; empty: float32 for maps, which bear
            fewer bits, and the engine's own precision for words, whose last digits don't.
        bag: recording whose frames are added to the rendered ones; of the same camera.
        gpu: that a TensorRT-LLM engine is for, such as "H100" or "sm90"; empty for any.
        quantised: folder that NVIDIA's Model Optimizer made of a TensorRT-LLM export; None for none.
        exporter: Edge-LLM's exporter or the Python of its environment; empty looks for it.
        batch: questions that an Edge-LLM engine answers together; None takes the usual.
        question_tokens: room that an Edge-LLM engine has for free questions; None takes the usual.
        answer_tokens: of the longest answer of an Edge-LLM engine; None takes the card's.
    """

    precision: str = ""
    reference_dtype: str = ""
    bag: Path | None = None
    gpu: str = ""
    quantised: Path | None = None
    exporter: str = ""
    batch: int | None = None
    question_tokens: int | None = None
    answer_tokens: int | None = None


def export_target(
    model: str, out: Path, target: str, camera: Camera, options: TargetOptions = TargetOptions()
) -> Manifest:
    """Exports a checkpoint.

    Args:
        model: name of a card, folder or hub id.
        out: folder to make; must not exist.
        target: one of `manifest.TARGETS`.
        camera: of the images that the engine will see; graphs are made for its size, token limits for its view.
        options: see there.

    Returns:
        The manifest, as written.

    Raises:
        ConfigError: an unknown target, an option that it doesn't have, `out` exists, a recording of another camera.
        ModelError, DialectError: the target can't run this model; the message says why.
        MissingDependencyError: the exporter isn't installed; the message has the line that installs it.
        TrainingError, EngineError: the exporter failed, or what it made answers otherwise.
    """
    if target not in TARGETS:
        raise ConfigError(f"target is {target!r}; choose one of {', '.join(TARGETS)}")
    if out.exists():
        raise ConfigError(f"{out} exists already; delete it or name another folder")
    own = _own(target, options)
    added = _frames_of(options.bag, camera)
    card, source = load_card(model)
    small = open_processor(source, card.revision).folder
    with Estimator.load(model, device="cpu", dtype="float32") as estimator:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            made = Path(scratch) / out.name
            made.mkdir()
            precision = options.precision or PRECISIONS[target]
            manifest = _exporter(target)(estimator, small, made, camera, precision=precision, **own)
            _add_small_files(small, made)
            _add_card(estimator.card, manifest, str(source), made)
            if manifest.dialects:
                agreement = _add_reference(model, estimator, manifest, made, added + default_frames(camera), options)
                manifest = replace(manifest, extra={**manifest.extra, **agreement})
            files = {path.relative_to(made).as_posix(): sha256_of(path) for path in sorted(_files(made))}
            manifest = replace(manifest, files=files, camera=camera_values(camera))
            write_manifest(made, manifest)
            shutil.move(made, out)
    written = read_manifest(out)
    assert written is not None
    return written


def _exporter(target: str) -> Exporter:
    if target == "onnx":
        from depthlm_training.onnx_export import export_onnx

        return export_onnx
    if target == "edge-llm":
        from depthlm_training.edge_llm_export import export_edge_llm

        return export_edge_llm
    from depthlm_training.tensorrt_llm_export import export_tensorrt_llm

    return export_tensorrt_llm


def _own(target: str, options: TargetOptions) -> dict[str, Any]:
    """What only this target is told.

    Raises:
        ConfigError: something is set that only another one is told.
    """
    for other, names in OWN.items():
        for name in names:
            value = getattr(options, name)
            if other != target and value not in ("", None):
                raise ConfigError(f"{name} is {value!r}, and only target {other} has it; leave it out of {target}")
    told = {name: getattr(options, name) for name in OWN[target]}
    return {name: value for name, value in told.items() if value not in ("", None)}


def _add_small_files(source: Path, made: Path) -> None:
    """Config, tokenizer and processor; files that the exporter has written stay."""
    for pattern in SMALL_FILES:
        for path in sorted(source.glob(pattern)):
            if not path.name.endswith(".index.json") and path.name not in (CARD_FILE, ENGINE_FILE):
                if not (made / path.name).exists():
                    shutil.copyfile(path, made / path.name)


def _add_card(card: ModelCard, manifest: Manifest, source: str, made: Path) -> None:
    """The card, with the dialects that the engine can be asked in; digests of weights stay behind with them."""
    default = card.default_dialect if card.default_dialect in manifest.dialects else next(iter(manifest.dialects), None)
    kept = replace(
        card,
        source=source if not Path(source).is_dir() else Path(source).name,
        sha256={},
        dialects=manifest.dialects,
        default_dialect=default,
    )
    (made / CARD_FILE).write_text(as_yaml(kept), encoding="utf-8")


def _frames_of(bag: Path | None, camera: Camera) -> list[ReferenceFrame]:
    """Frames of a recording that the engine can be asked about.

    Raises:
        ConfigError: it was recorded with another camera.
    """
    frames = [] if bag is None else recorded_frames(bag)
    for frame in frames:
        seen = frame.camera
        same = _outline(seen) == _outline(camera)
        values = [(getattr(seen, n), getattr(camera, n)) for n in ("fx", "fy", "cx", "cy")] if same else []
        # A calibration file has fewer digits than a message.
        if not (same and all(math.isclose(a, b, rel_tol=1e-3) for a, b in values)):
            raise ConfigError(
                f"{bag} was recorded with {seen}, the export is for {camera}; name that camera, or leave the recording "
                "out"
            )
    return frames


def _outline(camera: Camera) -> tuple[int, int, str]:
    return camera.width, camera.height, camera.distortion.model


def _add_reference(
    model: str,
    estimator: Estimator,
    manifest: Manifest,
    made: Path,
    frames: Sequence[ReferenceFrame],
    options: TargetOptions,
) -> dict[str, Any]:
    """Records the reference answers; returns what is told of them in the manifest.

    Raises:
        EngineError: in fewer bits the checkpoint itself answers otherwise than in float32.
    """
    folder, dialects = made / REFERENCE_FOLDER, manifest.dialects
    dtype = options.reference_dtype or reference_dtype(manifest)
    if dialects == ("dense",):
        record_reference(estimator, frames, folder, dialects)
        return {"reference_dtype": "float32"}
    told = {"float32": ask_reference(estimator, frames, dialects, ASKED_POINTS)}
    for few in dict.fromkeys((dtype, *FEWER_BITS)):
        if few != "float32":
            with Estimator.load(model, device="cpu", dtype=few) as other:
                told[few] = ask_reference(other, frames, dialects, ASKED_POINTS)
    found = agreement(told["float32"], told[dtype], dtype) if dtype != "float32" else {}
    kept = steady(told[dtype], [other for few, other in told.items() if few != dtype])
    # Where everything hangs on rounding, as in a model that learnt nothing, all is kept, and hard to match.
    write_reference(kept if kept.asked else told[dtype], folder)
    return {"reference_dtype": dtype, **({"agreement_with_float32": found} if found else {})}


def reference_dtype(manifest: Manifest) -> str:
    """The number format of the reference answers of an engine.

    An engine in 16 bits that computes rightly still gives other words: float16 against float32 keeps 98.4 % of the
    demo's answers in the coordinates dialect, less than the 99 % that the gate wants. So words are compared with the
    checkpoint in the engine's own format (bfloat16 for one that no CPU has), and that with float32 by what it measures;
    and only questions are asked whose answers all formats agree about.
    """
    if manifest.dialects == ("dense",):
        return "float32"
    return manifest.precision if manifest.precision in ("float32", "float16") else "bfloat16"


def agreement(whole: Reference, fewer_bits: Reference, dtype: str) -> dict[str, Any]:
    """How a checkpoint in fewer bits measures, beside itself in float32.

    Returns:
        For each dialect: the median depth error, the scale, and the share of answers that are the same. Where the
        checkpoint gives no depth in float32 there is no error either, and `depths` is 0.

    Raises:
        EngineError: half of its depths are more than 1 % off, its scale is, or more than 1 % of them are missing.
    """
    told: dict[str, Any] = {}
    for dialect in dict.fromkeys(asked.dialect for asked in whole.asked):
        both = [(a, b) for a, b in zip(whole.asked, fewer_bits.asked, strict=True) if a.dialect == dialect]
        depths = [np.concatenate([pair[side].depth_m for pair in both]) for side in (0, 1)]
        same = [same_answer(x, y) for a, b in both for x, y in zip(a.texts, b.texts, strict=True)]
        told[dialect] = {"same_answers": sum(same) / len(same)} if same else {}
        if not np.isfinite(depths[0]).any():
            # A checkpoint that gives no depth in float32 either, such as an untrained one, loses none by fewer bits.
            told[dialect]["depths"] = 0
            continue
        found = compare_maps(*depths)
        told[dialect] |= {"median_error": found.median_error, "scale": found.scale}
        if not (found.median_error <= 0.01 and abs(found.scale - 1) <= 0.01 and found.lost <= 0.01):
            raise EngineError(
                f"in {dtype} the checkpoint itself answers otherwise than in float32 ({dialect}: median depth error "
                f"{found.median_error:.2%}, scale {found.scale:.4f}, {found.lost:.1%} missing), so an engine of that "
                "precision can't be right; choose another precision"
            )
    return told


def _files(folder: Path) -> Sequence[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ENGINE_FILE]
