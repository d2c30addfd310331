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
import yaml

from depthlm_ros.engines.base import EngineInfo
from depthlm_ros.engines.checkpoint import Checkpoint, open_checkpoint, open_processor
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.engines.processor import PromptProcessor
from depthlm_ros.engines.tensorrt_llm_backend import LlmBackend
from depthlm_ros.engines.tensorrt_llm_contract import (
    MODULE,
    PARAMETERS,
    RECORDED_FOR,
    check_contract,
    parameters,
)
from depthlm_ros.engines.tensorrt_llm_formats import check_format, stored_format
from depthlm_ros.engines.worded import Ask, WordedEngine
from depthlm_ros.errors import ConfigError, EngineError, MissingDependencyError, ModelError
from depthlm_ros.machine import this_machine
from depthlm_ros.manifest import read_manifest, require_manifest

if TYPE_CHECKING:
    from depthlm_ros.cards import ModelCard

_LOG = logging.getLogger(__name__)
SETTINGS_FILE = "llm_api.yaml"
"""Options of the LLM API beside a checkpoint; `trtllm-serve --extra_llm_api_options` reads the same."""

INSTALL = (
    "TensorRT-LLM {state}; it needs an NVIDIA GPU and a Python of its own: run: pip install tensorrt_llm (or start "
    "NVIDIA's container tensorrt-llm/release), and install this package beside it. To keep it apart, start serve.sh of "
    "the export there and use engine openai"
)
MAX_BATCH = 64
MAX_NUM_TOKENS = 8192
# Of what is free when the engine starts; its own default of 0.9 leaves nothing to a camera pipeline on the same GPU.
GPU_MEMORY_FRACTION = 0.6
# Where no export says how long prompts get: image tokens of the largest view that is met, and text.
_MOST_IMAGE_TOKENS = 4096
_TEXT_TOKENS = 1024
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
    _check_device(options.device)
    folder = Path(source).expanduser()
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is not None:
        manifest = require_manifest(folder, "tensorrt_llm")
    checkpoint = open_checkpoint(source, card.revision) if folder.is_dir() else open_processor(source, card.revision)
    check_architecture(checkpoint)
    stored = stored_format(checkpoint.folder)
    if stored:
        check_format(stored, checkpoint.architecture, this_machine().compute_capability)
    api, version = _api()
    processor = PromptProcessor(checkpoint, card.system_text)
    settings = read_settings(checkpoint.folder) or default_settings(processor, checkpoint.config)
    reasons = [f"TensorRT-LLM {version} with the settings of {SETTINGS_FILE}" if manifest else "settings by default"]
    dtype = options.dtype if options.dtype != "auto" else "auto"

    def build(reuse: bool) -> LlmBackend:
        arguments = llm_arguments(api, str(source if not folder.is_dir() else folder), settings, reuse=reuse)
        told = {**arguments, **_known(api, "LLM", {"dtype": dtype, "revision": card.revision})}
        try:
            llm = api.LLM(**told)
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

    backend, guided = _probed(build, processor, reasons, options)
    info = EngineInfo(
        engine="tensorrt_llm",
        model=str(source),
        architecture=checkpoint.architecture,
        device="cuda:0",
        dtype=stored or (dtype if dtype != "auto" else str(checkpoint.config.get("dtype") or "bfloat16")),
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


def read_settings(folder: Path) -> dict[str, Any]:
    """`llm_api.yaml` of a folder; nothing where there is none.

    Raises:
        ModelError: it isn't a mapping.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ModelError(f"{path} is not valid YAML ({_first(error)}); export the model again") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("kv_cache_config", {}), dict):
        raise ModelError(f"{path} holds no mapping of options; export the model again")
    return settings


def default_settings(processor: PromptProcessor, config: dict[str, Any]) -> dict[str, Any]:
    """Settings for a checkpoint that wasn't exported: room for large views."""
    tokens = min(processor.grid.max_pixels // processor.patch_px**2, _MOST_IMAGE_TOKENS)
    longest = (config.get("text_config") or config).get("max_position_embeddings") or tokens + _TEXT_TOKENS
    return engine_settings(min(tokens + _TEXT_TOKENS, longest))


def engine_settings(
    max_seq_len: int,
    *,
    max_num_tokens: int = MAX_NUM_TOKENS,
    max_batch_size: int = MAX_BATCH,
    gpu_memory: float = GPU_MEMORY_FRACTION,
) -> dict[str, Any]:
    """Options of the LLM API.

    Args:
        max_seq_len: of a prompt with its image tokens and its answer.
        max_num_tokens: of one pass; at least `max_seq_len`, so that no prompt has to be cut into chunks.
        max_batch_size: most questions in a pass.
        gpu_memory: share of the free GPU memory that the cache takes.
    """
    return {
        # Without it every guide is dropped without a word.
        "guided_decoding_backend": "xgrammar",
        "kv_cache_config": {"enable_block_reuse": True, "free_gpu_memory_fraction": gpu_memory},
        "max_batch_size": max_batch_size,
        "max_beam_width": 1,
        "max_num_tokens": max(max_num_tokens, max_seq_len),
        "max_seq_len": max_seq_len,
        "enable_chunked_prefill": False,
    }


def llm_arguments(api: ModuleType, model: str, settings: dict[str, Any], *, reuse: bool) -> dict[str, Any]:
    """What `LLM` is called with: what we would like to say is left out where it isn't known, the rest is said.

    Args:
        api: `tensorrt_llm.llmapi`.
        model: folder or hub id.
        settings: as in `llm_api.yaml`; a name that nobody knows is left in, so that its typing error shows.
        reuse: whether blocks of the cache are reused.
    """
    cache = {**settings.get("kv_cache_config", {})}
    cache["enable_block_reuse"] = reuse and cache.get("enable_block_reuse", True)
    told = {key: value for key, value in settings.items() if key != "kv_cache_config"}
    return {
        "model": model,
        "kv_cache_config": api.KvCacheConfig(**_known(api, "KvCacheConfig", cache)),
        **_known(api, "LLM", {"trust_remote_code": False, **told}),
    }


def _known(api: ModuleType, name: str, told: dict[str, Any]) -> dict[str, Any]:
    taken = parameters(api, name)
    spared = PARAMETERS[name].wanted
    dropped = [key for key in told if taken is not None and key not in taken and key in spared]
    if dropped:
        _LOG.info("%s of this TensorRT-LLM doesn't take %s", name, ", ".join(dropped))
    return {key: value for key, value in told.items() if key not in dropped and value is not None}


def _probed(
    build: Callable[[bool], LlmBackend], processor: PromptProcessor, reasons: list[str], options: EngineOptions
) -> tuple[LlmBackend, bool]:
    """The backend, and whether its guides hold; built a second time where reuse changes its answers."""
    backend = build(options.prefix_reuse)
    try:
        fault = _reuse_fault(backend, processor) if options.prefix_reuse else "prefix_reuse is false"
        if not fault:
            reasons.append("cache blocks are reused between questions about an image")
        else:
            reasons.append(f"no reuse of cache blocks: {fault}")
            if options.prefix_reuse:
                _LOG.warning("TensorRT-LLM starts again without reuse of cache blocks: %s", fault)
                backend.close()
                backend = build(False)
            backend.ask([Ask((_probe_images(processor)[0],), _PROBE, _PROBE_TOKENS)])
        guided = options.guided and _guides(backend, processor)
    except BaseException:
        backend.close()
        raise
    if options.guided and not guided:
        backend.complaints = (
            "TensorRT-LLM doesn't keep to guides here, so that answers are read as they come; set "
            f"guided_decoding_backend: xgrammar in {SETTINGS_FILE}",
        )
    return backend, guided


def _reuse_fault(backend: LlmBackend, processor: PromptProcessor) -> str:
    """What goes wrong with blocks that are reused; "" where nothing does."""
    if not backend.salted:
        return "this release can't keep images of the same bytes and other shapes apart"
    first, second = _probe_images(processor)
    one, other = Ask((first,), _PROBE, _PROBE_TOKENS), Ask((second,), _PROBE, _PROBE_TOKENS)
    try:
        fresh, again = backend.ask([one])[0], backend.ask([one])[0]
        # The second image differs in its last rows only, so that most of its blocks look like the first one's.
        reused, alone = backend.ask([other])[0], backend.ask([other], salt="probe")[0]
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
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingDependencyError(INSTALL.format(state=f"can't be imported ({_first(error)})")) from error
    version = str(getattr(package, "__version__", "of an unknown version"))
    if missing := check_contract(api):
        raise MissingDependencyError(
            f"TensorRT-LLM {version} lacks {', '.join(missing)}, which this package needs; install a release of the "
            f"series {RECORDED_FOR}: pip install tensorrt_llm"
        )
    return api, version


def _check_device(device: str) -> None:
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


def _ending(folder: Path, processor: PromptProcessor) -> dict[str, Any]:
    """When an answer ends, as in the checkpoint's generation_config.json."""
    path = folder / "generation_config.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); copy it again") from error
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


