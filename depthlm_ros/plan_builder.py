"""Builds TensorRT's plan of an exported graph, on the machine that will run it.

A plan belongs to one GPU, one board and one TensorRT, and two builds of one graph may choose different kernels. So it
is built where it runs, its sha256 and the machine are written into `engine.json`, and it has to prove itself against
the reference answers like every other engine.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from depthlm_ros.engines.graph_engine import graph_file
from depthlm_ros.engines.tensorrt_api import import_tensorrt, made, new_logger, told
from depthlm_ros.engines.tensorrt_engine import PLAN_FILE
from depthlm_ros.errors import ConfigError, EngineError, ModelError
from depthlm_ros.machine import Machine, this_machine
from depthlm_ros.manifest import ENGINE_FILE, Manifest, check_files, read_manifest, sha256_of, write_manifest
from depthlm_ros.onnx_precision import lower_precision

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Names on the command line and in manifests."""


def build_plan(
    folder: Path, precision: str | None = None, *, workspace_mb: int = 0, machine: Machine | None = None
) -> Manifest:
    """Builds `model.plan` beside `model.onnx`.

    Precisions are written into the graph, and the network is strongly typed: then TensorRT chooses none itself, and 11
    doesn't any more anyway.

    Args:
        folder: of the export.
        precision: of the products, a key of `PRECISIONS`; None takes the export's.
        workspace_mb: most memory for TensorRT's scratch, in MB; 0 leaves it to TensorRT.
        machine: that this is; None finds out.

    Returns:
        The manifest, as written.

    Raises:
        ModelError: `folder` holds no export for target onnx, or one that is damaged.
        ConfigError: an unknown precision, or one that the exported graph doesn't have any more.
        MissingDependencyError: tensorrt isn't installed, or onnx for another precision than the export's.
        EngineError: TensorRT can't build it; the message has its reasons.
    """
    manifest = _export(folder)
    wanted = manifest.precision if precision is None else _precision(precision)
    if wanted != manifest.precision and manifest.precision != "float32":
        raise ConfigError(
            f"precision is {precision!r}, but the graph was exported in {manifest.precision}; export it in float32, or "
            "leave the precision out"
        )
    tensorrt = import_tensorrt()
    graph = graph_file(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{PLAN_FILE}-") as scratch:
        if wanted != manifest.precision:
            lowered = Path(scratch) / graph.name
            lower_precision(graph, lowered, wanted)
            graph = lowered
        plan = Path(scratch) / PLAN_FILE
        with plan.open("wb") as file:
            file.write(_built(tensorrt, graph, workspace_mb))
            file.flush()
            # The manifest mustn't reach the disk before the plan that it tells of.
            os.fsync(file.fileno())
        digest = sha256_of(plan)
        # Whenever this breaks off, the manifest knows no plan: a start refuses the one that lies there, old or new, and
        # says to remove it; building again takes its place.
        write_manifest(folder, _still(folder, manifest))
        os.replace(plan, folder / PLAN_FILE)
    current = _still(folder, manifest)
    here = (machine or this_machine()).as_dict()
    files = {**current.files, PLAN_FILE: digest}
    updated = replace(current, files=files, built={**here, "precision": wanted})
    write_manifest(folder, updated)
    return updated


def _still(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest as it is now, without a plan: parity may have been checked during the minutes of a build.

    Raises:
        ModelError: it has become another export.
    """
    current = _without_plan(read_manifest(folder))
    if current is None or current.files != manifest.files:
        raise ModelError(
            f"{folder} became another export while its plan was built; build it again: depthlm build {folder}"
        )
    return current


def _without_plan(manifest: Manifest | None) -> Manifest | None:
    if manifest is None:
        return None
    files = {name: digest for name, digest in manifest.files.items() if name != PLAN_FILE}
    return replace(manifest, files=files, built=None)


def _export(folder: Path) -> Manifest:
    """The manifest of an export that a plan can be built of; an older plan is none of its files."""
    manifest = _without_plan(read_manifest(folder))
    if manifest is None or manifest.target != "onnx":
        if manifest is not None and manifest.target == "edge-llm":
            raise ModelError(f"{folder} is an export for target 'edge-llm'; run {folder / 'build_on_device.sh'} here")
        seen = f"no {ENGINE_FILE}" if manifest is None else f"an export for target {manifest.target!r}"
        raise ModelError(f"{folder} has {seen}; make an export: depthlm export MODEL OUT --target onnx")
    # Whatever plan lies there, it is about to be replaced.
    plan = folder / PLAN_FILE
    lying = {PLAN_FILE: sha256_of(plan)} if plan.is_file() else {}
    check_files(folder, replace(manifest, files={**manifest.files, **lying}))
    return manifest


def _precision(name: str) -> str:
    if name not in PRECISIONS:
        raise ConfigError(f"precision is {name!r}; choose one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def _built(tensorrt: Any, graph: Path, workspace_mb: int) -> bytes:
    """The plan's bytes."""
    logger = new_logger(tensorrt)
    builder = made(tensorrt.Builder, logger)
    if builder is None:
        raise EngineError(f"TensorRT can't start: {told(logger)}; it needs an NVIDIA GPU and its driver")
    flags = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = tensorrt.OnnxParser(network, logger)
    # By path, so that it finds weights that lie beside the graph.
    if not parser.parse_from_file(str(graph)):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)) or told(logger)
        raise EngineError(f"TensorRT {tensorrt.__version__} can't read {graph.name}: {errors}; take a newer TensorRT")
    config = builder.create_builder_config()
    # Rounds the factors of float32 products to 11 bits unless it is switched off.
    config.clear_flag(tensorrt.BuilderFlag.TF32)
    if workspace_mb:
        config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, workspace_mb << 20)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(
            f"TensorRT {tensorrt.__version__} can't build {graph.name}: {told(logger)}; give it more memory (end other "
            "programs), another precision, or take a newer TensorRT"
        )
    return bytes(plan)
