"""The dense dialect as one ONNX graph: bytes of an image in, metres out, compared with the checkpoint before it stays.

The graph is made for one camera, since all of its sizes are fixed. Runtimes do best with such graphs, and whatever
depends on a size (positions, rotary angles, masks) is then computed here, by the code that the checkpoint runs with.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

from depthlm_ros import __version__
from depthlm_ros.camera import Camera
from depthlm_ros.engines.checkpoint import open_checkpoint
from depthlm_ros.engines.dense_head import load_head
from depthlm_ros.engines.graph_engine import GRAPH_FILE, INPUT, OUTPUT
from depthlm_ros.engines.linear import ACTIVATIONS
from depthlm_ros.errors import ConfigError, DialectError, EngineError, MissingDependencyError, ModelError
from depthlm_ros.manifest import Manifest, sha256_of
from depthlm_ros.onnx_precision import lower_precision
from depthlm_ros.prompts import dense_question
from depthlm_ros.references import camera_values
from depthlm_training.onnx_constants import check_resampling, constants_of
from depthlm_training.onnx_graph import DenseGraph

if TYPE_CHECKING:
    from depthlm_ros.engines.transformers_engine import TransformersEngine
    from depthlm_ros.estimator import Estimator

# Read by TensorRT 10.3 and by every onnxruntime that is still in use; newer ones bring nothing that is needed here.
OPSET = 18
# Relative difference from the checkpoint's depths: the largest of all pixels in float32; in float16, where single
# pixels at edges may differ by much, the median of each image. onnxruntime's CPU provider multiplies halves in float32,
# so that the second proves the conversion and the rounding of the weights; a GPU's products are for the device's check.
TOLERANCE = {"float32": 1e-4, "float16": 0.01}
# A protobuf file ends at 2 GB; larger weights lie beside the graph.
_EMBEDDED_BYTES = 1_500_000_000
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")


def export_onnx(
    estimator: Estimator, source: Path, out: Path, camera: Camera, *, precision: str = "float32"
) -> Manifest:
    """Exports the dense dialect of a checkpoint for one camera, as `model.onnx`.

    Args:
        estimator: the checkpoint in transformers, in float32 on a CPU.
        source: its folder.
        out: an empty folder to write into.
        camera: of the images that will come.
        precision: of the matrix products, a key of `TOLERANCE`; everything else is float32, and so is
            the dense head.

    Returns:
        The manifest, without `files`.

    Raises:
        ConfigError: an unknown precision, an estimator in another format than float32.
        DialectError: the model has no dense head.
        ModelError: an architecture, processor or layer that isn't known here.
        MissingDependencyError: onnx, onnxscript or onnxruntime isn't installed.
        EngineError: what was exported answers otherwise than the checkpoint; the message has the figure.
    """
    _require_packages()
    if precision not in TOLERANCE:
        raise ConfigError(
            f"precision is {precision!r}, target onnx has {' and '.join(TOLERANCE)}, which can be checked here; for "
            "TensorRT in bfloat16 export in float32 and run: depthlm build OUT --precision bf16"
        )
    engine = _exportable(estimator)
    blank = np.zeros((camera.height, camera.width, 3), np.uint8)
    view = estimator.prepare(blank, camera)
    width, height = view.camera.width, view.camera.height
    shown = engine.processor.shown(view.image)
    size = shown.shape[:2]
    check_resampling(engine.processor, (width, height), size)
    features = engine.model.config.get_text_config().hidden_size
    maps = len(engine.model.model.visual.deepstack_visual_indexes)
    head, mode = load_head(open_checkpoint(source), features, maps, engine.processor.patch_px)
    graph = DenseGraph(engine.model, head, mode, size, constants_of(engine, shown)).eval()
    path = out / GRAPH_FILE
    tokens = shown.shape[0] * shown.shape[1] // engine.processor.patch_px**2
    image = {
        "width": width,
        "height": height,
        "map_width": size[1],
        "map_height": size[0],
        "image_tokens": tokens,
        "multiple": engine.grid.multiple,
        "min_pixels": engine.grid.min_pixels,
        "max_pixels": engine.grid.max_pixels,
    }
    digests = {file.name: sha256_of(file) for file in sorted(source.glob("*.safetensors"))}
    told = {
        "model": estimator.card.name,
        "image": json.dumps(image),
        "focal_px": repr(estimator.card.focal_px),
        "policy": estimator.policy,
        "source_sha256": json.dumps(digests),
    }
    write_graph(graph, size, path, {f"depthlm.{key}": value for key, value in told.items()})
    if precision != "float32":
        lower_precision(path, path, precision)
    worst = check_graph(path, engine, _images(view.camera.fx, (width, height)), precision)
    return Manifest(
        target="onnx",
        model=estimator.card.name,
        source=source.name if Path(engine.info.model).is_dir() else engine.info.model,
        source_sha256=digests,
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"depthlm_ros": __version__, **{name: metadata.version(name) for name in _PACKAGES}},
        precision=precision,
        dialects=("dense",),
        focal_px=estimator.card.focal_px,
        policy=estimator.policy,
        image=image,
        camera=camera_values(camera),
        extra={
            "architecture": engine.info.architecture,
            "parameters": engine.info.parameters,
            "opset": OPSET,
            "relative_difference": worst,
        },
    )


def write_graph(graph: DenseGraph, size: tuple[int, int], path: Path, told: dict[str, str]) -> None:
    """Writes a graph as ONNX and checks that it is valid.

    Args:
        graph: in evaluation mode.
        size: (height, width) of its image.
        path: to write.
        told: metadata, texts by name.

    Raises:
        ModelError: it can't be exported.
        MissingDependencyError: onnxscript is too old.
    """
    import onnx

    bytes_ = sum(buffer.numel() * buffer.element_size() for buffer in graph.state_dict().values())
    with _quiet():
        try:
            with torch.no_grad():
                program = torch.onnx.export(
                    graph,
                    (torch.zeros(*size, 3, dtype=torch.uint8),),
                    input_names=[INPUT],
                    output_names=[OUTPUT],
                    opset_version=OPSET,
                    dynamo=True,
                    verbose=False,
                )
            _strip(program.model)
            program.model.metadata_props.update(told)
            program.save(str(path), external_data=bytes_ > _EMBEDDED_BYTES)
        except ImportError as error:
            # Each torch looks for a part of onnxscript that bears a version's name.
            raise MissingDependencyError(
                f"onnxscript {metadata.version('onnxscript')} is too old for torch {torch.__version__} ({error}); run: "
                "pip install --upgrade onnxscript"
            ) from error
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise ModelError(
                f"torch {torch.__version__} can't export the graph ({type(error).__name__}: {_first_line(error)}); "
                "take the versions of torch and onnxscript that the README names"
            ) from error
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(
            f"{path} isn't valid ONNX ({_first_line(error)}); take the versions of onnx and onnxscript that the README "
            "names"
        ) from error


def check_graph(path: Path, engine: TransformersEngine, images: Sequence[np.ndarray], precision: str) -> float:
    """Runs a graph in onnxruntime on the CPU and compares it with the checkpoint.

    Args:
        path: of the graph.
        engine: the checkpoint.
        images: (H, W, 3) uint8 RGB views.
        precision: of the graph, a key of `TOLERANCE`.

    Returns:
        The largest relative difference, as `TOLERANCE` counts it.

    Raises:
        EngineError: it is larger, or a depth isn't finite.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for image in images:
        ours = engine.depth_map(image, dense_question())
        (theirs,) = session.run([OUTPUT], {INPUT: np.ascontiguousarray(engine.processor.shown(image))})
        if theirs.shape != ours.shape:
            raise EngineError(f"the exported graph's map is {theirs.shape}, the checkpoint's {ours.shape}")
        summary = np.max if precision == "float32" else np.median
        difference = float(summary(np.abs(theirs - ours) / ours))
        worst = max(worst, float("inf") if np.isnan(difference) else difference)
    if worst > TOLERANCE[precision]:
        raise EngineError(
            f"the exported graph in {precision} differs from the checkpoint by {worst:.1e} of a depth, at most "
            f"{TOLERANCE[precision]:g} may be; "
            "export in precision float32, or with the versions of torch and onnxscript that the README names"
        )
    return worst


def _require_packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise MissingDependencyError(
                f'{name} is not installed, exporting to onnx needs it; run: pip install "depthlm_ros[export]"'
            ) from error


def _exportable(estimator: Estimator) -> TransformersEngine:
    """The engine, once it is known that a graph can be made of it."""
    engine, info = estimator.engine, estimator.engine.info
    if info.engine != "transformers" or info.dtype != "float32" or info.device != "cpu":
        raise ConfigError(
            f"the checkpoint is loaded by {info.engine} on {info.device} in {info.dtype}; export it from engine "
            "transformers on cpu in float32"
        )
    if not info.dense:
        raise DialectError(
            f"{estimator.card.name} has no dense head, and target onnx exports the dense dialect only; for a model "
            "that answers in words choose target edge-llm or tensorrt-llm"
        )
    if info.architecture != "qwen3_vl":
        raise ModelError(
            f"{estimator.card.name} is a {info.architecture}; target onnx knows qwen3_vl, which all published models "
            "with a dense head are"
        )
    text, vision = engine.model.config.get_text_config(), engine.model.config.vision_config
    for name, activation in (("language model", text.hidden_act), ("vision tower", vision.hidden_act)):
        if activation not in ACTIVATIONS:
            raise ModelError(f"the {name}'s activation is {activation!r}; known are {', '.join(sorted(ACTIVATIONS))}")
    if not engine.processor.shortcut:
        raise ModelError(
            f"the image processor of {estimator.card.name} does more than to resample and normalise; correct "
            "preprocessor_config.json, or use engine transformers"
        )
    return engine


def _images(focal_px: float, size: tuple[int, int]) -> list[np.ndarray]:
    """Views of rendered scenes and noise, (H, W, 3) uint8 RGB."""
    from depthlm_training.scenes import render_drive

    # Rendering takes a second per 100,000 pixels; what is stretched is as good a picture.
    share = min(1.0, (100_000 / (size[0] * size[1])) ** 0.5)
    small = max(16, round(size[0] * share)), max(16, round(size[1] * share))
    drive = render_drive(6, width=small[0], height=small[1], focal_px=focal_px * share, seed=6)
    images = [cv2.resize(image, size) for number, (image, _, _) in enumerate(drive) if number % 2 == 0]
    noise = np.random.default_rng(6).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return [*images, noise]


def _strip(model: object) -> None:
    """Leaves out where in this machine's sources each node came from."""
    model.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of its own inner affairs at length."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
