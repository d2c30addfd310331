"""Options of TensorRT-LLM's LLM API: those beside a checkpoint, those by default, and how they are said to `LLM`."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import yaml

from depthlm_ros.engines.tensorrt_llm_contract import PARAMETERS, parameters
from depthlm_ros.errors import ModelError

if TYPE_CHECKING:
    from depthlm_ros.engines.processor import PromptProcessor

_LOG = logging.getLogger(__name__)
SETTINGS_FILE = "llm_api.yaml"
"""Options of the LLM API beside a checkpoint; `trtllm-serve --extra_llm_api_options` reads the same."""

MAX_BATCH = 64
MAX_NUM_TOKENS = 8192
# Of what is free when the engine starts; its own default of 0.9 leaves nothing to a camera pipeline on the same GPU.
GPU_MEMORY_FRACTION = 0.6
# Where no export says how long prompts get: image tokens of the largest view that is met, and text.
_MOST_IMAGE_TOKENS = 4096
_TEXT_TOKENS = 1024
_NOT_IN_A_FILE = frozenset(("model", "tokenizer", "tokenizer_revision", "revision"))


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
        raise ModelError(f"{path} is not valid YAML ({str(error).splitlines()[0]}); export the model again") from error
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
    if others := sorted(_NOT_IN_A_FILE.intersection(settings)):
        # The checkpoint was looked at; another one would be loaded past all checks.
        raise ModelError(f"{SETTINGS_FILE} sets {', '.join(others)}, which belongs to the node's parameters; remove it")
    told = {key: value for key, value in settings.items() if key not in ("kv_cache_config", "trust_remote_code")}
    return {
        # A model's own code is never run, whatever lies in the file.
        **known(api, "LLM", {**told, "trust_remote_code": False}),
        "model": model,
        "kv_cache_config": api.KvCacheConfig(**known(api, "KvCacheConfig", cache)),
    }


def known(api: ModuleType, name: str, told: dict[str, Any]) -> dict[str, Any]:
    """What a class takes of what we would like to say; what the engine can't do without, or nobody knows, stays in.

    Args:
        api: `tensorrt_llm.llmapi`.
        name: of the class, a key of `PARAMETERS`.
        told: values by name; None for what isn't to be said.
    """
    taken = parameters(api, name)
    spared = PARAMETERS[name].wanted
    dropped = [key for key in told if taken is not None and key not in taken and key in spared]
    if dropped:
        _LOG.info("%s of this TensorRT-LLM doesn't take %s", name, ", ".join(dropped))
    return {key: value for key, value in told.items() if key not in dropped and value is not None}
