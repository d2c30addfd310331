"""What TensorRT Edge-LLM's runtime expects of an export, checked before it travels to a device.

The exporter ends well although it left out the vision tower (of a type that it doesn't know), and graphs of one
version don't fit the runtime of another: 0.9 batched rows, 0.11 reads pages. Names and shapes were read from graphs
that tensorrt-edgellm 0.11.0 wrote.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from depthlm_ros.errors import MissingDependencyError, ModelError

if TYPE_CHECKING:
    import onnx

GRAPH = "model.onnx"
SUPPORTED = ("0.11",)
"""Versions whose graphs these are."""
PAGE = 128
"""Tokens of a page of the KV cache."""

_LLM_INPUTS = {
    "inputs_embeds",
    "rope_rotary_cos_sin",
    "positions",
    "query_start_offsets",
    "query_lengths",
    "past_lengths",
    "attention_sequence_lengths",
    "state_indices",
    "execution_phase_marker",
    "context_sequence_count_carrier",
    "kv_page_table",
    "logits_indices",
}
_VISUAL_INPUTS = {
    "qwen3_vl": {
        "input",
        "rotary_pos_emb",
        "cu_seqlens",
        "max_seqlen_carrier",
        "fast_pos_embed_idx",
        "fast_pos_embed_weight",
    },
    "qwen2_5_vl": {
        "input",
        "rotary_pos_emb",
        "cu_seqlens",
        "max_seqlen_carrier",
        "cu_window_seqlens",
        "window_index",
        "reverse_window_index",
    },
}
_ALIKE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
)
_FILES = {
    "llm": ("config.json", "embedding.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    "visual": ("config.json", "preprocessor_config.json"),
}


@dataclass(frozen=True)
class Graph:
    """The outside of a graph.

    Attributes:
        inputs: shape of each input; a name where a side is free.
        outputs: of each output.
        path: of its file.
    """

    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    path: Path


def check_export(folder: Path, config: dict[str, Any]) -> str:
    """Makes sure that an export is whole and fits the runtime.

    Args:
        folder: with `llm/` and `visual/`.
        config: config.json of the checkpoint.

    Returns:
        The version of Edge-LLM that wrote it.

    Raises:
        ModelError: what is absent or different, with both values.
        MissingDependencyError: onnx isn't installed.
    """
    for part, names in _FILES.items():
        for name in (GRAPH, *names):
            if not (folder / part / name).is_file():
                raise ModelError(
                    f"the exporter wrote no {part}/{name}, though it said that it succeeded; this model_type "
                    f"({config.get('model_type')!r}) may be unknown to it"
                )
    llm, visual = (_json(folder / part / "config.json") for part in _FILES)
    version = str(llm.get("edgellm_version"))
    # The whole of it, since it stands in the scripts that run on the device.
    if not any(re.fullmatch(rf"{re.escape(known)}\.[0-9A-Za-z.+-]+", version) for known in SUPPORTED):
        raise ModelError(
            f"the exporter is TensorRT Edge-LLM {version[:80]!r}; graphs of {', '.join(SUPPORTED)} are known here. "
            "Install the version of config/edge_llm_requirements.txt"
        )
    try:
        _check_configs(folder, config, llm, visual)
        _check_llm(read_graph(folder / "llm" / GRAPH), llm)
        _check_visual(read_graph(folder / "visual" / GRAPH), config, llm)
    except (KeyError, IndexError) as error:
        raise ModelError(
            f"{folder}: a config.json or a graph of the export lacks {error}, which the runtime reads; export again"
        ) from error
    return version


def read_graph(path: Path) -> Graph:
    """Reads inputs and outputs, and makes sure that the weights are whole and lie in the graph's folder.

    Raises:
        ModelError: a damaged graph, weights elsewhere or cut short.
        MissingDependencyError: onnx isn't installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError('onnx is not installed; run: pip install "depthlm_ros[export]"') from error
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError) as error:
        raise ModelError(f"{path} is no ONNX graph ({error}); export again") from error
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(path, tensor)
    return Graph(_shapes(model.graph.input), _shapes(model.graph.output), path)


def _check_external(path: Path, tensor: onnx.TensorProto) -> None:
    told = {entry.key: entry.value for entry in tensor.external_data}
    name = told.get("location", "")
    data = path.parent / name
    if not name or Path(name).name != name or data.is_symlink():
        raise ModelError(f"{path}: the weights of {tensor.name} lie in {name!r}, outside of its folder; export again")
    if not data.is_file():
        raise ModelError(f"{path}: the weights of {tensor.name} lie in {name}, which isn't there; export again")
    end = int(told.get("offset", 0)) + int(told.get("length", 0))
    if end > data.stat().st_size:
        raise ModelError(f"{data} has {data.stat().st_size} bytes, {tensor.name} ends at {end}; export again")


def _check_configs(folder: Path, config: dict[str, Any], llm: dict[str, Any], visual: dict[str, Any]) -> None:
    # Of the first Qwen2.5-VL checkpoints the language model's settings lie beside the others.
    text = config.get("text_config", config)
    for name in _ALIKE:
        _same(f"llm/config.json {name}", llm.get(name), text.get(name, llm.get(name)))
    for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id"):
        for part, told in (("llm", llm), ("visual", visual)):
            _same(f"{part}/config.json {name}", told.get(name), config.get(name, told.get(name)))
    _same("visual/config.json vocab_size", visual.get("vocab_size"), llm["vocab_size"])
    _same("visual/config.json model_type", visual.get("model_type"), config["model_type"])
    # The runtime computes the rotary positions of image tokens from these; without them it falls back to none.
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    told = visual.get("rope_scaling") or {}
    _same("visual/config.json mrope_section", told.get("mrope_section"), rope.get("mrope_section"))
    _same("visual/config.json rope_theta", visual.get("rope_theta"), text.get("rope_theta", rope.get("rope_theta")))
    path = folder / "llm" / "embedding.safetensors"
    try:
        with safe_open(path, framework="np") as file:
            shapes = [tuple(file.get_slice(name).get_shape()) for name in file.keys()]
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} isn't whole ({error}); export again") from error
    if (llm["vocab_size"], llm["hidden_size"]) not in shapes:
        raise ModelError(f"{path} holds {shapes}, not ({llm['vocab_size']}, {llm['hidden_size']}); export again")
    known = [entry["id"] for entry in _json(folder / "llm" / "tokenizer.json").get("added_tokens", [])]
    if known and max(known) >= llm["vocab_size"]:
        raise ModelError(f"the tokenizer has token {max(known)}, the graph {llm['vocab_size']} tokens; export again")


def _check_llm(graph: Graph, llm: dict[str, Any]) -> None:
    layers, deep = range(llm["num_hidden_layers"]), range(llm.get("num_deepstack_features", 0))
    cache = {f"past_key_values_{i}" for i in layers}
    _same_names(graph, "inputs", _LLM_INPUTS | cache | {f"deepstack_embeds_{i}" for i in deep})
    _same_names(graph, "outputs", {"logits"} | {f"present_key_values_{i}" for i in layers})
    heads, size = llm["num_key_value_heads"], llm["head_dim"]
    for name in sorted(cache):
        two, _, *page = graph.inputs[name]
        _same(f"{graph.path}: shape of {name}", (two, *page), (2, PAGE, heads, size))
    _same(f"{graph.path}: width of inputs_embeds", graph.inputs["inputs_embeds"][-1], llm["hidden_size"])
    _same(f"{graph.path}: width of logits", graph.outputs["logits"][-1], llm["vocab_size"])


def _check_visual(graph: Graph, config: dict[str, Any], llm: dict[str, Any]) -> None:
    vision = config["vision_config"]
    deep = {f"deepstack_features_{i}" for i in range(llm.get("num_deepstack_features", 0))}
    _same_names(graph, "inputs", _VISUAL_INPUTS[config["model_type"]])
    _same_names(graph, "outputs", {"output"} | deep)
    values = vision.get("in_channels", 3) * vision.get("temporal_patch_size", 2) * vision["patch_size"] ** 2
    _same(f"{graph.path}: values of a patch", graph.inputs["input"][-1], values)
    for name in sorted({"output"} | deep):
        _same(f"{graph.path}: width of {name}", graph.outputs[name][-1], llm["hidden_size"])


def _same_names(graph: Graph, kind: str, wanted: set[str]) -> None:
    seen = set(getattr(graph, kind))
    if seen != wanted:
        missing, beyond = sorted(wanted - seen), sorted(seen - wanted)
        raise ModelError(
            f"{graph.path}: {kind} lack {missing or 'nothing'} of what the runtime of Edge-LLM {', '.join(SUPPORTED)} "
            f"binds, and have {beyond or 'nothing'} beyond it; export with that version"
        )


def _same(what: str, seen: Any, wanted: Any) -> None:
    if seen != wanted:
        raise ModelError(f"{what} is {seen!r}, the checkpoint and the runtime want {wanted!r}; export again")


def _shapes(values: Any) -> dict[str, tuple[int | str, ...]]:
    return {
        value.name: tuple(side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim)
        for value in values
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read ({error}); export again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no JSON mapping; export again")
    return data
