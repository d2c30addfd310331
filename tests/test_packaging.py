"""What is installed, how, and whether the README still says so."""

from __future__ import annotations

import ast
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import DOMAINS, ROOT, clear_shared_memory, foreign_environment, reserved_ros_domain

import depthlm_ros
from depthlm_ros import config
from depthlm_ros.cli import build_parser

NAME = "depthlm_ros"
MANIFEST = ElementTree.parse(ROOT / "package.xml").getroot()
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# The other folders in models/ are somebody's own checkpoints.
SHIPPED_MODELS = ("demo", "sample_drive")
# Distributions whose import name is another one.
IMPORT_NAMES = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml"}
# Imported only where they happen to be installed, so nothing may demand them.
OPTIONAL_IMPORTS = {"cv_bridge", "sensor_msgs_py", "torchvision", "huggingface_hub", "math_verify"}
OPTIONAL_IMPORTS |= {"peft", "trl", "datasets"}
# `google` is protobuf, which comes with onnx.
OPTIONAL_IMPORTS |= {"onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_llm", "tensorrt_edgellm", "google"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Runs a command and returns what it says; a failure shows it."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def shipped_files() -> list[Path]:
    """The files of the folders that are installed as data, relative to the repository."""
    folders = [ROOT / "launch", ROOT / "config", *(ROOT / "models" / name for name in SHIPPED_MODELS)]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += (ROOT / "models").glob("*.yaml")
    return sorted(path.relative_to(ROOT) for path in files if "__pycache__" not in path.parts)


def own_modules(folder: str) -> list[Path]:
    """The Python files below a folder of the repository."""
    return sorted((ROOT / folder).rglob("*.py"))


def imported_names(folder: str) -> set[str]:
    """Top-level names that the code below a folder imports, the standard library and ourselves left out."""
    names = set()
    for path in own_modules(folder):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {NAME, "depthlm_training"}


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory) -> Path:
    """The repository without what git, pip and colcon put there."""
    copy = tmp_path_factory.mktemp("source") / NAME
    names = (".git", ".venv", "build", "install", "log", "results", "runs", "*.egg-info", "__pycache__", ".*_cache")
    by_name = shutil.ignore_patterns(*names)

    def left_out(folder: str, entries: list[str]) -> set[str]:
        foreign = [entry for entry in entries if Path(folder, entry).is_dir() and entry not in SHIPPED_MODELS]
        return {*by_name(folder, entries), *(foreign if Path(folder) == ROOT / "models" else [])}

    shutil.copytree(ROOT, copy, ignore=left_out, symlinks=True)
    return copy


@pytest.fixture(scope="module")
def wheel(source_copy, tmp_path_factory) -> zipfile.ZipFile:
    """The wheel that `pip install .` makes and unpacks."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", out, cwd=source_copy)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        yield archive


@pytest.fixture(scope="module")
def workspace(source_copy, tmp_path_factory) -> Path:
    """A colcon workspace with the package built and one passing test in it."""
    pytest.importorskip("colcon_ros", reason="colcon-ros is not installed: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("workspace")
    package = folder / "src" / NAME
    shutil.copytree(source_copy, package, ignore=shutil.ignore_patterns("tests"), symlinks=True)
    (package / "tests").mkdir()
    (package / "tests" / "test_one.py").write_text("def test_one():\n    pass\n", encoding="utf-8")
    colcon(folder, "build")
    return folder


def colcon(workspace: Path, *arguments: str) -> str:
    """Runs colcon in a workspace."""
    return run(sys.executable, "-m", "colcon", *arguments, cwd=workspace, COLCON_HOME=str(workspace / "home"))


def test_package_xml_declares_an_ament_python_package():
    assert MANIFEST.get("format") == "3"
    assert MANIFEST.findtext("name") == NAME
    assert MANIFEST.findtext("export/build_type") == "ament_python"
    assert MANIFEST.findtext("license") == "Apache-2.0"


def test_the_version_is_the_same_everywhere():
    setup_says = run(sys.executable, "setup.py", "--version", cwd=ROOT).splitlines()[-1]
    assert {MANIFEST.findtext("version"), setup_says} == {depthlm_ros.__version__}


def test_every_ros_package_that_is_imported_is_declared():
    declared = {element.text for element in MANIFEST.iter("exec_depend")}
    ros = {name for name in imported_names(NAME) if name == "rclpy" or name.endswith(("_msgs", "_interfaces"))}
    assert "sensor_msgs" in ros
    assert ros <= declared


def test_everything_else_that_is_imported_is_required_by_setup_py():
    source = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    required = next(
        ast.literal_eval(node.value)
        for node in ast.walk(source)
        if isinstance(node, ast.keyword) and node.arg == "install_requires"
    )
    distributions = {re.split(r"[<>=\[]", requirement)[0] for requirement in required}
    provided = {IMPORT_NAMES.get(name, name) for name in distributions}
    provided |= {element.text for element in MANIFEST.iter("exec_depend")}
    provided |= {"ament_index_python", "tokenizers"}  # tokenizers: a part of transformers
    assert imported_names(NAME) | imported_names("training") <= provided | OPTIONAL_IMPORTS


def test_a_wheel_holds_all_modules_and_all_shipped_files(wheel):
    names = wheel.namelist()
    for path in own_modules(NAME):
        assert path.relative_to(ROOT).as_posix() in names
    for path in own_modules("training"):
        assert f"depthlm_training/{path.relative_to(ROOT / 'training').as_posix()}" in names
    data = f"{NAME}-{depthlm_ros.__version__}.data/data"
    for path in (Path("package.xml"), *shipped_files()):
        assert f"{data}/share/{NAME}/{path.as_posix()}" in names
    assert f"{data}/share/ament_index/resource_index/packages/{NAME}" in names


@pytest.mark.parametrize("executable", ["depth_node", "depthlm"])
def test_a_wheel_has_each_executable_where_a_shell_and_where_ros2_run_look(wheel, executable):
    entry_points = wheel.read(f"{NAME}-{depthlm_ros.__version__}.dist-info/entry_points.txt").decode()
    assert f"{executable} = " in entry_points
    installed = wheel.getinfo(f"{NAME}-{depthlm_ros.__version__}.data/data/lib/{NAME}/{executable}")
    assert installed.external_attr >> 16 & 0o111, "not executable"


def test_colcon_sees_an_ament_python_package(workspace):
    assert "(ros.ament_python)" in colcon(workspace, "list")


@pytest.mark.parametrize("executable", ["bin/depthlm", f"lib/{NAME}/depthlm"])
def test_an_executable_from_colcon_runs_in_the_active_environment(workspace, executable):
    prefix = workspace / "install" / NAME
    site_packages = next((prefix / "lib").glob("python*/site-packages"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    said = run(prefix / executable, "--help", cwd=workspace, PATH=path, PYTHONPATH=str(site_packages))
    assert "replay" in said


def test_a_colcon_workspace_has_the_shipped_files(workspace):
    share = workspace / "install" / NAME / "share" / NAME
    assert [path for path in shipped_files() if not (share / path).is_file()] == []


def test_colcon_runs_the_tests(workspace):
    colcon(workspace, "test")
    assert "1 test, 0 errors, 0 failures" in colcon(workspace, "test-result", "--all")


def test_both_commands_of_the_readme_exist_and_ci_runs_them():
    first_screen = README[: README.index("\n## ")]
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for command in ("make demo", "make test"):
        assert command in first_screen
        assert f"\n{command} " in ci
        assert re.search(rf"^{command.split()[1]}:", MAKEFILE, re.M)
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_readme_shows_the_parameters_as_they_are():
    shown = README.split("<!-- parameters -->\n")[1].split("<!-- end of parameters -->")[0]
    assert shown == config.markdown_table(), "refresh it with: python -m depthlm_ros.config"


def test_the_readme_points_at_files_that_exist():
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_readme_launches_a_file_that_exists():
    launched = re.findall(rf"ros2 launch {NAME} (\S+)", README)
    assert launched
    assert [name for name in launched if not (ROOT / "launch" / name).is_file()] == []


@pytest.mark.parametrize("line", re.findall(r"^depthlm .*", README, re.M))
def test_every_depthlm_command_of_the_readme_parses(line):
    build_parser().parse_args(shlex.split(line, comments=True)[1:])


def test_the_readme_has_no_figure_left_open():
    assert "TO BE MEASURED" not in README


def test_nothing_names_a_folder_of_one_machine():
    # In pieces, so that this file does not hold what it looks for.
    machine = re.compile("|".join("/" + rest for rest in ("work/", "root/", r"home/\w", r"Users/\w", "opt/wheels")))
    suffixes = {".py", ".md", ".xml", ".cfg", ".toml", ".yaml", ".json", ".rviz", ""}
    listed = [
        path
        for folder in (NAME, "launch", "config", "training", "tests", "models", "resource", ".ci")
        for path in (ROOT / folder).rglob("*")
        if "__pycache__" not in path.parts
    ]
    # In a worktree .git is a file, with the path of the checkout it belongs to.
    top = [path for path in ROOT.glob("*") if path.name != ".git"]
    files = [path for path in (*top, *listed) if path.is_file() and path.suffix in suffixes]
    guilty = [path for path in files if machine.search(path.read_text(encoding="utf-8", errors="replace"))]
    assert guilty == []


def test_two_reservations_never_share_a_ros_domain():
    with reserved_ros_domain() as first, reserved_ros_domain() as second:
        assert first != second
        assert {first, second} <= set(DOMAINS)
        assert os.environ["ROS_DOMAIN_ID"] == str(second)


def test_shared_memory_of_ended_nodes_is_given_back_and_that_of_others_left_alone(tmp_path):
    for name in ("dead", "alive", "port7000"):
        (tmp_path / f"fastdds_{name}").write_text("segment")
        (tmp_path / f"fastdds_{name}_el").touch()
    with (tmp_path / "fastdds_alive_el").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        clear_shared_memory(tmp_path)
        assert len(list(tmp_path.iterdir())) == 6
        clear_shared_memory(tmp_path, aged_s=0.0)
    assert {path.name.split("_")[1] for path in tmp_path.iterdir()} == {"alive", "port7000"}


@pytest.mark.ros
@pytest.mark.parametrize("foreign", [False, True], ids=["our environment", "another environment's"])
def test_rclpy_starts_in_a_child_without_a_home(ros_domain, foreign, tmp_path):
    environment = foreign_environment() if foreign else dict(os.environ)
    environment.pop("HOME", None)
    environment["ROS_LOG_DIR"] = str(tmp_path)
    code = "import rclpy; rclpy.init(); rclpy.create_node('child'); rclpy.try_shutdown()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
