"""CUDA graphs: a function of tensors is recorded once for each set of shapes and then replayed.

A pass of hundreds of small kernels is started by one call then, so that the host is no longer what a small model waits
for. On a CPU there is nothing to record: the function is called.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch

Tensors = tuple[torch.Tensor, ...]
Replay = Callable[[], None]
Recorder = Callable[[Callable[[], Tensors]], tuple[Replay, Tensors]]

SHAPES = 4  # recordings that are kept; each holds on to the memory of its pass
WARM_UPS = 3  # as in PyTorch's notes on CUDA graphs: libraries choose their kernels and allocate in the first calls


class Graphed:
    """A function of tensors of static shapes, recorded where that pays. Threads and CUDA streams may share it.

    Args:
        function: (key, tensors...) to a tuple of tensors, without waiting for the device and without branches on
            values; the same key and shapes must do the same operations.
        capacity: number of recordings; the one that was used longest ago is dropped for a new one.
        record: runs a function without arguments and gives back what replays it, and its static outputs.

    Attributes:
        reason: why nothing is recorded any more, or None.
    """

    def __init__(
        self, function: Callable[..., Tensors], *, capacity: int = SHAPES, record: Recorder | None = None
    ) -> None:
        self._function = function
        self._capacity = capacity
        self._record = record
        self._kept: OrderedDict[Hashable, tuple[Replay, Tensors, Tensors]] = OrderedDict()
        self._lock = threading.Lock()
        self._free: torch.cuda.Event | None = None
        self.reason: str | None = None

    def __call__(self, key: Hashable, *tensors: torch.Tensor) -> Tensors:
        """Calls the function or replays its recording.

        Args:
            key: what the function does beside its tensors' shapes; handed to it.
            *tensors: its inputs, all on one device.

        Returns:
            Tensors that later calls leave alone.
        """
        record = self._record or (record_cuda if tensors[0].is_cuda else None)
        if record is None or self.reason is not None:
            return self._function(key, *tensors)
        shapes = (key, *((tuple(x.shape), x.dtype, x.device) for x in tensors))
        with self._lock:
            if shapes in self._kept or self._try_to_record(record, shapes, key, tensors):
                return self._replayed(shapes, tensors)
        return self._function(key, *tensors)

    def _replayed(self, shapes: Hashable, tensors: Sequence[torch.Tensor]) -> Tensors:
        self._kept.move_to_end(shapes)
        replay, inputs, outputs = self._kept[shapes]
        stream = torch.cuda.current_stream(tensors[0].device) if tensors[0].is_cuda else None
        if stream is not None and self._free is not None:
            stream.wait_event(self._free)  # another stream may still be at work in the same memory
        for place, value in zip(inputs, tensors, strict=True):
            place.copy_(value, non_blocking=True)
        replay()
        copies = tuple(x.clone() for x in outputs)
        if stream is not None:
            self._free = torch.cuda.Event()
            self._free.record(stream)
        return copies

    @property
    def recorded(self) -> int:
        """Number of recordings."""
        return len(self._kept)

    def clear(self) -> None:
        """Drops all recordings and their memory."""
        with self._lock:
            self._kept.clear()

    def _try_to_record(
        self, record: Recorder, shapes: Hashable, key: Hashable, tensors: Sequence[torch.Tensor]
    ) -> bool:
        while len(self._kept) >= self._capacity:
            self._kept.popitem(last=False)
        inputs = tuple(x.clone() for x in tensors)
        try:
            replay, outputs = record(lambda: self._function(key, *inputs))
        except torch.OutOfMemoryError:
            # The frame may yet fit without a recording, which keeps the memory of a whole pass.
            self._kept.clear()
            self.reason = "no CUDA graphs because a recording doesn't fit into the GPU's memory"
            return False
        except RuntimeError as error:
            self._kept.clear()
            self.reason = f"no CUDA graphs because recording failed: {str(error).splitlines()[0]}"
            return False
        self._kept[shapes] = (replay, inputs, outputs)
        return True


def record_cuda(function: Callable[[], Tensors]) -> tuple[Replay, Tensors]:
    """Records a function's kernels on the current CUDA device.

    Raises:
        RuntimeError: it does something that can't be recorded, such as waiting for the device.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Other threads go on with work of their own meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function()
    return graph.replay, outputs
