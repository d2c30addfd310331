"""Export for TensorRT Edge-LLM around its exporter: what goes in, what is refused, what the device is told."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import make_checkpoint
from edge_llm_exports import write_export
from edge_llm_programs import Patient, write_program
from safetensors.torch import load_file, save_file

from depthlm_ros.camera import Camera
from depthlm_ros.cards import CARD_FILE
from depthlm_ros.engines import edge_llm_command
from depthlm_ros.engines.checkpoint import open_checkpoint
from depthlm_ros.errors import ConfigError, DialectError, EngineError, MissingDependencyError, ModelError
from depthlm_ros.estimator import Estimator
from depthlm_training import edge_llm_tool
from depthlm_training.edge_llm_export import export_edge_llm
from depthlm_training.edge_llm_sizes import plan_sizes
from depthlm_training.edge_llm_tool import PROGRAM, VARIABLE, find_exporter, run_exporter
from depthlm_training.edge_llm_weights import stage

ROOT = Path(__file__).resolve().parents[1]
CAMERA = Camera(500.0, 500.0, 319.5, 239.5, 640, 480)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("edge") / "small", dense_head=False)


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Path:
    """No exporter is anywhere."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(edge_llm_tool, "__file__", str(tmp_path / "package" / "training" / "edge_llm_tool.py"))
    return tmp_path


def environment(folder: Path, text: str = "") -> Path:
    write_program(folder / "bin" / "python", "")
    return write_program(folder / "bin" / PROGRAM, text)


def test_the_exporter_is_found_where_it_was_named_and_else_beside_us(nowhere, monkeypatch):
    with pytest.raises(MissingDependencyError, match="make edge-llm.*DEPTHLM_EDGE_LLM"):
        find_exporter()
    on_path = environment(nowhere / "path")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert find_exporter() == on_path
    of_checkout = environment(nowhere / "package" / ".venv-edge-llm")
    assert find_exporter() == of_checkout
    here = environment(nowhere / ".venv-edge-llm")
    assert find_exporter() == here
    named = environment(nowhere / "named")
    for told in (named, named.with_name("python"), named.parents[1]):
        monkeypatch.setenv(VARIABLE, str(told))
        assert find_exporter() == named
    given = environment(nowhere / "given")
    assert find_exporter(str(given.parents[1])) == given
    with pytest.raises(ConfigError, match="exporter is '/nothing'"):
        find_exporter("/nothing")
    monkeypatch.setenv(VARIABLE, "/nothing")
    with pytest.raises(ConfigError, match="DEPTHLM_EDGE_LLM is '/nothing'"):
        find_exporter()


def test_the_exporter_sees_its_own_packages_only(tmp_path, monkeypatch):
    program = write_program(
        tmp_path / "p",
        "import json, os, sys\njson.dump([sys.argv[1:], dict(os.environ)], open(sys.argv[2] + '.json', 'w'))",
    )
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("USE_TRT_NATIVE_ATTN", "1")
    run_exporter(program, Path("/in"), tmp_path / "out")
    arguments, seen = json.loads((tmp_path / "out.json").read_text())
    assert arguments == ["/in", str(tmp_path / "out"), "--dtype", "float16"]
    assert "PYTHONPATH" not in seen and "USE_TRT_NATIVE_ATTN" not in seen and seen["HF_HUB_OFFLINE"] == "1"


def test_what_the_exporter_said_last_is_in_the_error(tmp_path):
    text = "import sys\nfor i in range(40): print('line', i)\nprint('ValueError: no such tower', file=sys.stderr)\n"
    with pytest.raises(EngineError, match="(?s)exit status 3.*line 39.*no such tower") as told:
        run_exporter(write_program(tmp_path / "p", text + "sys.exit(3)"), Path("/in"), tmp_path / "out")
    assert "line 20\n" not in str(told.value)


def test_an_exporter_without_memory_is_told_apart(tmp_path):
    text = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(EngineError, match="-9 .killed, as the kernel does where memory is short"):
        run_exporter(write_program(tmp_path / "p", text), Path("/in"), tmp_path / "out")


def test_an_exporter_that_never_ends_is_stopped_with_its_children(tmp_path, monkeypatch):
    text = "import os, sys, time\nprint('busy', flush=True)\nos.fork()\nopen(sys.argv[2], 'w')\ntime.sleep(600)"
    program = write_program(tmp_path / "p", text)
    monkeypatch.setattr(Patient, "began", tmp_path / "out", raising=False)
    monkeypatch.setattr(edge_llm_command.subprocess, "Popen", Patient)
    started = time.monotonic()
    with pytest.raises(EngineError, match="(?s)wasn't done after 0.5 s.*busy"):
        run_exporter(program, Path("/in"), tmp_path / "out", 0.5)
    # A child that went on would keep the pipe open, and the call with it, for ten minutes.
    assert time.monotonic() - started < 100


def test_float32_weights_are_handed_over_in_float16(checkpoint, tmp_path):
    staged = stage(open_checkpoint(checkpoint), tmp_path)
    own, told = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert staged.dtypes == ("float32",) and not (tmp_path / "model.safetensors").is_symlink()
    assert set(own) == set(told)
    for name, tensor in own.items():
        assert torch.equal(told[name], tensor.half()), name
    assert (tmp_path / "config.json").is_file() and (tmp_path / "chat_template.jinja").is_file()


def changed(checkpoint: Path, folder: Path, change) -> Path:
    shutil.copytree(checkpoint, folder)
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_bfloat16_weights_are_linked_and_what_float16_makes_zero_is_counted(checkpoint, tmp_path):
    def tiny(weights):
        weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
        weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], 1e-9)
        return weights

    folder = changed(checkpoint, tmp_path / "brain", tiny)
    (tmp_path / "staged").mkdir()
    staged = stage(open_checkpoint(folder), tmp_path / "staged")
    assert (staged.folder / "model.safetensors").resolve() == folder / "model.safetensors"
    weights = load_file(folder / "model.safetensors")
    zero = weights["lm_head.weight"].numel()
    assert staged.dtypes == ("bfloat16",)
    assert staged.flushed == pytest.approx(zero / sum(t.count_nonzero().item() for t in weights.values()), rel=0.01)


@pytest.mark.parametrize("value", [1e5, float("inf"), float("nan")])
def test_weights_that_float16_cannot_hold_are_refused_by_name(checkpoint, tmp_path, value):
    def spoilt(weights):
        weights["lm_head.weight"][3, 5] = value
        return {name: tensor.bfloat16() for name, tensor in weights.items()}

    (tmp_path / "staged").mkdir()
    with pytest.raises(ModelError, match="lm_head.weight holds .*65504"):
        stage(open_checkpoint(changed(checkpoint, tmp_path / "big", spoilt)), tmp_path / "staged")


def test_sizes_follow_from_the_camera_and_the_longest_question(checkpoint):
    with Estimator.load(str(checkpoint), device="cpu", dtype="float32") as estimator:
        # Taken for VLM3: focal length 1000, so 640 x 480 at 500 px becomes 1280 x 960, of which its processor makes a
        # megapixel; and pairs of images are asked about.
        sizes = plan_sizes(estimator, checkpoint, CAMERA, ("coordinates",))
        assert (sizes.width, sizes.height, sizes.image_tokens, sizes.images) == (1152, 864, 972, 2)
        assert sizes.max_image_tokens_per_image == 972 and sizes.max_image_tokens == 4 * 2 * 972
        assert 2 * 972 + 256 < sizes.prompt_tokens <= sizes.max_input_len < sizes.prompt_tokens + 64
        assert sizes.max_kv_cache_capacity % 128 == 0
        assert sizes.max_kv_pool_pages == 5 * sizes.max_kv_cache_capacity // 128
        assert sizes.max_kv_cache_capacity >= sizes.max_input_len + estimator.card.max_new_tokens
        few = plan_sizes(estimator, checkpoint, CAMERA, ("coordinates",), question_tokens=0, answer_tokens=16, batch=1)
        assert few.prompt_tokens < sizes.prompt_tokens and few.answer_tokens == 16 and few.max_image_tokens == 2 * 972
        with pytest.raises(ConfigError, match="batch is 17"):
            plan_sizes(estimator, checkpoint, CAMERA, ("coordinates",), batch=17)
        with pytest.raises(ConfigError, match="question_tokens is -1"):
            plan_sizes(estimator, checkpoint, CAMERA, ("coordinates",), question_tokens=-1)
        with pytest.raises(ConfigError, match="answer_tokens is 0"):
            plan_sizes(estimator, checkpoint, CAMERA, ("coordinates",), answer_tokens=0)
        with pytest.raises(ConfigError, match="the model reads 4096"):
            plan_sizes(estimator, checkpoint, CAMERA, ("coordinates",), answer_tokens=2000)


@pytest.mark.parametrize(("name", "images"), [("corr", 2), ("pose", 2), ("object", 1)])
def test_a_model_without_depth_is_sized_for_its_tasks(checkpoint, tmp_path, name, images):
    folder = shutil.copytree(checkpoint, tmp_path / "pairs")
    card = yaml.safe_load((ROOT / f"models/vlm3-{name}.yaml").read_text())
    (folder / CARD_FILE).write_text(yaml.safe_dump({**card, "source": str(folder)}))
    with Estimator.load(str(folder), device="cpu", dtype="float32") as estimator:
        sizes = plan_sizes(estimator, folder, CAMERA, estimator.card.dialects)
    assert sizes.images == images and sizes.prompt_tokens > images * sizes.image_tokens + 256
    if name == "corr":
        assert (sizes.width, sizes.height) == (1024, 768)


def exporter(path: Path, made: Path) -> Path:
    """An exporter that copies a folder."""
    return write_program(path, f"import shutil, sys\nshutil.copytree({str(made)!r}, sys.argv[2])")


def test_the_manifest_holds_sizes_version_and_what_to_beware_of(checkpoint, tmp_path):
    program = exporter(tmp_path / PROGRAM, write_export(tmp_path / "made", checkpoint))
    out = tmp_path / "out"
    out.mkdir()
    with Estimator.load(str(checkpoint), device="cpu", dtype="float32") as estimator:
        manifest = export_edge_llm(estimator, checkpoint, out, CAMERA, exporter=str(program))
    assert (manifest.target, manifest.precision, manifest.dialects) == ("edge-llm", "float16", ("coordinates",))
    assert manifest.versions["tensorrt-edgellm"] == manifest.extra["edgellm_version"] == "0.11.0"
    assert manifest.image["image_tokens"] == manifest.extra["sizes"]["image_tokens"] == 972
    assert "were float32 and are float16 now" in manifest.extra["warnings"][0]
    assert set(manifest.source_sha256) == {"model.safetensors"}
    script = (out / "build_on_device.sh").read_text()
    assert "--maxImageTokensPerImage 972" in script and str(tmp_path) not in script
    json.dumps(manifest.extra)


def test_what_edge_llm_cannot_run_is_refused_before_anything_is_made(checkpoint, llava_checkpoint, tmp_path, nowhere):
    def refused(model: Path, **options):
        with Estimator.load(str(model), device="cpu", dtype="float32") as estimator:
            export_edge_llm(estimator, model, tmp_path, CAMERA, **options)

    with pytest.raises(ModelError, match="no vision tower of model_type 'llava'"):
        refused(llava_checkpoint)
    with pytest.raises(ConfigError, match="precision is 'float32'"):
        refused(checkpoint, precision="float32")
    dense = make_checkpoint(tmp_path / "dense")
    with pytest.raises(DialectError, match="speaks dense.*--target onnx"):
        refused(dense)
    with pytest.raises(MissingDependencyError):
        refused(checkpoint)
