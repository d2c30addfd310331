"""`depthlm export --target tensorrt-llm`: a checkpoint laid out for TensorRT-LLM, and what starts it there.

There is no engine file any more: TensorRT-LLM removed its builder and loads checkpoints of transformers. What is left
to export is a folder that its releases read as it is meant, its options for the camera's questions, and `serve.sh`.
"""

from __future__ import annotations

from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
import yaml

from depthlm_ros import __version__
from depthlm_ros.camera import Camera
from depthlm_ros.engines.base import ImageGrid
from depthlm_ros.engines.checkpoint import Checkpoint, open_checkpoint, open_processor
from depthlm_ros.engines.processor import PromptProcessor
from depthlm_ros.engines.tensorrt_llm_engine import check_architecture
from depthlm_ros.engines.tensorrt_llm_formats import HOW_TO_QUANTISE, PLAIN, check_format, stored_format
from depthlm_ros.engines.tensorrt_llm_settings import (
    GPU_MEMORY_FRACTION,
    MAX_BATCH,
    MAX_NUM_TOKENS,
    SETTINGS_FILE,
    engine_settings,
)
from depthlm_ros.engines.transformers_engine import TransformersEngine
from depthlm_ros.errors import ConfigError, DialectError, EngineError, ModelError
from depthlm_ros.estimator import Estimator
from depthlm_ros.manifest import Manifest, sha256_of
from depthlm_ros.prompts import compact_question, coordinates_question, marker_question
from depthlm_ros.references import default_frames
from depthlm_training.edge_llm_sizes import Sizes, plan_sizes
from depthlm_training.tensorrt_llm_layout import Weights, link_weights, write_small_files, write_weights

SERVE_FILE = "serve.sh"
# A block of the cache (KvCacheConfig.tokens_per_block) is never shared by halves.
_BLOCK = 32
_CHECK_TOKENS = 16
_PACKAGES = ("torch", "transformers", "safetensors")

SETTINGS_HEAD = """\
# Options of TensorRT-LLM's LLM API for {model}, read by {serve} and by engine tensorrt_llm.
# An image of this camera has {image_tokens} tokens, the longest question {prompt} with its image, the longest answer
# {answer}. Where the GPU is shared or small, lower free_gpu_memory_fraction and max_batch_size.
"""
SERVE_TEXT = """\
#!/bin/sh
# Serves {model} by TensorRT-LLM. Options of trtllm-serve may follow: ./{serve} --port 8001. The node asks it with its
# parameters `engine: openai` and `server_urls: http://127.0.0.1:8000`.
#
# Run it where TensorRT-LLM is installed, such as NVIDIA's container tensorrt-llm/release (1.2 or newer), on an NVIDIA
# GPU {gpu}. The server asks for no key: leave it on this host, or behind a proxy that does.
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd) || exit 1
# It reports its use to its makers unless told not to.
export TRTLLM_NO_USAGE_STATS="${{TRTLLM_NO_USAGE_STATS:-1}}"
exec trtllm-serve "$here" --host 127.0.0.1 --port 8000 --extra_llm_api_options "$here/{settings}" "$@"
"""


def export_tensorrt_llm(
    estimator: Estimator,
    source: Path,
    out: Path,
    camera: Camera,
    *,
    precision: str = "bfloat16",
    gpu: str = "",
    quantised: Path | None = None,
    max_batch_size: int = MAX_BATCH,
    gpu_memory: float = GPU_MEMORY_FRACTION,
) -> Manifest:
    """Fills an empty folder with the checkpoint, the LLM API's options and `serve.sh`.

    Args:
        estimator: with the checkpoint in transformers; prepares images and holds card and policy.
        source: folder of the checkpoint.
        out: an empty folder.
        camera: of the images; its view sets the limits of lengths.
        precision: "bfloat16" or "float16" of the stored weights, or the format of `quantised`.
        gpu: that it will run on, as `tensorrt_llm_formats.generation_of` takes it; empty for any.
        quantised: folder into which NVIDIA's Model Optimizer exported the same checkpoint, quantised.
        max_batch_size: most questions in a pass.
        gpu_memory: share of the free GPU memory that the cache takes.

    Returns:
        The manifest, without `files`.

    Raises:
        ConfigError: a precision that the model or the GPU doesn't run, a GPU that TensorRT-LLM doesn't run on, limits
            out of range.
        ModelError: an architecture, config or quantisation that it doesn't read.
        DialectError: a model that speaks in maps only.
        EngineError: the folder doesn't answer as the checkpoint does.
    """
    _check_limits(max_batch_size, gpu_memory)
    checkpoint = open_checkpoint(source)
    check_architecture(checkpoint)
    stored = _chosen_format(checkpoint, precision, gpu, quantised)
    dialects = tuple(dialect for dialect in estimator.card.dialects if dialect != "dense")
    if estimator.card.dialects and not dialects:
        raise DialectError(
            f"{estimator.card.name} speaks in maps only, and TensorRT-LLM has no depth head; export with --target onnx"
        )
    if quantised is None:
        notes = write_small_files(checkpoint, out, precision, estimator.engine.grid)
        weights = write_weights(checkpoint, out, precision)
        check_answers(estimator, checkpoint, out, camera, precision if weights.lossy else "")
    else:
        notes, weights = _take_quantised(quantised, out, estimator.engine.grid), Weights(True, True, ())
    if weights.left_out:
        notes.append(f"the depth head ({len(weights.left_out)} weights) was left out: TensorRT-LLM has none")
    sizes = plan_sizes(estimator, out, camera, dialects)
    _write_settings(estimator.card.name, sizes, out, max_batch_size, gpu_memory, gpu)
    return Manifest(
        target="tensorrt-llm",
        model=estimator.card.name,
        source=estimator.engine.info.model if "/" in estimator.card.source else source.name,
        source_sha256={path.name: sha256_of(path) for path in sorted(source.glob("*.safetensors"))},
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"depthlm_ros": __version__, **{name: metadata.version(name) for name in _PACKAGES}},
        precision=stored or precision,
        dialects=dialects,
        focal_px=estimator.card.focal_px,
        policy=estimator.policy,
        image={"max_width": sizes.width, "max_height": sizes.height, "image_tokens": sizes.image_tokens},
        extra={"gpu": gpu, "notes": notes, "linked": weights.linked, "rounded": weights.lossy},
    )


def check_answers(
    estimator: Estimator, checkpoint: Checkpoint, out: Path, camera: Camera, rounded_to: str = ""
) -> list[str]:
    """Makes sure that the folder's weights, tokenizer and processor answer as the checkpoint's, token for token.

    Args:
        estimator: prepares the image.
        checkpoint: what was exported.
        out: the folder.
        camera: of the image.
        rounded_to: format that the weights were rounded to; the checkpoint's are rounded alike before they are asked.

    Returns:
        The answers.

    Raises:
        EngineError: an answer differs; both are named.
    """
    frame = default_frames(camera, 1)[0]
    image = estimator.prepare(frame.image, camera).image
    card = estimator.card
    questions = [coordinates_question(0, card.coordinate_range // 2, card.coordinate_range), marker_question()]
    questions += [compact_question(1, 1, card.compact_range), "How far is it?"]
    said = []
    for folder in (checkpoint.folder, out):
        # Plain, so that no faster path has copies of the weights from before they are rounded.
        engine = TransformersEngine.load(
            folder, system_text=card.system_text, device="cpu", dtype="float32", plain=True
        )
        if rounded_to and folder != out:
            with torch.no_grad():
                for weight in engine.model.parameters():
                    weight.copy_(weight.to(getattr(torch, rounded_to)))
        answers = engine.answer_shared(image, questions, _CHECK_TOKENS)
        said.append([(answer.text, answer.token_ids) for answer in answers])
        engine.close()
    for question, ours, theirs in zip(questions, *said, strict=True):
        if ours != theirs:
            raise EngineError(
                f"what was laid out for TensorRT-LLM answers {theirs[0]!r} to {question!r}, {checkpoint.name} answers "
                f"{ours[0]!r}; nothing was exported: open an issue with its config.json and tokenizer_config.json"
            )
    return [text for text, _ in said[0]]


def _chosen_format(checkpoint: Checkpoint, precision: str, gpu: str, quantised: Path | None) -> str:
    """The quantised format of the export, "" for plain numbers."""
    check_format(precision, checkpoint.architecture, gpu)
    if own := stored_format(checkpoint.folder):
        raise ModelError(
            f"{checkpoint.name} is quantised already ({own}), so that nothing here can tell what it should answer; "
            "give the checkpoint that it was made from as the model, and this folder as `quantised`"
        )
    if quantised is None:
        if precision not in PLAIN:
            raise ConfigError(
                f"precision {precision!r} needs weights that were calibrated for it: quantise the checkpoint "
                f"{HOW_TO_QUANTISE.format(format=precision)}, and give that folder as `quantised`"
            )
        return ""
    found = stored_format(quantised)
    if not found:
        raise ConfigError(f"{quantised} isn't quantised; leave `quantised` out, or quantise it "
                          f"{HOW_TO_QUANTISE.format(format='fp8')}")  # fmt: skip
    architecture = open_processor(quantised).architecture
    if architecture != checkpoint.architecture:
        raise ConfigError(f"{quantised} has model_type {architecture!r}, the checkpoint {checkpoint.architecture!r}")
    if precision != found:
        raise ConfigError(f"precision is {precision!r}, {quantised} is in {found!r}; give --precision {found}")
    return found


def _take_quantised(folder: Path, out: Path, grid: ImageGrid) -> list[str]:
    """Lays out what the Model Optimizer wrote: small files as for any checkpoint, weights as they are."""
    checkpoint = open_checkpoint(folder)
    link_weights(checkpoint, out)
    text = checkpoint.config.get("text_config") or checkpoint.config
    told = (text.get(key) or checkpoint.config.get(key) for key in ("dtype", "torch_dtype"))
    notes = write_small_files(checkpoint, out, next(filter(None, told), "bfloat16"), grid)
    PromptProcessor(open_processor(out))
    return [*notes, f"weights are those of {folder.name}, quantised: only a GPU can check what they answer"]


def _write_settings(model: str, sizes: Sizes, out: Path, max_batch_size: int, gpu_memory: float, gpu: str) -> None:
    longest = -(-(sizes.prompt_tokens + sizes.answer_tokens + 1) // _BLOCK) * _BLOCK
    # The vision tower's patches pass through buffers of the same size, four patches a token.
    patches = 4 * sizes.image_tokens * sizes.images
    settings = engine_settings(
        longest,
        max_num_tokens=max(MAX_NUM_TOKENS, patches),
        max_batch_size=max_batch_size,
        gpu_memory=gpu_memory,
    )
    # In comments of a script a name must not begin a line of its own.
    model, gpu = " ".join(model.split()), " ".join(gpu.split())
    head = SETTINGS_HEAD.format(
        model=model,
        serve=SERVE_FILE,
        image_tokens=sizes.image_tokens,
        prompt=sizes.prompt_tokens,
        answer=sizes.answer_tokens,
    )
    (out / SETTINGS_FILE).write_text(head + yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    serve = out / SERVE_FILE
    told = f"such as {gpu}" if gpu else "from Ampere on"
    serve.write_text(
        SERVE_TEXT.format(model=model, serve=SERVE_FILE, settings=SETTINGS_FILE, gpu=told), encoding="utf-8"
    )
    serve.chmod(0o755)


def _check_limits(max_batch_size: int, gpu_memory: float) -> None:
    if max_batch_size < 1:
        raise ConfigError(f"max_batch_size is {max_batch_size}; give 1 or more")
    if not 0 < gpu_memory < 1:
        raise ConfigError(f"gpu_memory is {gpu_memory}; give a share above 0 and below 1")
