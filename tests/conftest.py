"""What all tests share: a world of their own (environment, ROS domain) and small random checkpoints.

About the ROS wheels from PyPI: they restart Python once, before anything else runs (a .pth file), with LD_LIBRARY_PATH
pointing at their libraries and `_ROS_WHEELS_BOOTSTRAP_COMPLETE` set so that it happens once. Pytest therefore
only ever sees the restarted interpreter, arguments and standard input whole. A child with our environment starts
without a restart. A child that runs *another* environment's Python must get neither variable: `foreign_environment`.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import itertools
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

# Settings of the caller's shell that would change what a node hears or says.
ROS_LEAKS = (
    "ROS_DOMAIN_ID",
    "ROS_LOCALHOST_ONLY",
    "ROS_STATIC_PEERS",
    "ROS_DISCOVERY_SERVER",
    "ROS_SUPER_CLIENT",
    "ROS_NAMESPACE",
    "RCUTILS_LOGGING_CONFIG_FILE",
    "FASTDDS_DEFAULT_PROFILES_FILE",
    "FASTRTPS_DEFAULT_PROFILES_FILE",
    "CYCLONEDDS_URI",
)

# Above 101 the ports of a domain (7400 + 250 * domain) run into those that Linux hands out itself.
DOMAINS = range(1, 101)
_TURNS = itertools.count(os.getpid())

SHARED_MEMORY = Path("/dev/shm")
_BEGUN_S = time.time()


def _prepare_environment() -> None:
    """Sets what this process and all children inherit; runs before torch or rclpy are imported."""
    for name in ROS_LEAKS:
        os.environ.pop(name, None)
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ["ROS_PYTHON_CHECK_FIELDS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["MPLBACKEND"] = "Agg"
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    # rclpy.init fails where neither HOME nor this is set.
    os.environ["ROS_LOG_DIR"] = str(Path(tempfile.gettempdir(), "depthlm_ros_test_logs"))
    # Children started as `python -m depthlm_ros...` test this checkout, whatever else is installed.
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    photographs = ROOT.parent / "shared" / "data"
    if photographs.is_dir():
        os.environ.setdefault("DEPTHLM_DATA", str(photographs))


def _name_training() -> None:
    """Makes `training/` importable as `depthlm_training` in a checkout that isn't installed."""
    if "depthlm_training" in sys.modules or importlib.util.find_spec("depthlm_training") is not None:
        return
    folder = ROOT / "training"
    spec = importlib.util.spec_from_file_location(
        "depthlm_training", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["depthlm_training"] = module
    spec.loader.exec_module(module)


_prepare_environment()
_name_training()
# The same examples in every run, and as long for each as it takes: a test fails for what was changed, not for what was
# drawn, or for how busy the machine is. `--hypothesis-profile=default` draws others.
settings.register_profile(
    "tests", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


def foreign_environment() -> dict[str, str]:
    """Returns the environment for a child that runs the Python of another environment."""
    own = ("_ROS_WHEELS_BOOTSTRAP_COMPLETE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    if "_ROS_WHEELS_BOOTSTRAP_COMPLETE" in os.environ:
        environment.pop("LD_LIBRARY_PATH", None)
    return environment


def clear_shared_memory(folder: Path = SHARED_MEMORY, aged_s: float = 60.0) -> None:
    """Removes segments of Fast DDS that were made since the tests began and whose process has ended.

    A node that is killed leaves one, of 64 MB with our profile, which is memory until the machine restarts. Its process
    holds a lock on the file beside it as long as it lives; one that was made just now may not have it yet.
    """
    for lock in folder.glob("fastdds_*_el"):
        if lock.name.startswith("fastdds_port"):
            continue
        with contextlib.suppress(OSError), lock.open() as held:
            if not _BEGUN_S <= os.fstat(held.fileno()).st_mtime <= time.time() - aged_s:
                continue
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.with_name(lock.name.removesuffix("_el")).unlink(missing_ok=True)
            lock.unlink()


@contextlib.contextmanager
def reserved_ros_domain() -> Iterator[int]:
    """Holds a ROS domain that no other test on this machine uses, and sets ROS_DOMAIN_ID to it.

    The reservation is a Unix socket in Linux' abstract namespace: it is as wide as the DDS ports are (one network
    namespace), leaves no file and is gone with the process however that ends. Each is another one than the last: what a
    node that has just ended left behind is not met by the next test.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reservation, pytest.MonkeyPatch.context() as patch:
        first = next(_TURNS)
        for offset in range(len(DOMAINS)):
            domain = DOMAINS[(first + offset) % len(DOMAINS)]
            with contextlib.suppress(OSError):
                reservation.bind(f"\0depthlm_ros_domain_{domain}")
                break
        else:
            raise RuntimeError(f"all ROS domains from {DOMAINS[0]} to {DOMAINS[-1]} are taken by other tests")
        patch.setenv("ROS_DOMAIN_ID", str(domain))
        try:
            yield domain
        finally:
            clear_shared_memory()


@pytest.fixture
def ros_domain() -> Iterator[int]:
    """A ROS domain of the test's own, in ROS_DOMAIN_ID for this process and its children."""
    with reserved_ros_domain() as domain:
        yield domain


@pytest.fixture(scope="module")
def ros_domain_module() -> Iterator[int]:
    """Like `ros_domain`, one for all tests of a module."""
    with reserved_ros_domain() as domain:
        yield domain


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of photographs with measured depth; its tests are skipped where DEPTHLM_DATA names none."""
    folder = os.environ.get("DEPTHLM_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip(f"DEPTHLM_DATA is {folder!r}: set it to the folder with ibims1/ and scannetpp/")
    return Path(folder)


@pytest.fixture(scope="session")
def qwen3_vl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random Qwen3-VL."""
    return _checkpoint(tmp_path_factory, "qwen3_vl")


@pytest.fixture(scope="session")
def qwen2_5_vl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random Qwen2.5-VL."""
    return _checkpoint(tmp_path_factory, "qwen2_5_vl")


@pytest.fixture(scope="session")
def llava_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random Pixtral (transformers' Llava with a Pixtral tower)."""
    return _checkpoint(tmp_path_factory, "llava")


def _checkpoint(tmp_path_factory: pytest.TempPathFactory, architecture: str) -> Path:
    from checkpoints import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp(architecture), architecture)
