"""What TensorRT Edge-LLM's runtime relies on in an export, and that nothing else passes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from edge_llm_exports import flatten, sides, write_export, write_graph

from depthlm_ros.errors import ModelError
from depthlm_training.edge_llm_contract import check_export


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("edge") / "small", dense_head=False)


@pytest.mark.parametrize("architecture", ["qwen3_vl", "qwen2_5_vl"])
def test_a_whole_export_passes(tmp_path, architecture):
    made = make_checkpoint(tmp_path / "small", architecture, dense_head=False)
    config = json.loads((made / "config.json").read_text())
    assert check_export(write_export(tmp_path / "export", made), config) == "0.11.0"


def test_the_first_layout_of_qwen2_5_vl_passes_too(tmp_path):
    made = make_checkpoint(tmp_path / "small", "qwen2_5_vl", dense_head=False)
    flatten(made)
    assert check_export(write_export(tmp_path / "export", made), json.loads((made / "config.json").read_text()))


def without(name: str, key: str):
    def change(folder: Path) -> None:
        told = json.loads((folder / name).read_text())
        del told[key]
        (folder / name).write_text(json.dumps(told))

    return change


def edit(name: str, **changes):
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def graph(part: str, change):
    def rewrite(folder: Path) -> None:
        inputs, outputs = sides(folder / part / "model.onnx")
        change(inputs, outputs)
        write_graph(folder / part / "model.onnx", inputs, outputs)

    return rewrite


def truncate(path: str, size: int):
    return lambda folder: os.truncate(folder / path, size)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: shutil.rmtree(f / "visual"), "wrote no visual/model.onnx, though it said that it succeeded"),
        (lambda f: (f / "llm" / "chat_template.jinja").unlink(), "wrote no llm/chat_template.jinja"),
        (edit("llm/config.json", edgellm_version="0.9.1"), "Edge-LLM '0.9.1'; graphs of 0.11"),
        (edit("llm/config.json", edgellm_version="0.110.0"), "Edge-LLM '0.110.0'"),
        (edit("llm/config.json", edgellm_version="0.11.0; reboot"), "Edge-LLM '0.11.0; reboot'"),
        (edit("llm/config.json", edgellm_version="0.11.0\nreboot"), "Edge-LLM '0.11.0"),
        (edit("llm/config.json", edgellm_version="0x11.0"), "Edge-LLM '0x11.0'"),
        (without("llm/config.json", "head_dim"), "lacks 'head_dim'"),
        (edit("llm/config.json", num_attention_heads=8), "num_attention_heads is 8, .* want 4"),
        (edit("llm/config.json", vocab_size=1), "vocab_size is 1, .* want 360"),
        (edit("visual/config.json", vocab_size=9), "visual/config.json vocab_size is 9"),
        (edit("visual/config.json", image_token_id=0), "image_token_id is 0, .* want 5"),
        (edit("visual/config.json", rope_scaling={}), "mrope_section is None"),
        (edit("visual/config.json", rope_theta=1.0), "rope_theta is 1.0"),
        (graph("llm", lambda i, o: i.pop("kv_page_table")), "lack \\['kv_page_table'\\]"),
        (graph("llm", lambda i, o: i.update(last_token_ids=["rows"])), "have \\['last_token_ids'\\] beyond"),
        (graph("llm", lambda i, o: i.update(past_key_values_1=[2, "pages", 64, 2, 16])), "shape of past_key_values_1"),
        (graph("llm", lambda i, o: o.update(logits=["rows", 100])), "width of logits is 100"),
        (graph("visual", lambda i, o: i.update(input=["tokens", 1176])), "values of a patch is 1176, .* want 1536"),
        (graph("visual", lambda i, o: o.pop("deepstack_features_1")), "lack \\['deepstack_features_1'\\]"),
        (graph("visual", lambda i, o: o.update(output=["tokens", 32])), "width of output is 32"),
        (truncate("visual/model.onnx.data", 100), "has 100 bytes, weights ends at 128"),
        (lambda f: (f / "llm" / "model.onnx.data").unlink(), "model.onnx.data, which isn't there"),
        (truncate("llm/embedding.safetensors", 20), "embedding.safetensors isn't whole"),
        (lambda f: (f / "llm" / "model.onnx").write_bytes(b"\x12\xff\xff"), "is no ONNX graph"),
        (lambda f: (f / "llm" / "config.json").write_text("nothing"), "can't be read"),
    ],
)
def test_an_export_that_the_runtime_would_not_take_is_refused(checkpoint, tmp_path, change, told):
    export = write_export(tmp_path / "export", checkpoint)
    change(export)
    with pytest.raises(ModelError, match=f"(?s){told}"):
        check_export(export, json.loads((checkpoint / "config.json").read_text()))


def test_weights_outside_of_the_export_are_refused(checkpoint, tmp_path):
    export = write_export(tmp_path / "export", checkpoint)
    path = export / "llm" / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"model.onnx.data", b"../x/onnx.data "))
    with pytest.raises(ModelError, match="outside of its folder"):
        check_export(export, json.loads((checkpoint / "config.json").read_text()))
