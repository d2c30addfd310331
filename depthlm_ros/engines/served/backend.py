"""The questions of a frame, put to a server: in which order, how many at once, what is asked again, and until when.

A question that fails for good ends the frame: whatever is under way is broken off, here and in the server, so that
nothing of it is left there when the next frame comes.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Sequence

from depthlm_ros.engines.served.address import Address
from depthlm_ros.engines.served.asking import Over, Question
from depthlm_ros.engines.served.frame import Frame, Limits
from depthlm_ros.engines.served.images import pictures_of
from depthlm_ros.engines.served.servers import Server, Servers
from depthlm_ros.engines.worded import Ask, Reply
from depthlm_ros.errors import EngineError


class ServedBackend:
    """Asks servers; a `worded.Backend`.

    Args:
        servers: the preferred one first; already opened.
        concurrency: most requests under way at once.
        timeout_s: longest wait for an answer.
        image: "png" or "jpeg".
        system: text of the system message; None for none.
        prefix_first: whether the first question about images is put alone, so that the server keeps what they share.

    Attributes:
        deadline: when an answer is of no use any more, in seconds of `time.monotonic`; None for never.
    """

    def __init__(
        self,
        servers: Servers,
        concurrency: int,
        timeout_s: float,
        image: str,
        system: str | None,
        prefix_first: bool = True,
    ) -> None:
        self.deadline: float | None = None
        self._servers = servers
        self._timeout_s = timeout_s
        self._image = image
        self._system = system
        self._prefix_first = prefix_first
        # Each its own: those that wait for a name server, which nothing can break off, are missed by no other.
        self._threads = {
            server: concurrent.futures.ThreadPoolExecutor(concurrency, thread_name_prefix="served")
            for server in servers.all
        }
        self._closed = False

    @property
    def complaints(self) -> tuple[str, ...]:
        """What is wrong now, a sentence each; from any thread."""
        return self._servers.complaints

    @property
    def server(self) -> Server:
        """The one that would be asked now.

        Raises:
            EngineError: there is none.
        """
        return self._servers.choose({})

    def leave_out(self, urls: Sequence[str]) -> None:
        """Never asks these: they couldn't be compared with their reference."""
        names = {Address.parse(url).base for url in urls}
        for server in self._servers.all:
            server.trusted = server.name not in names

    def ask(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answers all of them, in their order, greedily; as `worded.Backend.ask`.

        Raises:
            EngineError: no server could answer in time, or the engine was closed.
            ImageError: an image is too large to be sent.
        """
        try:
            return self._ask(asks)
        except Exception as error:
            if not self._closed:
                raise
            # Whatever became of what was under way.
            raise EngineError("the engine was closed while it was asked") from error

    def close(self) -> None:
        """Gives back connections and threads."""
        self._closed = True
        self._servers.close()
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)

    def _ask(self, asks: Sequence[Ask]) -> list[Reply]:
        replies: list[Reply | None] = [None] * len(asks)
        shown = pictures_of([ask.images for ask in asks], self._image)
        tried: dict[Server, str] = {}
        deadline = self.deadline
        while None in replies:
            if self._closed:
                raise EngineError("the engine is closed")
            if deadline is not None and time.monotonic() >= deadline:
                reasons = [f"{server.name} {reason}" for server, reason in tried.items()]
                raise EngineError(f"the frame became too old: {'; '.join(reasons) or 'it came too late'}")
            server = self._servers.choose(tried)
            tried[server] = ""
            left = [at for at, reply in enumerate(replies) if reply is None]
            first = self._in_order([Question(at, shown[at], asks[at]) for at in left])
            limits = Limits(self._threads[server], self._system, self._timeout_s, deadline)
            try:
                Frame(server, limits, replies, first, self._servers.others(server, tried)).run()
            except Over as error:
                tried[server] = str(error)
                self._servers.fail(server, str(error), error.pause_s)
        return [reply for reply in replies if reply is not None]

    def _in_order(self, questions: Sequence[Question]) -> list[Question]:
        """The questions to begin with; the others follow them."""
        if not self._prefix_first:
            return list(questions)
        groups: list[list[Question]] = []
        for question in questions:
            if groups and groups[-1][0].pictures == question.pictures:
                groups[-1].append(question)
            else:
                groups.append([question])
        for group in groups:
            group[0].follows = tuple(group[1:])
        return [group[0] for group in groups]
