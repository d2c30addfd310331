"""Runs a checkpoint in NVIDIA's TensorRT-LLM, in this process, through its LLM API.

The package wants torch and transformers of its own, so that this engine lives in its container or environment; where
that isn't wanted, `trtllm-serve` runs the same folder for engine openai. What is promised of its API, and checked when
it is loaded, stands in `tensorrt_llm_contract.py`. Nothing here was run on a GPU yet: whatever it answers has to pass
the parity check before a node takes it.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from depthlm_ros.engines.base import EngineInfo
from depthlm_ros.engines.checkpoint import Checkpoint, open_checkpoint, open_processor
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.engines.processor import PromptProcessor
from depthlm_ros.engines.tensorrt_llm_backend import LlmBackend
from depthlm_ros.engines.tensorrt_llm_contract import MODULE, RECORDED_FOR, check_contract, parameters
from depthlm_ros.engines.tensorrt_llm_formats import PLAIN, check_format, is_known, stored_format
from depthlm_ros.engines.tensorrt_llm_settings import (
    MAX_BATCH,
    SETTINGS_FILE,
    default_settings,
    known,
    llm_arguments,
    read_settings,
)
from depthlm_ros.engines.worded import Ask, WordedEngine
from depthlm_ros.errors import ConfigError, EngineError, MissingDependencyError, ModelError
from depthlm_ros.machine import this_machine
from depthlm_ros.manifest import read_manifest, require_manifest

if TYPE_CHECKING:
    from depthlm_ros.cards import ModelCard

_LOG = logging.getLogger(__name__)
INSTALL = (
    "TensorRT-LLM {state}; it needs an NVIDIA GPU and a Python of its own: run: pip install tensorrt_llm (or start "
    "NVIDIA's container tensorrt-llm/release), and install this package beside it. To keep it apart, start serve.sh of "
    "the export there and use engine openai"
)
_PROBE = "How far is it?"
_PROBE_TOKENS = 4


def load_tensorrt_llm(source: str | Path, card: ModelCard, options: EngineOptions) -> WordedEngine:
    """Loads an export, or a checkpoint as it is, into TensorRT-LLM.

    Args:
        source: folder or hub id.
        card: says which system text and revision the model wants.
        options: of the engine.

    Raises:
        MissingDependencyError: the package isn't there, or lacks what is needed of it.
        ConfigError: a device that it doesn't run on.
        ModelError: it can't run the model, or not on this GPU.
        EngineError: it loads the model and can't answer.
    """
    _check_device(options.device, options.dtype)
    folder = Path(source).expanduser()
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is not None:
        manifest = require_manifest(folder, "tensorrt_llm")
    checkpoint = open_checkpoint(source, card.revision) if folder.is_dir() else open_processor(source, card.revision)
    check_architecture(checkpoint)
    stored = stored_format(checkpoint.folder)
    if stored:
        here = this_machine().compute_capability
        check_format(stored, checkpoint.architecture, here if is_known(here) else "")
    api, version = _api()
    processor = PromptProcessor(checkpoint, card.system_text)
    own = read_settings(checkpoint.folder)
    settings = own or default_settings(processor, checkpoint.config)
    reasons = [f"TensorRT-LLM with the options of {SETTINGS_FILE}" if own else "TensorRT-LLM with options by default"]

    def build(reuse: bool) -> LlmBackend:
        try:
            arguments = llm_arguments(api, str(source if not folder.is_dir() else folder), settings, reuse=reuse)
            told = {**arguments, **known(api, "LLM", {"dtype": options.dtype, "revision": card.revision})}
            llm = api.LLM(**told)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"TensorRT-LLM {version} can't load {source} ({type(error).__name__}: {_first(error)}); export the "
                f"checkpoint for it (depthlm export {card.name} OUT --target tensorrt-llm), or lower "
                f"free_gpu_memory_fraction and max_batch_size in {SETTINGS_FILE}"
            ) from error
        return LlmBackend(
            llm,
            api,
            processor,
            reuse=reuse,
            in_flight=options.batch_size or settings.get("max_batch_size") or MAX_BATCH,
            **_ending(checkpoint.folder, processor),
        )

    backend, guided = _probed(build, _reuse_wanted(api, options, reasons), processor, reasons, options.guided)
    info = EngineInfo(
        engine="tensorrt_llm",
        model=str(source),
        architecture=checkpoint.architecture,
        device="cuda:0",
        dtype=stored or (_stored_dtype(checkpoint.config) if options.dtype == "auto" else options.dtype),
        reasons=tuple(reasons),
        parameters=checkpoint.parameters,
        dense=False,
        distributions=False,
        version=f"tensorrt_llm {version}",
    )
    return WordedEngine(backend, info, processor, guided)


def check_architecture(checkpoint: Checkpoint) -> None:
    """Refuses what TensorRT-LLM has no model for.

    Raises:
        ModelError: a Pixtral checkpoint in the form of Llava.
    """
    if checkpoint.architecture == "llava":
        raise ModelError(
            f"{checkpoint.name}: TensorRT-LLM has no model for Pixtral in the form of Llava (its Llava models have "
            "CLIP towers, its Mistral 3 another projector); run it with engine transformers, or in vLLM with engine "
            "openai"
        )


def _reuse_wanted(api: ModuleType, options: EngineOptions, reasons: list[str]) -> bool:
    """Whether blocks of the cache shall be reused; says why where not."""
    taken = parameters(api, "LLM.generate_async")
    fault = ""
    if not options.prefix_reuse:
        fault = "prefix_reuse is false"
    elif taken is None or "cache_salt" not in taken:
        fault = "this release can't keep images of the same bytes and other shapes apart"
    if fault:
        reasons.append(f"no reuse of cache blocks: {fault}")
    return not fault


def _probed(
    build: Callable[[bool], LlmBackend], reuse: bool, processor: PromptProcessor, reasons: list[str], guided: bool
) -> tuple[LlmBackend, bool]:
    """The backend, and whether its guides hold; built a second time where reuse changes its answers."""
    backend = build(reuse)
    try:
        if reuse:
            fault = _reuse_fault(backend, processor)
            if fault:
                _LOG.warning("TensorRT-LLM starts again without reuse of cache blocks: %s", fault)
                backend.close()
                reuse, backend = False, build(False)
            told = f"no reuse of cache blocks: {fault}" if fault else "questions about an image reuse its cache blocks"
            reasons.append(told)
        if not reuse:
            backend.ask([Ask((_probe_images(processor)[0],), _PROBE, _PROBE_TOKENS)])
        holds = guided and _guides(backend, processor)
    except BaseException:
        backend.close()
        raise
    if guided and not holds:
        backend.complaints = (
            "TensorRT-LLM doesn't keep to guides here, so that answers are read as they come; set "
            f"guided_decoding_backend: xgrammar in {SETTINGS_FILE}",
        )
    return backend, holds


def _reuse_fault(backend: LlmBackend, processor: PromptProcessor) -> str:
    """What goes wrong with blocks that are reused; "" where nothing does."""
    first, second = _probe_images(processor)
    one, other = Ask((first,), _PROBE, _PROBE_TOKENS), Ask((second,), _PROBE, _PROBE_TOKENS)
    try:
        fresh, again = backend.ask([one])[0], backend.ask([one])[0]
        # The second image differs in its lower half only, so that its first blocks could be taken for the first one's.
        reused, alone = backend.ask([other])[0], backend.ask([other], salt="probe ")[0]
    except EngineError as error:
        return str(error)
    if fresh.text != again.text:
        return f"the same question was answered {fresh.text!r}, then {again.text!r}"
    if reused.text != alone.text:
        return f"a second image was answered {reused.text!r} after the first and {alone.text!r} by itself"
    return ""


def _guides(backend: LlmBackend, processor: PromptProcessor) -> bool:
    try:
        return backend.ask([Ask((_probe_images(processor)[0],), _PROBE, _PROBE_TOKENS, "7")])[0].text.strip() == "7"
    except EngineError as error:
        _LOG.warning("a guided question failed: %s", error)
        return False


def _probe_images(processor: PromptProcessor) -> tuple[np.ndarray, np.ndarray]:
    """Two (H, W, 3) uint8 images of a size that is kept, which differ in their lower half."""
    side = max(2, -(-int(np.ceil(processor.grid.min_pixels**0.5)) // processor.grid.multiple)) * processor.grid.multiple
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    other = noise.copy()
    other[side // 2 :] = 255 - other[side // 2 :]
    return noise, other


def _api() -> tuple[ModuleType, str]:
    """The LLM API and its version.

    Raises:
        MissingDependencyError: it isn't there, can't be imported or lacks what is needed.
    """
    # It reports its use to its makers unless told not to.
    os.environ.setdefault("TRTLLM_NO_USAGE_STATS", "1")
    try:
        package = importlib.import_module(MODULE.partition(".")[0])
        api = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        state = "is not installed" if error.name == MODULE.partition(".")[0] else f"lacks {error.name}"
        raise MissingDependencyError(INSTALL.format(state=state)) from error
    except Exception as error:
        # A transformers that doesn't fit fails in many ways.
        raise MissingDependencyError(INSTALL.format(state=f"can't be imported ({_first(error)})")) from error
    version = str(getattr(package, "__version__", "of an unknown version"))
    if missing := check_contract(api):
        raise MissingDependencyError(
            f"TensorRT-LLM {version} lacks {', '.join(missing)}, which this package needs; install a release of the "
            f"series {RECORDED_FOR}: pip install tensorrt_llm"
        )
    return api, version


def _stored_dtype(config: dict) -> str:
    """The weights' format by config.json, in either of its names; "auto" where it doesn't tell."""
    places = (config, config.get("text_config") or {})
    told = (place.get(name) for place in places for name in ("dtype", "torch_dtype"))
    return str(next(filter(None, told), "auto"))


def _check_device(device: str, dtype: str) -> None:
    machine = this_machine()
    if machine.l4t:
        raise ModelError(
            f"TensorRT-LLM doesn't run on {machine.board or 'Jetson'}; export with --target edge-llm and take engine "
            "edge_llm"
        )
    if device not in ("auto", "cuda", "cuda:0"):
        raise ConfigError(
            f"device is {device!r}; TensorRT-LLM takes the first GPU that it sees: leave device at auto, and set "
            "CUDA_VISIBLE_DEVICES for another"
        )
    if dtype not in ("auto", *PLAIN):
        raise ConfigError(f"dtype is {dtype!r}; TensorRT-LLM computes in {' or '.join(PLAIN)}, or as stored with auto")


def _ending(folder: Path, processor: PromptProcessor) -> dict[str, Any]:
    """When an answer ends, as in the checkpoint's generation_config.json."""
    path = folder / "generation_config.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); copy it again") from error
    if not isinstance(told, dict):
        raise ModelError(f"{path} holds {type(told).__name__} instead of a mapping; copy it again")
    ids = told.get("eos_token_id")
    ids = processor.tokenizer.eos_token_id if ids is None else ids
    if ids is None:
        raise ModelError(f"{folder} names no end-of-sequence token; add eos_token_id to generation_config.json")
    return {
        "stop_ids": ids if isinstance(ids, list) else [ids],
        "repetition_penalty": float(told.get("repetition_penalty") or 1.0),
    }


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


