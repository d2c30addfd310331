"""Folders like those that tensorrt-edgellm-export 0.11.0 writes, small and without its plugins, for tests.

Names and shapes as in graphs that it wrote; `test_edge_llm_exporter.py` holds them against the real ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

LLM_INPUTS = (
    "rope_rotary_cos_sin positions query_start_offsets query_lengths past_lengths attention_sequence_lengths "
    "state_indices execution_phase_marker context_sequence_count_carrier kv_page_table logits_indices"
).split()
SETTINGS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
).split()
VISUAL_INPUTS = {
    "qwen3_vl": "rotary_pos_emb cu_seqlens max_seqlen_carrier fast_pos_embed_idx fast_pos_embed_weight".split(),
    "qwen2_5_vl": (
        "rotary_pos_emb cu_seqlens max_seqlen_carrier cu_window_seqlens window_index reverse_window_index"
    ).split(),
}


def write_export(folder: Path, checkpoint: Path, version: str = "0.11.0") -> Path:
    """Writes `llm/` and `visual/` for a checkpoint of `tests/checkpoints.py`."""
    config = json.loads((checkpoint / "config.json").read_text())
    text, vision = config.get("text_config", config), config["vision_config"]
    deep = len(vision.get("deepstack_visual_indexes", ()))
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    llm = {
        "edgellm_version": version,
        "num_deepstack_features": deep,
        **{name: text[name] for name in SETTINGS},
        **{name: config[name] for name in tokens},
    }
    visual = {
        "model_type": config["model_type"],
        "vocab_size": text["vocab_size"],
        "rope_theta": text["rope_theta"],
        "rope_scaling": text["rope_scaling"],
        **{name: config[name] for name in tokens},
    }
    for part, told in (("llm", llm), ("visual", visual)):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(told))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(checkpoint / name, folder / "llm" / name)
    shutil.copyfile(checkpoint / "preprocessor_config.json", folder / "visual" / "preprocessor_config.json")
    width, vocabulary = text["hidden_size"], text["vocab_size"]
    embedding = {"embedding": torch.zeros(vocabulary, width, dtype=torch.float16)}
    save_file(embedding, folder / "llm" / "embedding.safetensors")
    layers = range(text["num_hidden_layers"])
    cache = [2, "pages", 128, text["num_key_value_heads"], text["head_dim"]]
    inputs = {"inputs_embeds": ["tokens", width], **{name: ["tokens"] for name in LLM_INPUTS}}
    inputs |= {f"past_key_values_{i}": cache for i in layers}
    inputs |= {f"deepstack_embeds_{i}": ["tokens", width] for i in range(deep)}
    outputs = {"logits": ["rows", vocabulary], **{f"present_key_values_{i}": cache for i in layers}}
    write_graph(folder / "llm" / "model.onnx", inputs, outputs)
    values = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    inputs = {"input": ["tokens", values], **{name: ["tokens"] for name in VISUAL_INPUTS[config["model_type"]]}}
    outputs = {name: ["tokens", width] for name in ("output", *(f"deepstack_features_{i}" for i in range(deep)))}
    write_graph(folder / "visual" / "model.onnx", inputs, outputs)
    return folder


def write_graph(path: Path, inputs: dict[str, list], outputs: dict[str, list]) -> None:
    """Writes a graph with these sides and 64 weights in a file of their own."""
    half = TensorProto.FLOAT16
    weights = numpy_helper.from_array(np.zeros(64, np.float16), "weights")
    graph = helper.make_graph(
        [],
        "graph",
        [helper.make_tensor_value_info(name, half, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, half, shape) for name, shape in outputs.items()],
        [weights],
    )
    path.with_suffix(".onnx.data").unlink(missing_ok=True)
    onnx.save_model(
        helper.make_model(graph), str(path), save_as_external_data=True, location="model.onnx.data", size_threshold=0
    )


def sides(path: Path) -> tuple[dict[str, list], dict[str, list]]:
    """Inputs and outputs of a graph that `write_graph` wrote."""
    graph = onnx.load(str(path), load_external_data=False).graph
    return tuple(
        {v.name: [s.dim_param or s.dim_value for s in v.type.tensor_type.shape.dim] for v in values}
        for values in (graph.input, graph.output)
    )


def flatten(checkpoint: Path) -> None:
    """Rewrites config.json as the first Qwen2.5-VL checkpoints have it, without a text_config."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    text.pop("model_type")
    path.write_text(json.dumps({**text, **config}))
