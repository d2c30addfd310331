"""A checkpoint as TensorRT-LLM reads it: the published layout of its architecture, which every release was tried with.

TensorRT-LLM brings transformers 4.57 (1.2 and 1.3 series), and reads config and names of weights itself as well:

- transformers 5 keeps rotary settings in `rope_parameters`, which 4.57 doesn't know;
- TensorRT-LLM takes Qwen2.5-VL's vision tower from names that begin with `visual.` and its rotary settings from
  `rope_scaling["type"]`, Qwen3-VL's tower from `model.visual.` and its number format from `text_config.dtype`;
- the image processor of 4.57 reads `min_pixels` and `max_pixels`; where only `size` is there it takes its own defaults,
  which shrink large images, and with them the focal length that the model relies on;
- 4.57 has no tokenizer class `TokenizersBackend`, and wants `extra_special_tokens` to be a mapping;
- a depth head is no part of these models there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from depthlm_ros.cards import CARD_FILE
from depthlm_ros.engines.base import ImageGrid
from depthlm_ros.engines.checkpoint import HEAD_PREFIX, SMALL_FILES, Checkpoint, read_json
from depthlm_ros.errors import ModelError
from depthlm_ros.manifest import ENGINE_FILE

_NAMES = {
    "qwen2_5_vl": ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")),
    "qwen3_vl": ((r"^visual\.", "model.visual."), (r"^model\.(?!visual\.|language_model\.)", "model.language_model.")),
}
_PROCESSORS = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
_VISION_THETA = 10000.0  # what 4.57 and TensorRT-LLM compute the towers' rotary angles with
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_SAFETENSORS = {"bfloat16": "BF16", "float16": "F16"}
_INDEX = "model.safetensors.index.json"
_TOKENIZER_5 = ("backend", "is_local", "local_files_only")
_NESTED = ("image_processor", "video_processor", "feature_extractor", "tokenizer")


@dataclass(frozen=True)
class Weights:
    """What was done to the weights.

    Attributes:
        linked: whether every file is the checkpoint's own.
        lossy: whether numbers were rounded.
        left_out: names that stay behind.
    """

    linked: bool
    lossy: bool
    left_out: tuple[str, ...]


def published_config(config: Mapping[str, Any], precision: str) -> tuple[dict[str, Any], list[str]]:
    """config.json in the published layout, readable by transformers 4.57 and 5.

    Args:
        config: of a Qwen2.5-VL or Qwen3-VL checkpoint.
        precision: of the weights.

    Returns:
        The new config, and what was left out of it, a sentence each.

    Raises:
        ModelError: rotary settings that TensorRT-LLM or 4.57 would take for others.
    """
    told = json.loads(json.dumps(config))
    notes = []
    if told.pop("auto_map", None):
        notes.append("auto_map was left out: code of a model's own is never run")
    head = [key for key in told if key.startswith("depth_head")]
    for key in [*head, "_name_or_path", "transformers_version", "torch_dtype", "dtype"]:
        told.pop(key, None)
    architecture = told["model_type"]
    text, vision = told.pop("text_config", None), told["vision_config"]
    vision["model_type"] = architecture
    if text is None:
        text, told = _split(told)
    for part in (text, vision):
        for key in ("_name_or_path", "architectures", "transformers_version", "auto_map", "torch_dtype", "dtype"):
            part.pop(key, None)
    _set_rope(text, architecture)
    _check_vision_rope(vision)
    tied = bool(told.pop("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    text["tie_word_embeddings"] = tied
    formats = {"dtype": precision, "torch_dtype": precision}
    if architecture == "qwen2_5_vl":
        text.pop("model_type", None)
        return {**text, **told, "vision_config": {**vision, **formats}, "tie_word_embeddings": tied, **formats}, notes
    text, vision = {**text, **formats}, {**vision, **formats}
    return {**told, "text_config": text, "vision_config": vision, "tie_word_embeddings": tied, **formats}, notes


def write_small_files(checkpoint: Checkpoint, out: Path, precision: str, grid: ImageGrid) -> list[str]:
    """Writes config, tokenizer and processor.

    Args:
        checkpoint: what is exported.
        out: folder to write into.
        precision: of the weights.
        grid: image sizes that the checkpoint's processor leaves alone.

    Returns:
        What was left out, a sentence each.

    Raises:
        ModelError: as `published_config`; no preprocessor_config.json.
    """
    folder = checkpoint.folder
    for pattern in SMALL_FILES:
        for path in sorted(folder.glob(pattern)):
            if not path.name.endswith(".index.json") and path.name not in (CARD_FILE, ENGINE_FILE):
                shutil.copyfile(path, out / path.name)
    config, notes = published_config(checkpoint.config, precision)
    _write(out / "config.json", config)
    _write(out / "tokenizer_config.json", _tokenizer(read_json(folder / "tokenizer_config.json")))
    _write_processor(folder, out, checkpoint.architecture, grid)
    left = sorted(path.name for path in folder.iterdir() if path.suffix in (".py", ".bin", ".pt", ".pth"))
    return [*notes, *([f"left behind: {', '.join(left)} (code and pickled weights)"] if left else [])]


def write_weights(checkpoint: Checkpoint, out: Path, precision: str) -> Weights:
    """Writes the weights under their published names, linked where nothing changes.

    Args:
        checkpoint: what is exported.
        out: folder to write into.
        precision: "bfloat16" or "float16".

    Raises:
        ModelError: a weight that isn't finite in that format, or two of one name.
    """
    wanted = _DTYPES[precision]
    placed: dict[str, str] = {}
    left_out = sorted(name for name in checkpoint.shapes if name.startswith(HEAD_PREFIX))
    linked, lossy, size = True, False, 0
    for shard in sorted(set(checkpoint.shards.values())):
        own = {name for name, path in checkpoint.shards.items() if path == shard}
        names = {name: _published(name, checkpoint.architecture) for name in own if not name.startswith(HEAD_PREFIX)}
        for name, new in names.items():
            if placed.setdefault(new, shard.name) != shard.name or list(names.values()).count(new) > 1:
                raise ModelError(f"{checkpoint.name} holds {new} twice, once as {name}; save it again")
        same = names.keys() == own and all(name == new for name, new in names.items())
        if same and _stored_formats(shard) <= {_SAFETENSORS[precision]}:
            size += sum(_bytes(checkpoint.shapes[name], wanted) for name in own)
            link(shard, out / shard.name)
            continue
        linked = False
        tensors = {}
        with safe_open(shard, framework="pt") as file:
            for name, new in sorted(names.items()):
                value = file.get_tensor(name)
                tensors[new], rounded = _converted(value, wanted, f"{checkpoint.name}: {name}")
                lossy |= rounded
                size += tensors[new].nbytes
        if tensors:
            save_file(tensors, out / shard.name, metadata={"format": "pt"})
            # safetensors lets nobody but the owner read, and the server may be another user.
            (out / shard.name).chmod(0o644)
    shards = set(placed.values())
    if shards != {"model.safetensors"}:
        _write(out / _INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))})
    return Weights(linked, lossy, tuple(left_out))


def link_weights(checkpoint: Checkpoint, out: Path) -> None:
    """Links weights that must stay as they are, such as quantised ones.

    Args:
        checkpoint: whose names are the published ones.
        out: folder to link them into.

    Raises:
        ModelError: names that TensorRT-LLM doesn't read.
    """
    others = [
        name
        for name in checkpoint.shapes
        if name.startswith(HEAD_PREFIX) or _published(name, checkpoint.architecture) != name
    ]
    if others:
        raise ModelError(
            f"{checkpoint.name} holds {sorted(others)[0]}, a name that TensorRT-LLM doesn't read; quantise what "
            "depthlm export --target tensorrt-llm makes of the checkpoint, without `quantised`"
        )
    for shard in set(checkpoint.shards.values()):
        link(shard, out / shard.name)
    index = checkpoint.folder / _INDEX
    if index.is_file():
        shutil.copyfile(index, out / _INDEX)


def link(source: Path, target: Path) -> None:
    """One more name for a file, or a copy where the file system has no such thing, as between two of them."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _split(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A flat config's text settings, and the rest."""
    whole = {"architectures", "model_type", "vision_config", "tie_word_embeddings"}
    rest = {key: value for key, value in config.items() if key in whole or key.endswith(("_token_id", "_token_index"))}
    own = {key: value for key, value in config.items() if key not in rest}
    own |= {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    return own, rest


def _set_rope(text: dict[str, Any], architecture: str) -> None:
    """Writes `rope_scaling` and `rope_theta` in the form of the published checkpoint."""
    told = text.pop("rope_parameters", None) or {**(text.get("rope_scaling") or {})}
    theta = told.pop("rope_theta", text.get("rope_theta"))
    kind = told.pop("rope_type", told.pop("type", "default"))
    told.pop("type", None)
    section, woven = told.pop("mrope_section", None), told.pop("mrope_interleaved", architecture == "qwen3_vl")
    if kind not in ("default", "mrope") or section is None or theta is None or any(told.values()):
        raise ModelError(
            f"rotary settings {kind!r} with {told or 'no more'}, section {section} and theta {theta} aren't those of "
            f"{architecture}, and TensorRT-LLM would compute others; use engine transformers"
        )
    if woven != (architecture == "qwen3_vl"):
        raise ModelError(f"mrope_interleaved is {woven}, which {architecture} is not in TensorRT-LLM")
    text["rope_theta"] = theta
    if architecture == "qwen2_5_vl":
        text["rope_scaling"] = {"type": "mrope", "mrope_section": section}
    else:
        text["rope_scaling"] = {"rope_type": "default", "mrope_section": section, "mrope_interleaved": True}


def _check_vision_rope(vision: dict[str, Any]) -> None:
    told = vision.pop("rope_parameters", None) or {}
    theta = told.get("rope_theta", _VISION_THETA)
    if theta != _VISION_THETA:
        raise ModelError(
            f"the vision tower's rope_theta is {theta}; TensorRT-LLM computes with {_VISION_THETA:g}: use engine "
            "transformers"
        )


def _published(name: str, architecture: str) -> str:
    for pattern, text in _NAMES[architecture]:
        name = re.sub(pattern, text, name)
    return name


def _converted(value: torch.Tensor, wanted: torch.dtype, name: str) -> tuple[torch.Tensor, bool]:
    """A tensor in another format, and whether that rounded it."""
    if not value.is_floating_point():
        return value, False
    new = value.to(wanted)
    if not torch.isfinite(new).all():
        largest = value.abs().max().item()
        told = str(wanted).removeprefix("torch.")
        raise ModelError(f"{name} holds {largest:g}, which is no number in {told}; export with --precision bfloat16")
    return new.contiguous(), not torch.equal(new.to(value.dtype), value)


def _stored_formats(shard: Path) -> set[str]:
    with safe_open(shard, framework="pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    told = {key: value for key, value in config.items() if key not in (*_TOKENIZER_5, "auto_map")}
    if told.get("tokenizer_class") == "TokenizersBackend":
        told["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(told.get("extra_special_tokens"), list):
        told["additional_special_tokens"] = told.pop("extra_special_tokens")
    return told


def _write_processor(folder: Path, out: Path, architecture: str, grid: ImageGrid) -> None:
    whole = read_json(folder / "processor_config.json")
    # In this order, as transformers 5 reads them.
    settings = whole.get("image_processor") or read_json(folder / "preprocessor_config.json")
    if not settings:
        raise ModelError(f"{folder} has no preprocessor_config.json; copy it from the model that it was trained from")
    settings = {key: value for key, value in settings.items() if key != "auto_map"}
    kind = str(settings.get("image_processor_type") or "Qwen2VLImageProcessor")
    settings["image_processor_type"] = kind.removesuffix("Pil")
    settings.setdefault("processor_class", _PROCESSORS[architecture])
    settings |= {"min_pixels": grid.min_pixels, "max_pixels": grid.max_pixels}
    settings["size"] = {"shortest_edge": grid.min_pixels, "longest_edge": grid.max_pixels}
    _write(out / "preprocessor_config.json", settings)
    if whole:
        kept = {key: value for key, value in whole.items() if key not in (*_NESTED, "auto_map")}
        _write(out / "processor_config.json", {"processor_class": _PROCESSORS[architecture], **kept})
    video = whole.get("video_processor")
    if isinstance(video, dict) and not (out / "video_preprocessor_config.json").exists():
        _write(out / "video_preprocessor_config.json", video)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
