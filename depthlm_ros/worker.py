"""The newest frame wins: a mailbox with one place and the threads that empty it; other work goes in between.

Inference takes longer than a camera's frame interval. A queue would only make its answers older, so a
frame that nobody has begun to work on is replaced by the next one, and counted. What else the same thread has to do
(one model, one thread) is done between frames and gets at most half of the time while frames wait.

Work has three steps, each in a thread of its own: while one frame is in the model the next is prepared, and what the
last one gave is made into messages. No ROS in here.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")

# An item is prepared when the work before it is about to end: this many times what preparing took, and this much more,
# before the shortest of the last few works would. Prepared sooner it would only be replaced by a newer one.
_LEAD_PREPARATIONS = 2.0
_LEAD_S = 0.01
_WORKS_REMEMBERED = 8


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
    """Prepares, processes and finishes the newest item, each step in a thread of its own, with jobs between items.

    At most one item is prepared ahead. When the worker becomes free it takes the newest item there is at that moment,
    and waits for its preparation where that is still under way. Items are processed and finished in the order they
    came.

    Args:
        process: the work on what `prepare` returned; called in the worker's thread, one item at a time.
        on_error: gets what a step raised, in the thread of the step; that item is lost. The next one is worked on all
            the same.
        on_exit: called in the worker's thread after the last step of the last item, so that what the steps use is
            never closed under their feet.
        next_job: gives the work to be done between two items, or None; asked whenever the worker is free, with its lock
            held, and again after `wake`. A job that took a second is followed by a second of items, if they come that
            fast, before the next one.
        clock: seconds of a clock that never jumps.
        prepare: makes of an item what `process` gets; None gives it the item itself, and there is no such thread.
        finish: gets what `process` returned; None drops that, and there is no such thread. While it is busy one more
            result waits for it; `process` is held up before a third.
    """

    def __init__(
        self,
        process: Callable[[Any], Any],
        on_error: Callable[[Exception], None],
        on_exit: Callable[[], None] = lambda: None,
        name: str = "inference",
        next_job: Callable[[], Job | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        *,
        prepare: Callable[[Item], Any] | None = None,
        finish: Callable[[Any], None] | None = None,
    ) -> None:
        self._process = process
        self._on_error = on_error
        self._on_exit = on_exit
        self._next_job = next_job
        self._clock = clock
        self._prepare = prepare
        self._finish = finish
        # Seconds that items have yet to get for the job before.
        self._owed_s = 0.0
        self._condition = threading.Condition()
        # Items are known by how many had come with them: those that wait and are ready as (number, content).
        self._waiting: tuple[int, Item] | None = None
        self._preparing = 0
        self._ready: tuple[int, Any] | None = None
        self._cleared = 0
        self._results: deque[Any] = deque()
        self._busy = False
        self._work_due_s = 0.0
        self._work_took_s: deque[float] = deque(maxlen=_WORKS_REMEMBERED)
        self._preparing_took_s = 0.0
        self._stopping = self._ended = False
        self._received = self._dropped = self._processed = self._failed = 0
        # Daemons, because a frame in work can't be interrupted and must not hold up the end of the process.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        steps = (("prepare", prepare, self._run_prepare), ("finish", finish, self._run_finish))
        self._helpers = [
            threading.Thread(target=run, name=f"{name}: {step}", daemon=True) for step, wanted, run in steps if wanted
        ]
        for thread in (self._thread, *self._helpers):
            thread.start()

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
            if self._prepare is None:
                self._set_ready(self._received, item)
            else:
                self._dropped += self._waiting is not None
                self._waiting = self._received, item
            self._condition.notify_all()

    def wake(self) -> None:
        """Says that `next_job` may have something now."""
        with self._condition:
            self._condition.notify_all()

    def clear(self) -> None:
        """Drops what isn't in work yet, prepared or not."""
        with self._condition:
            self._drop_all()

    def stop(self) -> None:
        """Asks the threads to end after the item in work; returns at once."""
        with self._condition:
            self._stopping = True
            self._drop_all()
            self._condition.notify_all()

    def join(self, timeout_s: float | None = None) -> bool:
        """Waits for the threads to end; returns whether they have."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # With the lock held

    def _drop_all(self) -> None:
        self._dropped += (self._waiting is not None) + (self._ready is not None)
        self._waiting = self._ready = None
        # What is being prepared is dropped once it is.
        self._cleared = self._received

    def _set_ready(self, number: int, content: Any) -> None:
        self._dropped += self._ready is not None
        self._ready = number, content

    # The worker's thread

    def _run(self) -> None:
        while (work := self._take()) is not None:
            started = self._clock()
            if isinstance(work, Job):
                self._do(work)
                self._owed_s = self._clock() - started
            else:
                self._process_item(work[0])
                took_s = self._clock() - started
                self._owed_s -= took_s
                self._work_took_s.append(took_s)
            # Messages of 6 MB are not to be kept until the next one comes.
            del work
        with self._condition:
            self._ended = True
            self._condition.notify_all()
        for helper in self._helpers:
            helper.join()
        self._on_exit()

    def _take(self) -> Job | tuple[Any] | None:
        with self._condition:
            self._busy = False
            self._condition.notify_all()
            newest = self._received
            while not self._stopping:
                on_the_way = [self._preparing] if self._preparing else []
                on_the_way += [self._waiting[0]] if self._waiting else []
                owed = bool(self._ready or on_the_way) and self._owed_s > 0
                job = None if owed else self._next_job()
                if job is not None:
                    self._busy, self._work_due_s = True, 0.0
                    return job
                # Later ones don't count: of a camera that is faster than the preparation there is always a newer one.
                if self._ready is not None and not any(number <= newest for number in on_the_way):
                    (_, content), self._ready = self._ready, None
                    self._busy = True
                    self._work_due_s = self._clock() + min(self._work_took_s, default=0.0)
                    return (content,)
                self._condition.wait()
            return None

    def _process_item(self, content: Any) -> None:
        try:
            result = self._process(content)
        except Exception as error:  # noqa: BLE001 - the thread's outermost frame: anything less ends all inference
            self._failed_with(error)
            return
        with self._condition:
            if self._finish is None:
                self._processed += 1
                return
            self._condition.wait_for(lambda: not self._results)
            self._results.append(result)
            self._condition.notify_all()

    def _do(self, job: Job) -> None:
        try:
            job.run()
        except Exception as error:  # noqa: BLE001 - as above
            job.failed(error)

    def _failed_with(self, error: Exception) -> None:
        with self._condition:
            self._failed += 1
        self._on_error(error)

    # The other steps' threads

    def _run_prepare(self) -> None:
        while (taken := self._take_to_prepare()) is not None:
            number, item = taken
            started = self._clock()
            content, error = None, None
            try:
                content = self._prepare(item)
            except Exception as raised:  # noqa: BLE001 - as above
                error = raised
            with self._condition:
                self._preparing = 0
                self._preparing_took_s = self._clock() - started
                wanted = number > self._cleared
                if not wanted:
                    self._dropped += 1
                elif error is None:
                    self._set_ready(number, content)
                self._condition.notify_all()
            if wanted and error is not None:
                self._failed_with(error)
            del taken, item, content, error

    def _take_to_prepare(self) -> tuple[int, Item] | None:
        with self._condition:
            while not self._stopping:
                early_s = 0.0
                if self._busy:
                    lead_s = _LEAD_PREPARATIONS * self._preparing_took_s + _LEAD_S
                    early_s = self._work_due_s - lead_s - self._clock()
                if self._waiting is not None and early_s <= 0:
                    taken, self._waiting = self._waiting, None
                    self._preparing = taken[0]
                    return taken
                self._condition.wait(early_s if self._waiting is not None else None)
            return None

    def _run_finish(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._results or self._ended)
                if not self._results:
                    return
                result = self._results.popleft()
                self._condition.notify_all()
            try:
                self._finish(result)
            except Exception as error:  # noqa: BLE001 - as above
                self._failed_with(error)
            else:
                with self._condition:
                    self._processed += 1
            del result
