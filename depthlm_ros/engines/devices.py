"""Chooses device and number format, and says why."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from depthlm_ros.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Room for activations and the KV cache of one batch beside the weights; measured need varies with
# image size and batch size, so this only guards against a choice that can't work.
HEADROOM = 1.2
GIB = 2**30
# glibc's mallopt: what is named so there, and the largest threshold it takes on 64-bit machines.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 1 << 25
_KEPT_BYTES = 1 << 29


@dataclass(frozen=True)
class Placement:
    """Where a model runs and in which number format.

    Attributes:
        device: such as `torch.device("cuda:0")`.
        dtype: such as `torch.bfloat16`.
        reasons: why so, one sentence for the device and one for the format.
    """

    device: torch.device
    dtype: torch.dtype
    reasons: tuple[str, ...]

    @property
    def dtype_name(self) -> str:
        """Such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")


def choose_placement(device: str = "auto", dtype: str = "auto", parameters: int = 0) -> Placement:
    """Resolves "auto", and refuses what this machine can't do.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto", "float32", "bfloat16" or "float16".
        parameters: number of weights, to see whether they fit.

    Raises:
        ConfigError: an unknown name, or a device that isn't there.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; choose auto, {', '.join(DTYPES)}")
    chosen, why_device = _choose_device(device, dtype, parameters)
    if dtype != "auto":
        return Placement(chosen, DTYPES[dtype], (why_device, f"{dtype} because it was asked for"))
    auto, why_dtype = _auto_dtype(chosen)
    return Placement(chosen, auto, (why_device, why_dtype))


def limit_cpu_threads(count: int) -> None:
    """Leaves CPU cores to others: the operators of this process run on at most `count` of them."""
    torch.set_num_threads(count)


def keep_freed_memory() -> bool:
    """Lets this process keep memory that it frees, up to 512 MiB, for what it allocates next.

    glibc gives large blocks back to the system at once, and the system clears every page that it hands out again: with
    the activations of a CPU's passes, 5 to 10 % of a frame. Other C libraries are left as they are.

    Returns:
        Whether it is so from now on.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    kept = mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    return kept == (1, 1)


def _choose_device(device: str, dtype: str, parameters: int) -> tuple[torch.device, str]:
    if device == "auto":
        return _auto_device(dtype, parameters)
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is unknown; choose auto, cpu, cuda or cuda:N") from error
    if asked.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not supported; choose auto, cpu, cuda or cuda:N")
    if asked.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {device!r} was asked for, but {_why_no_cuda()}; use device 'cpu' or 'auto'")
        asked = torch.device("cuda", asked.index or 0)
        if asked.index >= torch.cuda.device_count():
            raise ConfigError(f"device {device!r} was asked for, but there are only {torch.cuda.device_count()} GPUs")
    return asked, f"{asked} because it was asked for"


def _auto_device(dtype: str, parameters: int) -> tuple[torch.device, str]:
    if not torch.cuda.is_available():
        return torch.device("cpu"), f"cpu because {_why_no_cuda()}"
    gpu = torch.device("cuda", torch.cuda.current_device())
    width = DTYPES[dtype].itemsize if dtype != "auto" else 2
    needed = parameters * width * HEADROOM
    free, total = torch.cuda.mem_get_info(gpu)
    name = torch.cuda.get_device_name(gpu)
    if needed > free:
        return torch.device("cpu"), (
            f"cpu because {name} has {free / GIB:.1f} of {total / GIB:.1f} GiB free and the model needs about "
            f"{needed / GIB:.1f}"
        )
    return gpu, f"{gpu} because {name} is there with {free / GIB:.1f} of {total / GIB:.1f} GiB free"


def _auto_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    if device.type == "cpu":
        return (
            torch.float32,
            "float32 because it is exact and bfloat16 changes some answers; ask for bfloat16 to save memory",
        )
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16, "bfloat16 because the GPU computes in it natively"
    return torch.float16, "float16 because the GPU is older than compute capability 8.0 and lacks bfloat16"


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} sees no NVIDIA GPU or no working driver"
