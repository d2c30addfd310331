"""Mixtures of sources, drawn by a counter, and a loader that reads ahead in other processes.

Draw k of a run is a function of the seed and k alone: no state to save but a position, the same rows whichever rank or
worker draws them, and a run with other ranks goes on where the first one stopped.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import sys
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from hashlib import blake2b
from itertools import accumulate
from multiprocessing import get_context, parent_process
from typing import Generic, TypeVar

import cv2

from depthlm_ros.errors import CameraError, ConfigError, DatasetError, ImageError
from depthlm_training.rows import UNUSABLE_CAMERA, BadRow, BadRows
from depthlm_training.sources import Example, Source

T = TypeVar("T")

# Draws walk over a ring of 2^32 places in strides of its golden section, which spread more evenly than any others.
_RING = 1 << 32
_STRIDE = 2654435769
# Draws that are shuffled among each other, so that sources don't alternate in a fixed pattern.
_BLOCK = 256
_ROUNDS = 6
# Rows tried for one draw before its source is given up.
_TRIES = 100


class Mixture:
    """Rows of several sources in a fixed proportion, each source shuffled anew in every epoch of its own.

    Args:
        sources: where the rows come from.
        weights: how often each is drawn, relative to the others; by default as many times as it has rows.
        seed: of all draws.
        bad_rows: how many rows may be bad, see `BadRows`.

    Attributes:
        bad_rows: those met so far in this process; `Loader` adds those of its workers.

    Raises:
        ConfigError: no source, an empty one, weights that don't fit.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        bad_rows: float = 0.01,
    ) -> None:
        self.sources = tuple(sources)
        self._sizes = [len(source) for source in self.sources]
        weights = self._sizes if weights is None else list(weights)
        if not self._sizes or min(self._sizes) < 1:
            raise ConfigError(f"the sources have {self._sizes} rows; give at least one source, none of them empty")
        if len(weights) != len(self._sizes):
            raise ConfigError(f"{len(weights)} weights for {len(self._sizes)} sources; give one for each")
        if not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
            raise ConfigError(f"the weights are {weights}; give finite numbers, none negative, one above zero")
        self._seed = seed
        self._start = _number(seed, "start") % _RING
        total = sum(weights)
        self._bounds = [0, *(round(_RING * share / total) for share in accumulate(weights))]
        self.bad_rows = BadRows(bad_rows, sum(self._sizes))

    def __len__(self) -> int:
        """Rows of all sources together."""
        return sum(self._sizes)

    def draw(self, k: int) -> tuple[int, int]:
        """Draw k of the run.

        Returns:
            (source, row).
        """
        block, within = divmod(k, _BLOCK)
        k = block * _BLOCK + permuted(within, _BLOCK, (self._seed, "block", block))
        source = bisect_right(self._bounds, (_STRIDE * k + self._start) % _RING) - 1
        epoch, position = divmod(self._drawn(source, k), self._sizes[source])
        return source, permuted(position, self._sizes[source], (self._seed, source, epoch))

    def example(self, k: int) -> Example:
        """The row of draw k; where it is bad, another of the same source, which one depends on k alone.

        Raises:
            DatasetError: too many rows are bad; the message lists them.
        """
        return self.made(k, lambda source, example: example)

    def made(self, k: int, make: Callable[[int, Example], T]) -> T:
        """What `make` makes of the row of draw k and the number of its source.

        A row is bad as well if `make` can do nothing with it: raises `BadRow`, or finds camera or image unusable.

        Raises:
            DatasetError: too many rows are bad; the message lists them.
        """
        source, row = self.draw(k)
        for again in range(_TRIES):
            try:
                example = self.sources[source][row]
                try:
                    return make(source, example)
                except (CameraError, ImageError) as error:
                    raise BadRow(example.name, UNUSABLE_CAMERA, str(error)) from error
            except BadRow as bad:
                self.bad_rows.add(bad.row, bad.cause)
            row = _number(self._seed, "again", k, again) % self._sizes[source]
        raise DatasetError(
            f"{_TRIES} rows in turn of {self.sources[source].name} can't be trained on; mend them or leave the source "
            f"out:\n{self.bad_rows.report()}"
        )

    def _drawn(self, source: int, k: int) -> int:
        """How many of the first k draws, before they are shuffled, fall to a source."""
        low, high = self._bounds[source : source + 2]
        below_high = floor_sum(k, _RING, _STRIDE, self._start - high + _RING)
        return floor_sum(k, _RING, _STRIDE, self._start - low + _RING) - below_high


class Loader(Generic[T]):
    """Makes items k = start, start + step, ... ahead of their use, and gives `(k, item)` in this order.

    Rank r of n starts at the run's position plus r with step n. Items are made in processes of their own, started
    afresh, so `make` must be picklable, and what it does must depend on k alone.

    Args:
        make: makes one item.
        workers: processes; 0 makes items here, when they are asked for.
        start: the first k.
        stop: where to end, not included.
        step: from one k to the next.
        prefetch: items that each worker is ahead.
        bad_rows: those of the mixture that `make` draws from; the workers' are added to them.
    """

    def __init__(
        self,
        make: Callable[[int], T],
        workers: int,
        start: int,
        stop: int,
        step: int = 1,
        prefetch: int = 2,
        bad_rows: BadRows | None = None,
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise ConfigError(f"{workers} workers that are {prefetch} items ahead; give 0 or more, at least 1 ahead")
        self._make, self._bad_rows = make, bad_rows
        self._workers, self._ahead = workers, workers * prefetch
        self._counters = range(start, stop, step)

    def __len__(self) -> int:
        return len(self._counters)

    def __iter__(self) -> Iterator[tuple[int, T]]:
        """Yields `(k, item)`.

        Raises:
            DatasetError: a worker was killed, or too many rows are bad. Errors of `make` are passed on.
        """
        if self._workers == 0:
            return ((k, self._make(k)) for k in self._counters)
        return self._read_ahead()

    def _read_ahead(self) -> Iterator[tuple[int, T]]:
        # One pickle of both, so that the workers' `make` counts in the workers' `bad_rows`.
        work = pickle.dumps((self._make, self._bad_rows))
        pool = ProcessPoolExecutor(self._workers, get_context("spawn"), _prepare, (work,))
        waiting, todo = deque(), iter(self._counters)
        try:
            while True:
                while len(waiting) < self._ahead and (k := next(todo, None)) is not None:
                    waiting.append((k, pool.submit(_serve, k)))
                if not waiting:
                    return
                k, promised = waiting.popleft()
                item, found = promised.result()
                if self._bad_rows is not None:
                    self._bad_rows.merge(found)
                yield k, item
        except BrokenProcessPool as error:
            raise DatasetError(
                f"a data worker ended while item {k} was awaited, killed from outside or for want of memory; lower "
                "the number of workers or how far they are ahead, and resume"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Worker:
    """What a worker process works with: a pickle, until the first item, of `make` and the bad rows it counts in."""

    work: bytes | None
    make: Callable[[int], object]
    bad_rows: BadRows | None


def _prepare(work: bytes) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    cv2.setNumThreads(1)
    # Ctrl-C is for the process that trains; a worker whose trainer is gone has nobody to work for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Worker.work = work


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def _serve(k: int) -> tuple[object, tuple[tuple[str, str], ...]]:
    if _Worker.work is not None:
        # Here, where an error of it is passed on; one in `_prepare` would look like a worker that was killed.
        _Worker.make, _Worker.bad_rows = pickle.loads(_Worker.work)
        _Worker.work = None
        # It reads the variable when it is imported, and may have been already, with the program's main module.
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
    item = _Worker.make(k)
    return item, () if _Worker.bad_rows is None else _Worker.bad_rows.take()


def permuted(index: int, length: int, key: tuple) -> int:
    """Where a shuffle of `length` things puts number `index`; another shuffle for each key, none held in memory.

    A Feistel network over a grid of about the square root of `length` a side (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002); places of the grid beyond `length` are walked through.
    """
    rows = math.isqrt(length - 1) + 1
    columns = -(-length // rows)
    while True:
        row, column = index % rows, index // rows
        for turn in range(0, _ROUNDS, 2):
            row = (row + _number(*key, turn, column)) % rows
            column = (column + _number(*key, turn + 1, row)) % columns
        index = column * rows + row
        if index < length:
            return index


def floor_sum(count: int, divisor: int, factor: int, offset: int) -> int:
    """The sum of (factor * i + offset) // divisor over i < count, by Euclid's algorithm; none may be negative."""
    total = 0
    while count > 0:
        total += (count - 1) * count // 2 * (factor // divisor) + count * (offset // divisor)
        factor, offset = factor % divisor, offset % divisor
        count, offset = divmod(factor * count + offset, divisor)
        divisor, factor = factor, divisor
        if divisor == 0:
            break
    return total


def _number(*key: object) -> int:
    """64 bits that depend on the key alone, the same in every process and version of Python."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")
