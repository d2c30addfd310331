"""The questions of a frame that one server is asked: how many at once, what is asked again, and until when."""

from __future__ import annotations

import concurrent.futures
import queue
import random
import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from depthlm_ros.engines.served.asking import Again, Late, Over, Question, Refusal, put
from depthlm_ros.engines.served.discovery import Peer
from depthlm_ros.engines.served.servers import Server
from depthlm_ros.engines.worded import Reply
from depthlm_ros.errors import EngineError

# Waits before a question is put again: the first, and the longest without a word of the server about it.
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
_TICK_S = 0.1
# A thread notices a limit of its own by then; what it doesn't, such as headers that come byte by byte, is cut off.
_GRACE_S = 0.1
# What was broken off ends at once, but for a connection that is being made.
_PATIENCE_S = 1.0
# A server that was too busy gets one more at once after this many answers.
_CALM_ANSWERS = 32


@dataclass(frozen=True)
class Limits:
    """What holds for every question of a frame.

    Attributes:
        threads: that requests run in.
        system: text of the system message; None for none.
        timeout_s: longest wait for an answer.
        deadline: when an answer is of no use any more, in seconds of `time.monotonic`; None for never.
    """

    threads: concurrent.futures.Executor
    system: str | None
    timeout_s: float
    deadline: float | None

    def of(self, question: Question) -> float:
        """When a question that was put has to be answered."""
        limit = question.began + self.timeout_s
        return limit if self.deadline is None else min(limit, self.deadline)


class Frame:
    """Puts questions to one server until all are answered.

    Args:
        server: asked.
        limits: what holds for every question.
        replies: filled in.
        first: questions to begin with.
        more: whether another server could be asked.
    """

    def __init__(
        self,
        server: Server,
        limits: Limits,
        replies: list[Reply | None],
        first: Sequence[Question],
        more: bool,
    ) -> None:
        self._server = server
        # One and the same for the frame: the watching of a server may find another one behind its URL.
        self._peer = server.require_peer()
        self._limits = limits
        self._replies = replies
        self._ready = deque(first)
        self._more = more
        # Question, the server as it was then, when it was put, when it has to be answered.
        self._under_way: dict[concurrent.futures.Future, tuple[Question, Peer, float, float]] = {}
        self._done: queue.SimpleQueue[concurrent.futures.Future] = queue.SimpleQueue()
        self._answered = 0
        self._began = self._checked = time.monotonic()

    def run(self) -> None:
        """Asks until there is nothing left.

        Raises:
            Over: the server failed; what it has answered is in `replies`.
            EngineError: the deadline has passed, or the server refuses the question.
            ImageError: an image is too large.
        """
        try:
            while self._ready or self._under_way:
                self._put_ready()
                try:
                    self._take(self._done.get(timeout=self._until_next()))
                except queue.Empty:
                    pass
                self._check_time()
        except Over:
            raise
        except BaseException:
            self._server.quiet()
            raise
        finally:
            self._break_off()
        self._server.quiet()

    def _put_ready(self) -> None:
        now = time.monotonic()
        for _ in range(len(self._ready)):
            if len(self._under_way) >= self._server.busy:
                return
            question = self._ready.popleft()
            if question.not_before > now:
                self._ready.append(question)
                continue
            question.began = question.began or now
            question.tries += 1
            limit = self._limits.of(question)
            self._server.sent()
            client = self._server.client
            # A thread that gets to it after the frame was broken off doesn't send it.
            future = self._limits.threads.submit(
                put, client, self._peer, self._limits.system, question, limit, client.cuts
            )
            self._under_way[future] = question, self._peer, now, limit
            future.add_done_callback(self._done.put)

    def _until_next(self) -> float:
        """Seconds until something is to be looked at again."""
        now, wait_s = time.monotonic(), _TICK_S
        if len(self._under_way) < self._server.busy:
            wait_s = min([wait_s, *(max(0.0, question.not_before - now) for question in self._ready)])
        return max(wait_s, 0.001)

    def _take(self, future: concurrent.futures.Future) -> None:
        question, peer, put_at, _ = self._under_way.pop(future)
        try:
            reply, ended = future.result()
        except Again as error:
            self._later(question, error)
            return
        except Refusal as error:
            self._refused(question, peer, str(error))
            return
        except Late as error:
            self._judge_late(time.monotonic(), str(error))
        self._replies[question.at] = reply
        self._answered += 1
        self._server.answered(time.monotonic() - put_at, bool(self._under_way))
        self._check_guide(question.ask.guide, reply, ended)
        if self._answered % _CALM_ANSWERS == 0 and self._server.busy < self._server.most:
            self._server.busy += 1
        self._ready.extend(question.follows)
        for picture in question.pictures:
            picture.release()

    def _later(self, question: Question, error: Again) -> None:
        """Puts a question back, or gives the server up."""
        if self._more and error.elsewhere:
            raise Over(str(error), error.after_s or 0.0)
        if error.tries and question.tries >= error.tries:
            raise Over(str(error))
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (question.tries - 1)) * random.uniform(0.5, 1.0)
        if error.after_s is not None:
            # All that were sent away come back; not all at once.
            pause_s = error.after_s + random.uniform(0.0, 0.2) * max(error.after_s, FIRST_PAUSE_S)
        question.not_before = time.monotonic() + pause_s
        self._server.struggles(str(error))
        if error.overloaded:
            self._server.busy = max(1, min(self._server.busy, (len(self._under_way) + 1) // 2))
        deadline = self._limits.deadline
        if deadline is not None and question.not_before >= deadline:
            raise EngineError(f"{self._server.name} {error}, and the frame would become too old")
        if question.not_before >= self._limits.of(question):
            raise Over(str(error), error.after_s or 0.0)
        self._ready.append(question)

    def _refused(self, question: Question, peer: Peer, said: str) -> None:
        """Leaves out an optional field that is refused, or gives the question up."""
        if peer is not self._peer:
            # Put before another one's refusal was heard.
            question.tries -= 1
            self._ready.append(question)
            return
        dialect = self._peer.dialect.without(said)
        if dialect is not None:
            self._peer = replace(self._peer, dialect=dialect)
            if "guide" in dialect.refused:
                self._server.ignores(f"refuses guides ({said}); answers are read as they come")
            self._server.relearn(self._peer)
            question.tries -= 1
            self._ready.append(question)
            return
        if self._server.has_answered:
            # trtllm-serve says 400 to whatever goes wrong while it generates, and when its engine is dead.
            if question.tries == 1:
                self._ready.append(question)
                return
            if self._more:
                raise Over(said)
        self._server.struggles(said)
        raise EngineError(f"{self._server.name} {said}")

    def _check_guide(self, guide: str, reply: Reply, ended: str | None) -> None:
        if not guide or not self._peer.dialect.guide or ended == "length":
            return
        if re.fullmatch(guide, reply.text.strip()) is None:
            said = self._server.client.hide(reply.text)[:60]
            self._server.ignores(f"doesn't keep to the guide: it said {said!r}; answers are read as they come")

    def _check_time(self) -> None:
        now = time.monotonic()
        if now - self._checked < _TICK_S / 2:
            return
        self._checked = now
        deadline = self._limits.deadline
        if (deadline is not None and now > deadline) or any(
            now > limit + _GRACE_S for *_, limit in self._under_way.values()
        ):
            put_at = min((when for _, _, when, _ in self._under_way.values()), default=self._began)
            self._judge_late(now, f"did not answer within {now - put_at:.1f} s")

    def _judge_late(self, now: float, how: str) -> NoReturn:
        """Gives the frame up; and the server, unless it only was asked for too much, or too late."""
        deadline = self._limits.deadline
        if deadline is not None and now >= deadline - _GRACE_S and (
            self._answered or not self._server.is_silent(now - self._began)
        ):
            done = sum(reply is not None for reply in self._replies)
            raise EngineError(
                f"{self._server.name} had answered {done} of {len(self._replies)} questions when the frame became too "
                "old; ask fewer points, or raise max_age_s"
            )
        raise Over(how)

    def _break_off(self) -> None:
        """Ends what is under way; nothing of a frame outlives it."""
        if not self._under_way:
            return
        for future in self._under_way:
            future.cancel()
        self._server.client.cut()
        concurrent.futures.wait(self._under_way, _PATIENCE_S)
        self._under_way.clear()
