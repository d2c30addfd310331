"""Device and number format are chosen from what the machine has, and the choice is explained."""

from __future__ import annotations

import pytest
import torch

from depthlm_ros.engines import require_versions
from depthlm_ros.engines.devices import choose_placement
from depthlm_ros.errors import ConfigError, MissingDependencyError

GIB = 2**30


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    """Stands in for a GPU: returns a function that sets its capability and free memory."""

    def install(capability=(8, 7), free_gib=20.0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib * GIB), 24 * GIB))

    return install


def test_without_a_gpu_auto_is_float32_on_the_cpu_and_says_why(no_gpu):
    placement = choose_placement()
    assert (placement.device.type, placement.dtype) == ("cpu", torch.float32)
    assert "cpu because torch" in placement.reasons[0]
    assert "float32 because" in placement.reasons[1]


def test_a_gpu_with_bfloat16_gets_bfloat16(gpu):
    gpu(capability=(8, 7))
    placement = choose_placement()
    assert (str(placement.device), placement.dtype_name) == ("cuda:0", "bfloat16")
    assert "Test GPU" in placement.reasons[0]


def test_an_older_gpu_gets_float16(gpu):
    gpu(capability=(7, 5))
    assert choose_placement().dtype is torch.float16


def test_auto_stays_on_the_cpu_when_the_weights_do_not_fit(gpu):
    gpu(free_gib=4.0)
    placement = choose_placement(parameters=4_000_000_000)
    assert placement.device.type == "cpu"
    assert "4.0 of 24.0 GiB free" in placement.reasons[0]


def test_what_was_asked_for_is_kept(gpu):
    gpu(free_gib=0.1)
    placement = choose_placement("cuda:0", "float16", parameters=10**9)
    assert (str(placement.device), placement.dtype_name) == ("cuda:0", "float16")
    assert all("asked for" in reason for reason in placement.reasons)


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "mps", "meta"])
def test_an_unknown_device_is_refused_by_name(no_gpu, device):
    with pytest.raises(ConfigError, match=device):
        choose_placement(device)


def test_a_missing_gpu_is_refused_with_the_remedy(no_gpu):
    with pytest.raises(ConfigError, match="use device 'cpu' or 'auto'"):
        choose_placement("cuda")


def test_a_gpu_beyond_the_last_is_refused(gpu):
    gpu()
    with pytest.raises(ConfigError, match="only 1"):
        choose_placement("cuda:3")


def test_an_unknown_dtype_is_refused_by_name():
    with pytest.raises(ConfigError, match="int8"):
        choose_placement("cpu", "int8")


def test_an_old_version_is_named_with_the_line_that_installs_a_newer_one():
    seen = torch.__version__.split("+")[0]
    with pytest.raises(MissingDependencyError, match=rf'{seen}.* is too old; run: pip install "torch>=99.0"'):
        require_versions({"torch": "99.0"})


def test_an_absent_package_is_named():
    with pytest.raises(MissingDependencyError, match="no-such-package is not installed"):
        require_versions({"no-such-package": "1.0"})


def test_the_installed_versions_are_new_enough():
    require_versions()
