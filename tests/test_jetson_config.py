"""The files for Jetson: parameters that the node takes, containers that can be built, what they say of themselves."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from depthlm_ros.config import Parameters
from depthlm_ros.manifest import TARGETS

ROOT = Path(__file__).resolve().parents[1]
BOARDS = ("jetson_orin", "jetson_thor")
CONTAINERS = ROOT / "config/containers"


def words(path: Path) -> dict[str, object]:
    """The commented lines that turn a file into one for answers in words."""
    lines = [line.split("# words: ", 1)[1] for line in path.read_text().splitlines() if "# words: " in line]
    return yaml.safe_load("\n".join(lines))


@pytest.mark.parametrize("board", BOARDS)
def test_the_node_takes_the_parameters(board: str) -> None:
    path = ROOT / f"config/{board}.yaml"
    dense = Parameters.from_yaml(path)
    assert dense.engine in TARGETS["onnx"] and dense.dialect == "dense"
    assert dense.max_age_s > 0 and not dense.accept_unproven
    worded = dense.replaced(**words(path))
    assert worded.engine in (*TARGETS["edge-llm"], "openai") and worded.dialect == "coordinates"
    # A board says tens of tokens a second: a full grid of points would take minutes.
    assert 0 < worded.points <= 16 and worded.densify
    if worded.engine == "openai":
        assert worded.server_urls.startswith("http://127.0.0.1:") and worded.server_dialect == "edge-llm"
        # The command that is shown serves there, on this machine only, and takes the images whole.
        assert "--host 127.0.0.1 --port 8000" in path.read_text()
        assert f"--max-batch-size {worded.server_concurrency} --enable-in-flight-batching" in path.read_text()
        # A guided request founds a batch of its own, which no other joins.
        assert not worded.guided


@pytest.mark.parametrize("board", BOARDS)
def test_figures_are_marked_as_read(board: str) -> None:
    text = " ".join((ROOT / f"config/{board}.yaml").read_text().replace("#", " ").split())
    assert "Nothing here was run on a Jetson" in text
    assert "not measured here" in text[: text.index("tokens/s")]
    assert "7.2 (Jetson Linux 39.2, TensorRT 10.16" in text


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile with their arguments, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    pairs = (line.split(None, 1) for line in joined.splitlines() if line.strip())
    return [(name, rest.strip()) for name, rest in pairs]


@pytest.mark.parametrize("board", BOARDS)
def test_containers(board: str) -> None:
    path = CONTAINERS / f"{board}.Dockerfile"
    found = instructions(path)
    names = [name for name, _ in found]
    assert set(names) <= {
        "FROM", "ARG", "SHELL", "RUN", "ENV", "WORKDIR", "COPY", "VOLUME", "USER", "ENTRYPOINT", "CMD",
    }  # no ADD, which would take URLs  # fmt: skip
    (base,) = (rest for name, rest in found if name == "FROM")
    assert re.fullmatch(r"nvcr\.io/nvidia/[a-z]+:\d\d\.\d\d-py3", base), base
    # Later images (26.07 for one) hold a TensorRT 11 that JetPack does not support.
    assert base.rsplit(":", 1)[1] < "26.05"
    user = [rest for name, rest in found if name == "USER"]
    assert user == ["$USER_ID"] and names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    # bash has a variable UID of its own that nobody can set.
    assert not re.search(r"(ARG UID|\$UID|\$\{UID)", path.read_text())
    for _, sources in (pair for pair in found if pair[0] == "COPY"):
        for source in sources.split()[:-1]:
            assert (ROOT / source).exists(), source
    everything = path.read_text()
    assert not re.search(r"(?i)token|password|secret|api_key", everything)
    assert not re.search(r"\.(plan|engine)\b", "\n".join(rest for _, rest in found))
    for part in ("--runtime nvidia --gpus all", "--network host", "--ipc host", "/etc/nv_tegra_release:ro", ":/cache"):
        assert part in everything, part
    assert f"/config/{board}.yaml" in dict(found)["CMD"] and (ROOT / f"config/{board}.yaml").is_file()
    assert max(map(len, everything.splitlines())) <= 120


@pytest.mark.parametrize("board", BOARDS)
def test_containers_install_what_setup_asks_for(board: str) -> None:
    text = (CONTAINERS / f"{board}.Dockerfile").read_text()
    code = re.search(r'python3 -c "(.*?)" > /tmp/requirements', text, re.S).group(1)
    # Docker joins continued lines as a shell does.
    # The Python of these tests, which need not be the one that the shell finds.
    asked = ["bash", "-c", f'{shlex.quote(sys.executable)} -c "{code}"']
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)
    required = [re.match(r"[\w-]+", line).group() for line in done.stdout.splitlines()]
    assert {"numpy", "transformers", "pyyaml"} <= {name.lower() for name in required}
    assert not {"torch", "pytest", "ruff", "ros-rclpy"} & set(required)
    built = yaml.safe_load(re.search(r"requires = (\[.*\])", (ROOT / "pyproject.toml").read_text()).group(1))
    assert all(f'"{name}' in text for name in built)  # --no-build-isolation


ENGINE = '{"format": 1, "target": "%s"}'


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """An environment for the entry point: a ROS to source and a `depthlm` that notes how it is called."""
    (tmp_path / "setup.bash").write_text('export SOURCED="yes${NOT_SET}"\n')
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/depthlm"
    command.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ ! -e {tmp_path}/broken ] || exit 3\ntouch "$2/model.plan"\n'
    )
    command.chmod(0o755)
    (tmp_path / "export").mkdir()
    return {
        **os.environ, "ROS_SETUP": str(tmp_path / "setup.bash"), "DEPTHLM_EXPORT": str(tmp_path / "export"),
        "DEPTHLM_CACHE": str(tmp_path / "cache"), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
    }  # fmt: skip


def enter(machine: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(CONTAINERS / "entrypoint.sh"), *command], env=machine, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip


def test_entry_point_without_an_export(machine: dict[str, str]) -> None:
    done = enter(machine, "sh", "-c", 'echo "$SOURCED $1"', "sh", "two words")
    assert (done.returncode, done.stdout) == (0, "yes two words\n"), done.stderr


def test_entry_point_builds_once_for_this_machine(machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "export/engine.json").write_text(ENGINE % "onnx")
    (tmp_path / "export").chmod(0o555)
    for _ in range(2):
        done = enter(machine, "ls", str(tmp_path / "cache/engine/"))
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["engine.json", "model.plan"]
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert re.fullmatch(rf"build {tmp_path}/cache/engines/[0-9a-f]{{16}}\.part", call)
    assert not list((tmp_path / "cache/engines").glob("*.part"))
    # Another precision is another plan, and so is another export.
    assert enter({**machine, "DEPTHLM_PRECISION": "fp16"}, "true").returncode == 0
    assert (tmp_path / "calls").read_text().splitlines()[1].endswith(".part --precision fp16")
    (tmp_path / "export/engine.json").write_text(ENGINE % "onnx" + " ")
    assert enter(machine, "true").returncode == 0
    assert len(list((tmp_path / "cache/engines").iterdir())) == 3


def test_entry_point_takes_no_broken_build_for_an_engine(machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "export/engine.json").write_text(ENGINE % "onnx")
    (tmp_path / "broken").touch()
    assert enter(machine, "echo", "started").stdout == ""
    (tmp_path / "broken").unlink()
    assert enter(machine, "echo", "started").stdout == "started\n"
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


def test_entry_point_builds_no_plan_of_other_targets(machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "export/engine.json").write_text(ENGINE % "edge-llm")
    assert enter(machine, "cat", str(tmp_path / "cache/engine/engine.json")).stdout == ENGINE % "edge-llm"
    assert not (tmp_path / "calls").exists()
    (tmp_path / "export/engine.json").write_text("{")
    broken = enter(machine, "echo", "started")
    assert broken.returncode == 1 and "export the model again" in broken.stderr and broken.stdout == ""


@pytest.mark.parametrize("target", ["../../../escaped x", "onnx ../../escaped", "x\\n../escaped", "", "plan", "../x"])
def test_entry_point_makes_no_folder_of_an_unknown_target(machine: dict[str, str], tmp_path: Path, target: str) -> None:
    (tmp_path / "export/engine.json").write_text(ENGINE % target)
    before = sorted(tmp_path.iterdir())
    done = enter(machine, "echo", "started")
    assert done.returncode == 1 and done.stdout == "" and "known: onnx, edge-llm, tensorrt-llm" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_entry_point_knows_the_targets_of_the_package() -> None:
    (known,) = re.findall(r"^ +(onnx \|.*)\) ;;$", (CONTAINERS / "entrypoint.sh").read_text(), re.M)
    assert known.split(" | ") == list(TARGETS)


def test_entry_point_takes_known_precisions_only(machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "export/engine.json").write_text(ENGINE % "onnx")
    done = enter({**machine, "DEPTHLM_PRECISION": "/../../escaped"}, "echo", "started")
    assert done.returncode == 1 and "DEPTHLM_PRECISION is '/../../escaped'" in done.stderr
    assert not (tmp_path / "cache").exists()
