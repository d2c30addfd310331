"""The model that is asked for: its card and licence, its files, and an export's manifest and parity records."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from depthlm_ros.camera import Camera
from depthlm_ros.cards import UNKNOWN_LICENCE, load_card
from depthlm_ros.doctor.hardware import BESIDE_MODEL, GB, memory_for_models
from depthlm_ros.doctor.page import FAIL, Finding, fail, note, ok, warn
from depthlm_ros.doctor.versions import ONNXRUNTIMES
from depthlm_ros.doctor.world import World
from depthlm_ros.errors import DepthLMError
from depthlm_ros.manifest import (
    REFERENCE_FOLDER,
    TARGETS,
    Manifest,
    check_built,
    check_card,
    check_files,
    read_manifest,
)
from depthlm_ros.modelcard import ModelCard
from depthlm_ros.parity_records import parity_records

DENSE_ENGINES = ("onnxruntime", "tensorrt")
WORD_ENGINES = ("tensorrt_llm", "openai", "edge_llm")
# Larger exports would keep the reader waiting; depth_node hashes them at every start all the same.
HASHED_BYTES = 8 * GB
# Images that are scaled by more than this are either thrown away or invented (focal length wanted / focal length seen).
SCALES = (0.4, 3.0)


def check_model(world: World, model: str, engine: str, camera: Camera | None) -> Iterable[Finding]:
    """Everything about the model.

    Args:
        world: the machine.
        model: name, folder or hub id.
        engine: that shall run it.
        camera: that was heard, None without one.
    """
    try:
        card, source = load_card(model)
    except DepthLMError as error:
        told, _, remedy = str(error).partition("; ")
        yield fail(f"model {model}: {told}", remedy or "name another model, or fetch it again")
        return
    yield from _card(card)
    yield from _dialects(card, engine)
    if camera is not None and card.focal_px is not None:
        yield from _view(card, camera)
    if isinstance(source, str):
        yield from _hub(world, card, source)
        yield from _checkpoint(model, engine)
        return
    try:
        manifest = read_manifest(source)
    except DepthLMError as error:
        yield fail(str(error), "export the model again: depthlm export")
        return
    yield from _weights(world, source, manifest)
    if manifest is not None:
        yield from check_export(world, source, manifest, card, engine, camera)
    else:
        yield from _checkpoint(model, engine)


def _checkpoint(model: str, engine: str) -> Iterable[Finding]:
    target = next((name for name in ("onnx", "edge-llm") if engine in TARGETS[name]), "")
    if target:
        yield fail(
            f"engine {engine} runs exports, and {model} is a checkpoint",
            f"depthlm export {model} FOLDER --target {target} --camera CALIBRATION.yaml, then --model FOLDER",
        )


def _card(card: ModelCard) -> Iterable[Finding]:
    use = "commercial use allowed" if card.commercial_use else "no commercial use"
    if card.licence == UNKNOWN_LICENCE:
        yield warn(f"{card.name}: its licence isn't known, so commercial use is refused",
                   "find its licence and write a depthlm_card.yaml into its folder")  # fmt: skip
    else:
        yield ok(f"{card.name}: licence {card.licence}, {use}")
    if card.dialects:
        others = [dialect for dialect in card.dialects if dialect != card.default_dialect]
        also = f" (also {', '.join(others)})" if others else ""
        yield ok(
            f"{card.architecture}, asked in {card.default_dialect}{also}; focal length {card.focal_px:g} px, policy "
            f"{card.policy}, answers {'z-depth' if card.depth_kind == 'z' else 'Euclidean distance'}"
        )
    else:
        yield note(f"{card.architecture}, tasks {', '.join(card.tasks)}: no depth of single images",
                   "depth_node needs a model with the task depth")  # fmt: skip
    for assumption in card.assumptions:
        yield note(f"assumed: {assumption}")


def _dialects(card: ModelCard, engine: str) -> Iterable[Finding]:
    if not card.dialects:
        return
    worded = [dialect for dialect in card.dialects if dialect != "dense"]
    if engine in DENSE_ENGINES and "dense" not in card.dialects:
        yield fail(
            f"engine {engine} makes dense maps, and {card.name} answers in words only",
            f"choose one of the engines transformers, {', '.join(WORD_ENGINES)}, or a model with a dense head",
        )
    elif engine in WORD_ENGINES and not worded:
        yield fail(f"engine {engine} answers in words, and {card.name} has dense maps only",
                   "choose engine transformers, onnxruntime or tensorrt")  # fmt: skip
    elif engine in DENSE_ENGINES and card.default_dialect != "dense":
        yield note(f"{card.name} is asked in {card.default_dialect} unless told", "set dialect: dense")
    elif engine in WORD_ENGINES and card.default_dialect == "dense":
        yield note(f"{card.name} is asked for dense maps unless told", f"set dialect: {worded[0]}")


def _view(card: ModelCard, camera: Camera) -> Iterable[Finding]:
    scale = card.focal_px / camera.fx
    told = (
        f"the camera's {camera.width}x{camera.height} at {camera.fx:.0f} px is shown as "
        f"{round(camera.width * scale)}x{round(camera.height * card.focal_px / camera.fy)} at {card.focal_px:g} px"
    )
    if scale < SCALES[0]:
        yield note(f"{told}: most of its detail is thrown away", "a smaller image from the camera saves bandwidth")
    elif scale > SCALES[1]:
        yield warn(f"{told}: much larger than what was seen, slow and without more detail",
                   "use a larger image of the camera, or a lens with less field of view")  # fmt: skip
    else:
        yield ok(told)


def _hub(world: World, card: ModelCard, source: str) -> Iterable[Finding]:
    cached = hub_folder(world) / f"models--{source.replace('/', '--')}" / "snapshots"
    if cached.is_dir() and any(cached.glob("*/*.safetensors")):
        yield ok(f"{source} is in the hub's cache")
    elif world.environment.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        yield fail(f"{source} is not in the hub's cache and HF_HUB_OFFLINE forbids to fetch it",
                   f"unset HF_HUB_OFFLINE and run: hf download {source}")  # fmt: skip
    else:
        remedy = f"fetch it beforehand: hf download {source}"
        if card.revision:
            remedy += f" --revision {card.revision}"
        if "FAIR" in card.licence:
            remedy += " (its owners must have granted access to your account: hf auth login)"
        yield note(f"{source} is fetched at the first start, several GB", remedy)


def hub_folder(world: World) -> Path:
    """Where models from the hub are kept, as huggingface_hub finds it."""
    env = world.environment
    home = env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or os.path.join(env.get("HOME", "~"), ".cache"),
                                              "huggingface")  # fmt: skip
    return Path(env.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def _weights(world: World, folder: Path, manifest: Manifest | None) -> Iterable[Finding]:
    names = manifest.files if manifest is not None else [path.name for path in folder.glob("*.safetensors")]
    size = sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
    yield ok(f"{folder}: {size / GB:.2f} GB")
    room = memory_for_models(world)
    if room is not None and size + BESIDE_MODEL > room:
        yield warn(
            f"{size / GB:.1f} GB of weights and 2 GB beside them are more than the {room / GB:.1f} GB that are free",
            "end other programs, or take a smaller model or a smaller precision",
        )


def check_export(
    world: World, folder: Path, manifest: Manifest, card: ModelCard, engine: str, camera: Camera | None
) -> Iterable[Finding]:
    """Whether an export is whole, suits engine, machine and camera, and has proved itself here."""
    engines = TARGETS[manifest.target]
    yield ok(
        f"exported for {manifest.target} from {manifest.source} on {manifest.made[:10]}, {manifest.precision}, with "
        + ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    )
    if engine not in engines:
        yield fail(f"engine {engine} doesn't run exports for {manifest.target}",
                   f"use engine {' or '.join(engines)}")  # fmt: skip
    files = list(_files(folder, manifest))
    yield from files
    yield from _refusal(check_built, manifest, world.machine)
    yield from _refusal(check_card, manifest, card.focal_px, card.policy)
    if manifest.built is None and engine == "tensorrt":
        yield fail("no TensorRT plan was built yet", f"build it on this machine: depthlm build {folder}")
    if engine == "edge_llm":
        yield from _edge_engines(folder)
    yield from _camera(manifest, camera)
    if any(finding.status == FAIL for finding in files):
        return  # what these files once answered says nothing any more
    yield from _parity(world, folder, manifest, engine)


def _edge_engines(folder: Path) -> Iterable[Finding]:
    engines = folder / "engines"
    missing = [name for name in ("llm.engine", "visual/visual.engine") if not (engines / name).is_file()]
    if missing:
        yield fail(f"{engines} has no {' and no '.join(missing)}",
                   f"build them on this machine: {folder / 'build_on_device.sh'}")  # fmt: skip
        return
    from depthlm_ros.engines.edge_llm_engine import check_place

    yield from _refusal(check_place, engines)


def _files(folder: Path, manifest: Manifest) -> Iterable[Finding]:
    size = sum((folder / name).stat().st_size for name in manifest.files if (folder / name).is_file())
    if size > HASHED_BYTES:
        missing = [name for name in manifest.files if not (folder / name).is_file()]
        if missing:
            yield fail(f"{folder} lacks {', '.join(missing[:3])}", "copy the whole export again")
        else:
            yield note(f"{len(manifest.files)} files are there; {size / GB:.0f} GB were not compared with their sha256")
        return
    try:
        check_files(folder, manifest)
    except DepthLMError as error:
        told, _, remedy = str(error).partition("; ")
        yield fail(told, remedy)
        return
    yield ok(f"{len(manifest.files)} files are those that were exported (sha256)")


def _refusal(check: Any, *arguments: Any) -> Iterable[Finding]:
    try:
        check(*arguments)
    except DepthLMError as error:
        told, _, remedy = str(error).partition("; ")
        yield fail(told, remedy)


def _camera(manifest: Manifest, camera: Camera | None) -> Iterable[Finding]:
    made = manifest.camera
    if made is None or camera is None:
        return
    seen = {name: getattr(camera, name) for name in ("width", "height", "fx", "fy", "cx", "cy")}
    # A tenth of a percent of the focal length is a tenth of a percent of every depth.
    other = [
        f"{name} {seen[name]:g} instead of {made[name]:g}"
        for name in seen
        if name in made and abs(seen[name] - made[name]) > max(1e-3 * abs(made[name]), 0.5)
    ]
    if other:
        yield warn(
            f"the camera heard is another one than the engine was made for: {', '.join(other)}",
            "export again for this camera, unless the engine says that it takes others",
        )
    else:
        yield ok("the camera heard is the one that the engine was made for")


def _parity(world: World, folder: Path, manifest: Manifest, engine: str) -> Iterable[Finding]:
    here = world.machine.as_dict()
    # Versions of TensorRT are the machine's; of the others, the record says what its engine said.
    runtimes = {"onnxruntime": ONNXRUNTIMES, "edge_llm": ("tensorrt-edgellm",), "tensorrt_llm": ("tensorrt-llm",)}
    installed = next(filter(None, map(world.version, runtimes.get(engine, ()))), "")
    records = [
        record
        for record in parity_records(manifest)
        if record.engine == engine
        and record.files == manifest.digest
        and dict(record.machine) == here
        and installed in record.version
    ]
    if not records:
        elsewhere = sum(record.engine == engine for record in parity_records(manifest))
        told = f"engine {engine} has not proved itself on this machine"
        if elsewhere:
            told += f" ({elsewhere} checks of other files, machines or versions don't count)"
        if (folder / REFERENCE_FOLDER).is_dir():
            yield note(told, "depth_node makes the parity check at its first start and refuses an engine that fails")
        else:
            yield warn(
                f"{told}, and there are no reference answers beside it",
                "where the checkpoint runs: depthlm parity MODEL --record FOLDER; here: set reference",
            )
        return
    newest = max(records, key=lambda record: record.date)
    figures = ", ".join(f"{name} {value:.4g}" for name, value in newest.figures.items() if isinstance(value, float))
    verdict = "passed" if newest.passed else "FAILED"
    told = f"parity on this machine, {newest.date[:10]}, {newest.version}: {verdict} ({figures})"
    if newest.passed:
        yield ok(told)
    else:
        yield fail(told, "export and build again, with another precision or version of TensorRT; it is refused else")
