"""What is exported for TensorRT-LLM is the same model in the published layout, with limits that fit its questions."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
import recorded_llm_api
import torch
import yaml
from checkpoints import make_checkpoint
from recorded_llm_api import Release
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from depthlm_ros.camera import Camera
from depthlm_ros.cards import load_card
from depthlm_ros.engines.checkpoint import open_checkpoint, open_processor
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.engines.processor import PromptProcessor
from depthlm_ros.engines.tensorrt_llm_contract import PARAMETERS, SERVE_OPTIONS
from depthlm_ros.engines.tensorrt_llm_formats import check_format, generation_of, stored_format
from depthlm_ros.errors import ConfigError, DialectError, EngineError, ModelError
from depthlm_ros.estimator import Estimator
from depthlm_training.export_targets import TargetOptions, export_target
from depthlm_training.tensorrt_llm_export import SERVE_FILE, export_tensorrt_llm
from depthlm_training.tensorrt_llm_layout import published_config, write_small_files, write_weights

CAMERA = Camera(fx=140.0, fy=140.0, cx=80.0, cy=60.0, width=160, height=120)
ARCHITECTURES = ["qwen3_vl", "qwen2_5_vl"]


def as_transformers_5_saves(folder):
    """Rewrites config and tokenizer in the form of transformers 5."""
    config = json.loads((folder / "config.json").read_text())
    for part in (config["text_config"],):
        part["rope_parameters"] = {**part.pop("rope_scaling"), "rope_theta": part.pop("rope_theta")}
    config["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told |= {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<|im_end|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


def write_card(folder, dialects, name="small"):
    card = {
        "name": name,
        "source": "small",
        "licence": "mit",
        "commercial_use": True,
        "architecture": "qwen3_vl",
        "dialects": dialects,
        "default_dialect": dialects[0],
        "focal_px": 140.0,
        "policy": "exact",
        "depth_kind": "z",
        "max_new_tokens": 8,
        "description": "small",
    }
    (folder / "depthlm_card.yaml").write_text(yaml.safe_dump(card))


@pytest.fixture(params=ARCHITECTURES)
def folder(request, tmp_path):
    return as_transformers_5_saves(make_checkpoint(tmp_path / "small", request.param, dense_head=False))


@pytest.fixture
def out(tmp_path):
    made = tmp_path / "out"
    made.mkdir()
    return made


def export(folder, out, **options):
    with Estimator.load(str(folder), device="cpu", dtype="float32") as estimator:
        return export_tensorrt_llm(estimator, folder, out, CAMERA, **options)


def names(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_the_layout_is_the_published_one(folder, out):
    manifest = export(folder, out)
    config = json.loads((out / "config.json").read_text())
    assert "rope_parameters" not in json.dumps(config)
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    if config["model_type"] == "qwen2_5_vl":
        assert "text_config" not in config and config["rope_scaling"]["type"] == "mrope"
        assert config["vision_config"]["torch_dtype"] == "bfloat16" and config["rope_theta"] == 5e6
        assert {name.split(".")[0] for name in names(out)} == {"visual", "model", "lm_head"}
        assert not any("language_model" in name for name in names(out))
    else:
        text = config["text_config"]
        assert text["dtype"] == "bfloat16" and text["rope_theta"] == 5e6 and text["tie_word_embeddings"] is False
        assert text["rope_scaling"] == {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
        assert {".".join(name.split(".")[:2]) for name in names(out)} == {
            "model.visual", "model.language_model", "lm_head.weight"}  # fmt: skip
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["additional_special_tokens"] == ["<|im_end|>"] and "extra_special_tokens" not in tokenizer
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert manifest.precision == "bfloat16" and manifest.extra["rounded"] and "dense" not in manifest.dialects
    grid = PromptProcessor(open_processor(folder)).grid
    settings = json.loads((out / "preprocessor_config.json").read_text())
    assert (settings["min_pixels"], settings["max_pixels"]) == (grid.min_pixels, grid.max_pixels)
    assert PromptProcessor(open_processor(out)).grid == grid


def test_of_two_files_with_settings_for_images_the_one_that_transformers_takes_counts(folder, out, tmp_path):
    both = shutil.copytree(folder, tmp_path / "both")
    older = json.loads((both / "preprocessor_config.json").read_text())
    (both / "processor_config.json").write_text(json.dumps({"image_processor": {**older, "image_mean": [0.4] * 3}}))
    (both / "preprocessor_config.json").write_text(json.dumps({**older, "image_mean": [0.3] * 3}))
    export(both, out)
    assert json.loads((out / "preprocessor_config.json").read_text())["image_mean"] == [0.4] * 3
    assert list(PromptProcessor(open_processor(both))._image_processor.image_mean) == [0.4] * 3


def test_limits_hold_the_longest_question_and_no_more(folder, out):
    manifest = export(folder, out, max_batch_size=8, gpu_memory=0.3)
    settings = yaml.safe_load((out / "llm_api.yaml").read_text())
    assert settings["guided_decoding_backend"] == "xgrammar" and settings["max_batch_size"] == 8
    assert settings["kv_cache_config"] == {"enable_block_reuse": True, "free_gpu_memory_fraction": 0.3}
    with Estimator.load(str(folder), device="cpu", dtype="float32") as estimator:
        image = estimator.prepare(np.zeros((120, 160, 3), np.uint8), CAMERA).image
        processor = estimator.engine.processor
        grid = processor.images([processor.shown(image)]).grid_hw
        assert manifest.image["image_tokens"] == grid[0] * grid[1]
        prompt = len(processor.prompts(["Given this image, how far is the point (1999, 1999)?"], grid)[0])
        answer = estimator.card.max_new_tokens
    assert prompt + answer < settings["max_seq_len"] <= settings["max_num_tokens"]
    assert settings["max_seq_len"] < 2 * 1024 + grid[0] * grid[1]


def test_only_recorded_options_are_said(tmp_path, out):
    export(make_checkpoint(tmp_path / "small", "qwen3_vl", dense_head=False), out)
    settings = yaml.safe_load((out / "llm_api.yaml").read_text())
    assert set(settings) <= set(PARAMETERS["LLM"].known)
    assert set(settings["kv_cache_config"]) <= set(PARAMETERS["KvCacheConfig"].known)
    lines = [line for line in (out / SERVE_FILE).read_text().splitlines() if not line.startswith("#")]
    said = {word for line in lines for word in line.split() if word.startswith("--") and word != "--"}
    assert said and said <= set(SERVE_OPTIONS)


def test_serving_is_one_line_and_stays_on_this_host(folder, out, tmp_path):
    export(folder, out, gpu="L4")
    serve = out / SERVE_FILE
    assert os.stat(serve).st_mode & stat.S_IXUSR
    program = tmp_path / "trtllm-serve"
    program.write_text('#!/bin/sh\necho "$TRTLLM_NO_USAGE_STATS"\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([str(serve), "--port", "8001"], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.splitlines() == [
        "1", str(out), "--host", "127.0.0.1", "--port", "8000", "--extra_llm_api_options", str(out / "llm_api.yaml"),
        "--port", "8001"]  # fmt: skip
    assert "such as L4" in serve.read_text()


def test_a_name_cannot_write_lines_of_the_script(tmp_path, out):
    folder = make_checkpoint(tmp_path / "small", "qwen3_vl", dense_head=False)
    write_card(folder, ["coordinates"], name="small\ntouch /tmp/owned\n")
    export(folder, out)
    assert not any(line.startswith("touch") for line in (out / SERVE_FILE).read_text().splitlines())
    assert yaml.safe_load((out / "llm_api.yaml").read_text())["max_beam_width"] == 1


def test_weights_in_the_right_format_are_linked(tmp_path, out):
    folder = make_checkpoint(tmp_path / "own", "qwen3_vl", dense_head=False)
    weights = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    manifest = export(folder, out)
    assert manifest.extra["linked"] and not manifest.extra["rounded"]
    assert (out / "model.safetensors").samefile(folder / "model.safetensors")


def test_the_depth_head_stays_behind(qwen3_vl_checkpoint, out, tmp_path):
    source = tmp_path / "with_head"
    shutil.copytree(qwen3_vl_checkpoint, source)
    write_card(source, ["dense", "coordinates"])
    manifest = export(source, out)
    assert manifest.dialects == ("coordinates",)
    assert not any(name.startswith("depth_head") for name in names(out))
    assert "depth_head" not in (out / "config.json").read_text()
    assert any("depth head (6 weights) was left out" in note for note in manifest.extra["notes"])
    write_card(source, ["dense"])
    shutil.rmtree(out)
    out.mkdir()
    with pytest.raises(DialectError, match="maps only.*onnx"):
        export(source, out)


def test_tied_embeddings_and_shards_stay_what_they_are(tmp_path, out):
    folder = make_checkpoint(tmp_path / "tied", "qwen3_vl", dense_head=False, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = sorted(weights)[: len(weights) // 2], sorted(weights)[len(weights) // 2 :]
    placed = {}
    for i, half in enumerate(halves):
        save_file({name: weights[name] for name in half}, folder / f"model-{i}.safetensors", metadata={"format": "pt"})
        placed |= dict.fromkeys(half, f"model-{i}.safetensors")
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    export(folder, out, precision="float16")
    written = json.loads((out / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == placed
    assert written["metadata"]["total_size"] == sum(2 * value.numel() for value in weights.values())
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] and config["text_config"]["tie_word_embeddings"]


def test_a_folder_that_answers_otherwise_is_not_exported(folder, out, monkeypatch):
    def spoilt(checkpoint, made, precision):
        told = write_weights(checkpoint, made, precision)
        weights = load_file(made / "model.safetensors")
        weights["lm_head.weight"] = weights["lm_head.weight"].flip(0).contiguous()
        save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
        return told

    monkeypatch.setattr("depthlm_training.tensorrt_llm_export.write_weights", spoilt)
    with pytest.raises(EngineError, match="laid out for TensorRT-LLM answers"):
        export(folder, out)


def test_code_and_pickled_weights_stay_behind(folder, out):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_own.Own"}}))
    (folder / "modeling_own.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    checkpoint = open_checkpoint(folder)
    notes = write_small_files(checkpoint, out, "bfloat16", PromptProcessor(checkpoint).grid)
    assert not list(out.glob("*.py")) and not list(out.glob("*.bin"))
    assert "auto_map" not in (out / "config.json").read_text()
    assert any("auto_map" in note for note in notes) and any("modeling_own.py" in note for note in notes)


def test_rotary_settings_of_another_kind_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"] |= {"rope_type": "yarn", "factor": 4.0}
    with pytest.raises(ModelError, match="rotary settings 'yarn'"):
        published_config(config, "bfloat16")
    config["text_config"]["rope_parameters"] |= {"rope_type": "default", "factor": None}
    config["vision_config"]["rope_parameters"]["rope_theta"] = 5000.0
    with pytest.raises(ModelError, match="vision tower's rope_theta is 5000"):
        published_config(config, "bfloat16")


def test_the_published_layout_is_left_as_it_is(folder):
    config, _ = published_config(json.loads((folder / "config.json").read_text()), "bfloat16")
    assert published_config(config, "bfloat16")[0] == config


def test_weights_beyond_float16_are_named(tmp_path, out):
    folder = make_checkpoint(tmp_path / "wide", "qwen3_vl", dense_head=False)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head.weight holds 1e\+06.*--precision bfloat16"):
        write_weights(open_checkpoint(folder), out, "float16")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"precision": "float32"}, ConfigError, "float32 are none"),
        ({"precision": "int8"}, ConfigError, "INT8"),
        ({"precision": "fp8"}, ConfigError, "hf_ptq.py.*--qformat fp8"),
        ({"precision": "fp8", "gpu": "A100"}, ConfigError, "ampere.*int4_awq"),
        ({"precision": "nvfp4", "gpu": "sm90"}, ConfigError, "hopper"),
        ({"gpu": "orin"}, ConfigError, "--target edge-llm"),
        ({"gpu": "V100"}, ConfigError, "compute_cap"),
        ({"max_batch_size": 0}, ConfigError, "max_batch_size"),
        ({"gpu_memory": 1.0}, ConfigError, "gpu_memory"),
    ],
)
def test_what_cannot_run_is_refused_with_a_remedy(tmp_path, out, options, error, said):
    folder = make_checkpoint(tmp_path / "small", "qwen3_vl", dense_head=False)
    with pytest.raises(error, match=said):
        export(folder, out, **options)
    assert not list(out.iterdir())


def test_pixtral_is_refused(llava_checkpoint, out):
    with pytest.raises(ModelError, match="no model for Pixtral"):
        export(llava_checkpoint, out)


@pytest.mark.parametrize(
    ("gpu", "generation"),
    [
        ("8.0", "ampere"), ("sm86", "ampere"), ("RTX A6000", "ampere"), ("NVIDIA A100-SXM4-80GB", "ampere"),
        ("NVIDIA GeForce RTX 3090", "ampere"), ("sm_89", "ada"), ("L4", "ada"), ("NVIDIA GeForce RTX 4090", "ada"),
        ("RTX 6000 Ada", "ada"), ("L40S", "ada"), ("H100", "hopper"), ("NVIDIA H200", "hopper"),
        ("NVIDIA H100 80GB HBM3", "hopper"), ("B200", "blackwell"), ("sm100", "blackwell"), ("10.3", "blackwell"),
        ("NVIDIA GeForce RTX 5090", "blackwell-rtx"), ("12.0", "blackwell-rtx"), ("GB10", "blackwell-rtx"),
        ("RTX PRO 6000", "blackwell-rtx"), ("hopper", "hopper"),
    ],
)  # fmt: skip
def test_gpus_are_known_by_product_architecture_and_capability(gpu, generation):
    assert generation_of(gpu).name == generation


@pytest.mark.parametrize("gpu", ["Jetson AGX Orin", "8.7", "sm87", "thor", "11.0", "sm110"])
def test_jetsons_are_sent_elsewhere(gpu):
    with pytest.raises(ConfigError, match="edge-llm"):
        generation_of(gpu)


@pytest.mark.parametrize(
    ("name", "gpu", "runs"),
    [("fp8", "8.9", True), ("fp8", "8.6", False), ("nvfp4", "12.0", True), ("nvfp4", "9.0", False),
     ("int4_awq", "8.6", True), ("int4_awq", "10.0", False), ("bfloat16", "8.0", True)],
)  # fmt: skip
def test_formats_go_by_generation(name, gpu, runs):
    if runs:
        check_format(name, "qwen3_vl", gpu)
    else:
        with pytest.raises(ConfigError, match=name):
            check_format(name, "qwen3_vl", gpu)


def quantised(folder, made, **told):
    shutil.copytree(folder, made)
    (made / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8", **told}}))
    return made


def test_quantised_weights_are_taken_as_they_are(tmp_path, out):
    folder = make_checkpoint(tmp_path / "small", "qwen3_vl", dense_head=False)
    other = quantised(folder, tmp_path / "fp8")
    manifest = export(folder, out, precision="fp8", gpu="L4", quantised=other)
    assert manifest.precision == "fp8" and "quantised" in manifest.extra["notes"][-1]
    assert (out / "model.safetensors").samefile(other / "model.safetensors")
    assert stored_format(out) == "fp8"


def test_quantised_weights_need_the_published_names(tmp_path, out):
    folder = make_checkpoint(tmp_path / "small", "qwen2_5_vl", dense_head=False)
    with pytest.raises(ModelError, match="model.language_model.*quantise what depthlm export"):
        export(folder, out, precision="fp8", quantised=quantised(folder, tmp_path / "fp8"))
    shutil.rmtree(out)
    out.mkdir()
    laid = tmp_path / "laid"
    laid.mkdir()
    export(folder, laid)
    manifest = export(folder, out, precision="fp8", quantised=quantised(laid, tmp_path / "again"))
    assert manifest.precision == "fp8" and json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_quantised_folders_that_do_not_fit_are_refused(tmp_path, out):
    folder = make_checkpoint(tmp_path / "small", "qwen3_vl", dense_head=False)
    other = quantised(folder, tmp_path / "fp8")
    with pytest.raises(ConfigError, match="--precision fp8"):
        export(folder, out, precision="nvfp4", quantised=other)
    with pytest.raises(ConfigError, match="isn't quantised"):
        export(folder, out, precision="fp8", quantised=folder)
    with pytest.raises(ModelError, match="quantised already"):
        export(other, out)
    with pytest.raises(ModelError, match="INT9"):
        stored_format(quantised(folder, tmp_path / "odd", quant_algo="INT9"))


def test_an_export_runs_in_the_recorded_api_and_passes_its_own_parity_check(tmp_path, monkeypatch):
    folder = as_transformers_5_saves(make_checkpoint(tmp_path / "small", "qwen3_vl", dense_head=False))
    weights = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_card(folder, ["coordinates", "compact"])
    out = tmp_path / "export"
    # Few answers of a model that learnt nothing are numbers, and which ones hangs on rounding.
    options = TargetOptions(gpu="H100", reference_dtype="float32")
    manifest = export_target(str(folder), out, "tensorrt-llm", CAMERA, options)
    assert {"model.safetensors", "serve.sh", "llm_api.yaml", "config.json"} <= set(manifest.files)
    release = Release()
    for name, module in recorded_llm_api.module(release).items():
        monkeypatch.setitem(sys.modules, name, module)
    # A small random model doesn't keep to the sentence that a guide would hold it to.
    options = EngineOptions(guided=False)
    with Estimator.load(str(out), engine="tensorrt_llm", options=options) as estimator:
        assert "parity" in estimator.proof.sentence and not estimator.proof.complaint
        settings = yaml.safe_load((out / "llm_api.yaml").read_text())
        assert release.told("LLM")[0]["max_seq_len"] == settings["max_seq_len"]
    assert load_card(str(out))[0].dialects == manifest.dialects
