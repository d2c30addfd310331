"""`depthlm export --target edge-llm`: ONNX graphs for TensorRT Edge-LLM, and the scripts that build them on a Jetson.

NVIDIA's exporter writes the graphs, in an environment of its own and on a CPU. What is added here: weights that it can
read, the builders' sizes for the camera, a check of all that the runtime will rely on, `build_on_device.sh` and
`run_on_device.sh`. The engines built from these graphs are checked against the reference on the device itself.
"""

from __future__ import annotations

import tempfile
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from depthlm_ros import __version__
from depthlm_ros.camera import Camera
from depthlm_ros.engines.checkpoint import Checkpoint, open_checkpoint
from depthlm_ros.errors import ConfigError, DialectError, ModelError
from depthlm_ros.estimator import Estimator
from depthlm_ros.manifest import Manifest, sha256_of
from depthlm_training.edge_llm_contract import check_export
from depthlm_training.edge_llm_scripts import write_scripts
from depthlm_training.edge_llm_sizes import BATCH, QUESTION_TOKENS, Sizes, plan_sizes
from depthlm_training.edge_llm_tool import TIMEOUT_S, find_exporter, run_exporter
from depthlm_training.edge_llm_weights import Staged, stage

ARCHITECTURES = ("qwen3_vl", "qwen2_5_vl")
"""`model_type` of the checkpoints whose both parts Edge-LLM knows."""
GRAPHS = "onnx"
"""Folder of the graphs in an export."""
TEXT_DIALECTS = ("coordinates", "marker", "compact")


def export_edge_llm(
    estimator: Estimator,
    source: Path,
    out: Path,
    camera: Camera,
    *,
    precision: str = "float16",
    exporter: str | None = None,
    batch: int = BATCH,
    question_tokens: int = QUESTION_TOKENS,
    answer_tokens: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Manifest:
    """Fills an empty folder with `onnx/llm`, `onnx/visual` and the scripts for the device.

    Args:
        estimator: with the checkpoint; prepares images and holds card and policy.
        source: folder of the checkpoint.
        out: empty folder.
        camera: of the images; its view sets the token limits.
        precision: "float16", the only one that needs no GPU to make.
        exporter: the program, the Python beside it or the folder of their environment; None looks for it.
        batch: questions that the engine answers together.
        question_tokens: room for free questions.
        answer_tokens: of the longest answer; None takes the card's.
        timeout_s: longest that the exporter may take.

    Returns:
        The manifest, without `files`.

    Raises:
        ConfigError: another precision or batch, or questions that the model can't read.
        ModelError: another architecture, weights beyond float16, an export that the runtime wouldn't take.
        DialectError: the checkpoint has a dense head and no words.
        MissingDependencyError: the exporter or onnx isn't installed.
        EngineError: the exporter failed.
    """
    if precision != "float16":
        raise ConfigError(
            f"precision is {precision!r}; Edge-LLM's graphs are made in float16. FP8, NVFP4 and INT4 are made of the "
            "checkpoint by tensorrt-edgellm-quantize on a machine with a GPU"
        )
    checkpoint = open_checkpoint(source)
    dialects = _dialects(estimator, checkpoint)
    program = find_exporter(exporter)
    sizes = plan_sizes(
        estimator, source, camera, dialects, batch=batch, question_tokens=question_tokens, answer_tokens=answer_tokens
    )
    with tempfile.TemporaryDirectory(prefix="depthlm-edge-llm-") as scratch:
        staged = stage(checkpoint, Path(scratch))
        run_exporter(program, staged.folder, out / GRAPHS, timeout_s)
    version = check_export(out / GRAPHS, checkpoint.config)
    write_scripts(out, sizes, version)
    return _manifest(estimator, checkpoint, dialects, sizes, staged, version)


def _dialects(estimator: Estimator, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The dialects that the engine can be asked in.

    Raises:
        ModelError: Edge-LLM doesn't know the architecture.
        DialectError: there are none.
    """
    card = estimator.card
    if checkpoint.architecture not in ARCHITECTURES:
        raise ModelError(
            f"{card.name}: TensorRT Edge-LLM has no vision tower of model_type {checkpoint.architecture!r} and would "
            f"export the language model alone; it knows {' and '.join(ARCHITECTURES)}. Use target onnx for a dense "
            "head, or a server for Pixtral"
        )
    spoken = tuple(dialect for dialect in card.dialects if dialect in TEXT_DIALECTS)
    if not spoken:
        raise DialectError(
            f"{card.name} speaks {', '.join(card.dialects) or 'no dialect'}, and TensorRT Edge-LLM answers in words "
            "only: its graphs don't give the states that a depth head reads. Export with --target onnx, which TensorRT "
            "runs on a Jetson too"
        )
    return spoken


def _manifest(
    estimator: Estimator,
    checkpoint: Checkpoint,
    dialects: tuple[str, ...],
    sizes: Sizes,
    staged: Staged,
    version: str,
) -> Manifest:
    card, model = estimator.card, estimator.engine.info.model
    warnings = []
    if staged.dtypes != ("float16",):
        warnings.append(
            f"weights were {', '.join(staged.dtypes)} and are float16 now ({staged.flushed:.2%} became zero); values "
            "inside the network can overflow where bfloat16 didn't: the parity check on the device decides"
        )
    if "dense" in card.dialects:
        warnings.append("the dense head stays behind; export it with --target onnx")
    extra: dict[str, Any] = {
        "edgellm_version": version,
        "parameters": checkpoint.parameters,
        "sizes": sizes.as_dict(),
        "warnings": warnings,
    }
    return Manifest(
        target="edge-llm",
        model=card.name,
        source=checkpoint.folder.name if Path(model).is_dir() else model,
        source_sha256={path.name: sha256_of(path) for path in sorted(set(checkpoint.shards.values()))},
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={
            "depthlm_ros": __version__,
            "tensorrt-edgellm": version,
            **{name: metadata.version(name) for name in ("torch", "transformers")},
        },
        precision="float16",
        dialects=dialects,
        focal_px=card.focal_px,
        policy=estimator.policy,
        image={
            "max_width": sizes.width,
            "max_height": sizes.height,
            "image_tokens": sizes.image_tokens,
        },
        extra=extra,
    )
