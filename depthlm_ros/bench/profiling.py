"""Where a frame's time goes: matrix products, attention, and the rest, by the operators' own names."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MATMUL = ("mm", "addmm", "matmul", "addmv", "mv")
LAYERS = ("linear", "convolution")
# Projections are plain products; batched ones, the softmax, by hand too, and its merging are attention's.
ATTENTION = (
    *("attention", "bmm", "softmax", "logsumexp", "logaddexp", "flash", "fmha", "sdpa", "flex"),
    # How two attentions over disjoint keys are joined (engines/cascade.py).
    *("lerp", "sigmoid"),
)
BY_HAND = ("exp", "amax")
KERNELS = ("gemm", "cutlass", "nvjet", "cublas", "gemv", "splitk", "wgmma")
# After one that doesn't count: the profiler's start disturbs it (up to a second, in whatever runs then).
FRAMES = 5
_MARK = "depthlm.frame"
LEFT_OUT = (_MARK, "cudaDeviceSynchronize", "cudaStreamSynchronize")


@dataclass(frozen=True)
class Shares:
    """A frame's time by kind of operator.

    Attributes:
        seconds: of all operators together, on the device where there is one.
        matmul: share of matrix products.
        attention: share of attention.
        rest: share of everything else.
        largest: the operators of the rest that took most, with their shares.
        rest_spread: least and most rest of the frames that were profiled; this is the one with the median.
    """

    seconds: float
    matmul: float
    attention: float
    rest: float
    largest: tuple[tuple[str, float], ...]
    rest_spread: tuple[float, float] = (0.0, 0.0)


def profile_frame(run: Callable[[], object], device: torch.device) -> Shares:
    """Runs some frames under torch's profiler, and gives the one whose rest is the median.

    Args:
        run: answers a frame, warmed up.
        device: what counts: the kernels' time on a GPU, the operators' own time on a CPU.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
        for _ in range(1 + FRAMES):
            with record_function(_MARK):
                run()
                if cuda:
                    torch.cuda.synchronize(device)
    events = recorded.events()
    starts = sorted(event.time_range.start for event in events if event.key == _MARK and not _on_gpu(event))[1:]
    frames: list[dict[str, float]] = [{} for _ in starts]
    for event in events:
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        number = bisect(starts, event.time_range.start) - 1
        if own > 0 and number >= 0 and event.key not in LEFT_OUT and _on_gpu(event) == cuda:
            frames[number][event.key] = frames[number].get(event.key, 0.0) + own
    ordered = sorted(map(shares, frames), key=lambda frame: frame.rest)
    return replace(ordered[len(ordered) // 2], rest_spread=(ordered[0].rest, ordered[-1].rest))


def shares(taken: dict[str, float]) -> Shares:
    """Sorts operators by their names.

    Args:
        taken: microseconds of each operator by itself.
    """
    total = sum(taken.values()) or 1.0
    sums = {"matmul": 0.0, "attention": 0.0, "rest": 0.0}
    rest = {}
    for name, own in taken.items():
        kind = kind_of(name)
        sums[kind] += own
        if kind == "rest":
            rest[name] = own / total
    largest = sorted(rest.items(), key=lambda item: -item[1])[:8]
    return Shares(total / 1e6, sums["matmul"] / total, sums["attention"] / total, sums["rest"] / total, tuple(largest))


def _on_gpu(event) -> bool:
    return event.device_type.name == "CUDA"


def kind_of(name: str) -> str:
    """ "matmul", "attention" or "rest" for an operator or a GPU kernel."""
    plain = name.rpartition("::")[2].lower().strip("_") if "<" not in name else name.lower()
    if plain in BY_HAND or any(word in plain for word in ATTENTION):
        return "attention"
    if plain in MATMUL or any(word in plain for word in (*LAYERS, *KERNELS)):
        return "matmul"
    return "rest"
