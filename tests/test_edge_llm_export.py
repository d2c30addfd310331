"""Export for TensorRT Edge-LLM around its exporter: what goes in, what is refused, what the device is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from edge_llm_exports import sides, write_export, write_graph
from edge_llm_programs import write_program
from safetensors.torch import load_file, save_file

from depthlm_ros.camera import Camera
from depthlm_ros.engines.checkpoint import open_checkpoint
from depthlm_ros.errors import ConfigError, DialectError, EngineError, MissingDependencyError, ModelError
from depthlm_ros.estimator import Estimator
from depthlm_training import edge_llm_tool
from depthlm_training.edge_llm_contract import check_export
from depthlm_training.edge_llm_export import export_edge_llm
from depthlm_training.edge_llm_scripts import write_scripts
from depthlm_training.edge_llm_sizes import Sizes, plan_sizes
from depthlm_training.edge_llm_tool import PROGRAM, VARIABLE, find_exporter, run_exporter
from depthlm_training.edge_llm_weights import stage

CAMERA = Camera(500.0, 500.0, 319.5, 239.5, 640, 480)
SIZES = Sizes(320, 256, 80, 1, 344, 48, 384, 512, 4, 20, 320, 80)


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


def test_an_exporter_that_never_ends_is_stopped_with_its_children(tmp_path):
    program = write_program(tmp_path / "p", "import os, time\nos.fork()\nprint('busy', flush=True)\ntime.sleep(100)")
    started = time.monotonic()
    with pytest.raises(EngineError, match="(?s)wasn't done after 0.5 s.*busy"):
        run_exporter(program, Path("/in"), tmp_path / "out", 0.5)
    assert time.monotonic() - started < 60


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
        assert sizes.max_kv_cache_capacity >= sizes.max_input_len + estimator.card.max_new_tokens
        few = plan_sizes(estimator, checkpoint, CAMERA, ("coordinates",), question_tokens=0, answer_tokens=16, batch=1)
        assert few.prompt_tokens < sizes.prompt_tokens and few.answer_tokens == 16 and few.max_image_tokens == 2 * 972
        with pytest.raises(ConfigError, match="batch is 17"):
            plan_sizes(estimator, checkpoint, CAMERA, ("coordinates",), batch=17)
        with pytest.raises(ConfigError, match="the model reads 4096"):
            plan_sizes(estimator, checkpoint, CAMERA, ("coordinates",), answer_tokens=2000)


@pytest.mark.parametrize("architecture", ["qwen3_vl", "qwen2_5_vl"])
def test_a_whole_export_passes(tmp_path, architecture):
    made = make_checkpoint(tmp_path / "small", architecture, dense_head=False)
    config = json.loads((made / "config.json").read_text())
    assert check_export(write_export(tmp_path / "export", made), config) == "0.11.0"


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
        (edit("llm/config.json", edgellm_version="0.9.1"), "Edge-LLM 0.9.1; graphs of 0.11"),
        (edit("llm/config.json", edgellm_version="0.110.0"), "Edge-LLM 0.110.0"),
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


def exporter(path: Path, made: Path) -> Path:
    """An exporter that copies a folder."""
    return write_program(path, f"import shutil, sys\nshutil.copytree({str(made)!r}, sys.argv[2])")


def test_the_manifest_holds_sizes_version_and_what_to_beware_of(checkpoint, tmp_path):
    program = exporter(tmp_path / PROGRAM, write_export(tmp_path / "made", checkpoint))
    out = tmp_path / "out"
    out.mkdir()
    with Estimator.load(str(checkpoint), device="cpu", dtype="float32") as estimator:
        manifest = export_edge_llm(estimator, checkpoint, out, CAMERA, executable=str(program))
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


BUILDER = """import os, sys
told = sys.argv[1:]
if told == ["--help"]:
    print({help!r}, file=sys.stderr)
    sys.exit(0)
open({log!r}, "a").write(" ".join([os.path.basename(sys.argv[0]), *told]) + "\\n")
folder = told[told.index("--engineDir") + 1]
path = os.path.join(folder, {file!r})
os.makedirs(os.path.dirname(path), exist_ok=True)
open(path, "w").write({plan!r})
"""


def builders(folder: Path, plan: str = "plan", left_out: str = "--nothing") -> Path:
    log = str(folder / "log")
    for name, file, flags in (
        ("llm_build", "llm.engine", "--onnxDir --engineDir --maxInputLen --maxKVCacheCapacity --maxBatchSize"),
        (
            "visual_build",
            "visual/visual.engine",
            "--onnxDir --engineDir --minImageTokens --maxImageTokens --maxImageTokensPerImage",
        ),
    ):
        told = " ".join(flag for flag in flags.split() if flag != left_out)
        write_program(folder / name, BUILDER.format(help=told, log=log, file=file, plan=plan))
    return folder


def run(script: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    environment = {"PATH": f"{path}:/usr/bin:/bin" if path else "/usr/bin:/bin"}
    return subprocess.run([str(script), *arguments], capture_output=True, text=True, env=environment, timeout=60)


def test_the_build_script_hands_the_sizes_to_the_builders(tmp_path):
    write_scripts(tmp_path, SIZES, "0.11.0")
    tools = builders(tmp_path / "tools")
    done = run(tmp_path / "build_on_device.sh", path=tools)
    assert done.returncode == 0, done.stderr
    llm, visual = (tools / "log").read_text().splitlines()
    assert llm == (
        f"llm_build --onnxDir {tmp_path}/onnx/llm --engineDir {tmp_path}/engines --maxInputLen 384 "
        "--maxKVCacheCapacity 512 --maxBatchSize 4"
    )
    assert visual == (
        f"visual_build --onnxDir {tmp_path}/onnx/visual --engineDir {tmp_path}/engines --minImageTokens 20 "
        "--maxImageTokens 320 --maxImageTokensPerImage 80"
    )
    assert set(json.loads((tmp_path / "engines" / "built_on.json").read_text())) == {"board", "l4t", "tensorrt"}
    elsewhere = run(tmp_path / "build_on_device.sh", str(tmp_path / "other"), path=tools)
    assert elsewhere.returncode == 0 and (tmp_path / "other" / "llm.engine").is_file()


def test_the_build_script_says_what_is_wrong(tmp_path):
    write_scripts(tmp_path, SIZES, "0.11.0")
    script = tmp_path / "build_on_device.sh"
    done = run(script)
    assert done.returncode == 1 and "no llm_build; build the examples" in done.stderr
    done = run(script, path=builders(tmp_path / "old", left_out="--maxImageTokensPerImage"))
    assert done.returncode == 1 and "visual_build knows no --maxImageTokensPerImage" in done.stderr
    assert not (tmp_path / "engines").exists()
    done = run(script, path=builders(tmp_path / "empty", plan=""))
    assert done.returncode == 1 and "llm.engine wasn't written" in done.stderr


def test_the_run_script_answers_a_file(tmp_path):
    from edge_llm_programs import llm_inference

    write_scripts(tmp_path, SIZES, "0.11.0")
    script = tmp_path / "run_on_device.sh"
    asked = {"batch_size": 1, "requests": []}
    (tmp_path / "in.json").write_text(json.dumps(asked))
    arguments = str(tmp_path / "in.json"), str(tmp_path / "out.json")
    assert "INPUT.json OUTPUT.json" in run(script).stderr
    assert "no llm_inference" in run(script, *arguments).stderr
    tools = llm_inference(tmp_path / "tools" / "llm_inference").parent
    assert "run ./build_on_device.sh first" in run(script, *arguments, path=tools).stderr
    run(tmp_path / "build_on_device.sh", path=builders(tmp_path / "tools"))
    done = run(script, *arguments, path=tools)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["responses"] == []
