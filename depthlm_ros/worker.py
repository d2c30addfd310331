"""The newest frame wins: a mailbox with one place and the thread that empties it; other work goes in between.

Inference takes longer than a camera's frame interval. A queue would only make its answers older, so a
frame that nobody has begun to work on is replaced by the next one, and counted. What else the same thread has to do
(one model, one thread) is done between frames and gets at most half of the time while frames wait. No ROS in here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Counts:
    """What became of the items since the worker started.

    Attributes:
        received: items submitted.
        dropped: items replaced by a newer one, or thrown away by `clear`, before work on them began.
        processed: items whose work ended well.
        failed: items whose work raised an error.
    """

    received: int = 0
    dropped: int = 0
    processed: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Job:
    """Work that isn't an item.

    Attributes:
        run: does it, in the worker's thread.
        failed: gets what `run` raised, in the worker's thread.
    """

    run: Callable[[], None]
    failed: Callable[[Exception], None]


class Worker(Generic[Item]):
    """Runs `process` on the newest item in a thread of its own, and jobs between items.

    Args:
        process: the work; called in the worker's thread, one item at a time.
        on_error: gets what `process` raised, in the worker's thread. The next item is worked on all the same.
        on_exit: called in the worker's thread after the last item, so that what `process` uses is
            never closed under its feet.
        next_job: gives the work to be done between two items, or None; asked whenever the worker is free, with its lock
            held, and again after `wake`. A job that took a second is followed by a second of items, if they come that
            fast, before the next one.
        clock: seconds of a clock that never jumps.
    """

    def __init__(
        self,
        process: Callable[[Item], None],
        on_error: Callable[[Exception], None],
        on_exit: Callable[[], None] = lambda: None,
        name: str = "inference",
        next_job: Callable[[], Job | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._process = process
        self._on_error = on_error
        self._on_exit = on_exit
        self._next_job = next_job
        self._clock = clock
        # Seconds that items have yet to get for the job before.
        self._owed_s = 0.0
        self._condition = threading.Condition()
        self._waiting: list[Item] = []
        self._busy = False
        self._stopping = False
        self._received = self._dropped = self._processed = self._failed = 0
        # A daemon, because a frame in work can't be interrupted and must not hold up the end of the process.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def counts(self) -> Counts:
        with self._condition:
            return Counts(self._received, self._dropped, self._processed, self._failed)

    @property
    def busy(self) -> bool:
        """Whether an item or a job is being worked on."""
        with self._condition:
            return self._busy

    def submit(self, item: Item) -> None:
        """Offers an item; one that still waits is dropped. Never blocks for the work."""
        with self._condition:
            self._received += 1
            if self._stopping:
                self._dropped += 1
                return
            self._dropped += len(self._waiting)
            self._waiting = [item]
            self._condition.notify()

    def wake(self) -> None:
        """Says that `next_job` may have something now."""
        with self._condition:
            self._condition.notify()

    def clear(self) -> None:
        """Drops the item that waits, if one does."""
        with self._condition:
            self._dropped += len(self._waiting)
            self._waiting = []

    def stop(self) -> None:
        """Asks the thread to end after the item in work; returns at once."""
        with self._condition:
            self._stopping = True
            self._dropped += len(self._waiting)
            self._waiting = []
            self._condition.notify()

    def join(self, timeout_s: float | None = None) -> bool:
        """Waits for the thread to end; returns whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (work := self._take()) is not None:
            started = self._clock()
            if isinstance(work, Job):
                self._do(work)
                self._owed_s = self._clock() - started
            else:
                self._process_item(work[0])
                self._owed_s -= self._clock() - started
            # Messages of 6 MB are not to be kept until the next one comes.
            del work
        self._on_exit()

    def _process_item(self, item: Item) -> None:
        try:
            self._process(item)
        except Exception as error:  # noqa: BLE001 - the thread's outermost frame: anything less ends all inference
            self._finished(failed=True)
            self._on_error(error)
        else:
            self._finished(failed=False)

    def _do(self, job: Job) -> None:
        try:
            job.run()
        except Exception as error:  # noqa: BLE001 - as above
            job.failed(error)
        finally:
            with self._condition:
                self._busy = False

    def _take(self) -> Job | tuple[Item] | None:
        with self._condition:
            while not self._stopping:
                owed = self._waiting and self._owed_s > 0
                job = None if owed else self._next_job()
                if job is not None or self._waiting:
                    self._busy = True
                    return job if job is not None else (self._waiting.pop(),)
                self._condition.wait()
            return None

    def _finished(self, failed: bool) -> None:
        with self._condition:
            self._busy = False
            self._failed += failed
            self._processed += not failed
