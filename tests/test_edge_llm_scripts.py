"""The scripts of an Edge-LLM export, with programs that have the builders' arguments."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from edge_llm_programs import llm_inference, write_program

from depthlm_training.edge_llm_scripts import write_scripts
from depthlm_training.edge_llm_sizes import Sizes

SIZES = Sizes(320, 256, 80, 1, 344, 48, 384, 512, 4, 20, 320, 80, 20)

BUILDER = """import os, sys
told = sys.argv[1:]
if told == ["--help"]:
    print({help!r}, file=sys.stderr)
    sys.exit(0)
assert os.path.isfile(os.environ["EDGELLM_PLUGIN_PATH"])
open({log!r}, "a").write(" ".join([os.path.basename(sys.argv[0]), *told]) + "\\n")
folder = told[told.index("--engineDir") + 1]
path = os.path.join(folder, {file!r})
os.makedirs(os.path.dirname(path), exist_ok=True)
open(path, "w").write({plan!r})
"""


def builders(folder: Path, plan: str = "plan", left_out: str = "--nothing", more: str = "") -> Path:
    """llm_build and visual_build in a folder, and the plugin above it; both keep their arguments in `log`."""
    log = str(folder / "log")
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "libNvInfer_edgellm_plugin.so").write_text("")
    for name, file, flags in (
        ("llm_build", "llm.engine", "--onnxDir --engineDir --maxInputLen --maxKVCacheCapacity --maxBatchSize " + more),
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
    newer = builders(tmp_path / "newer", more="--maxKVPoolPages")
    assert run(tmp_path / "build_on_device.sh", path=newer).returncode == 0
    assert "--maxBatchSize 4 --maxKVPoolPages 20\n" in (newer / "log").read_text()
    elsewhere = run(tmp_path / "build_on_device.sh", str(tmp_path / "other"), path=tools)
    assert elsewhere.returncode == 0 and (tmp_path / "other" / "llm.engine").is_file()


def test_the_build_script_says_what_is_wrong(tmp_path):
    write_scripts(tmp_path, SIZES, "0.11.0")
    script = tmp_path / "build_on_device.sh"
    done = run(script)
    assert done.returncode == 1 and "no llm_build; build the examples" in done.stderr
    alone = builders(tmp_path / "alone" / "a" / "b" / "c" / "d")
    (alone.parent / "libNvInfer_edgellm_plugin.so").unlink()
    done = run(script, path=alone)
    assert done.returncode == 1 and "no libNvInfer_edgellm_plugin.so above llm_build" in done.stderr
    done = run(script, path=builders(tmp_path / "old", left_out="--maxImageTokensPerImage"))
    assert done.returncode == 1 and "visual_build knows no --maxImageTokensPerImage" in done.stderr
    assert not (tmp_path / "engines").exists()
    done = run(script, path=builders(tmp_path / "empty", plan=""))
    assert done.returncode == 1 and "llm.engine wasn't written" in done.stderr


def test_the_run_script_answers_a_file(tmp_path):
    write_scripts(tmp_path, SIZES, "0.11.0")
    script = tmp_path / "run_on_device.sh"
    asked = {"batch_size": 1, "requests": []}
    (tmp_path / "in.json").write_text(json.dumps(asked))
    arguments = str(tmp_path / "in.json"), str(tmp_path / "out.json")
    assert "INPUT.json OUTPUT.json" in run(script).stderr
    assert "no llm_inference" in run(script, *arguments).stderr
    tools = llm_inference(tmp_path / "tools" / "llm_inference").parent
    (tmp_path / "libNvInfer_edgellm_plugin.so").write_text("")
    assert "run ./build_on_device.sh first" in run(script, *arguments, path=tools).stderr
    run(tmp_path / "build_on_device.sh", path=builders(tmp_path / "tools"))
    done = run(script, *arguments, path=tools)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["responses"] == []
