"""Which server is asked: the first healthy one. One that failed is watched in the background until it answers again."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from depthlm_ros.engines.served.client import Broken, Client, Refused, TimedOut
from depthlm_ros.engines.served.discovery import Peer, Unusable
from depthlm_ros.errors import EngineError

PROBE_S = 0.5
# Nothing heard for this long is worth a warning, unless the server usually takes longer.
SILENCE_S = 2.0
# A frame may have so little time left that no server could answer.
SHORT_S = 1.0
# A server that failed is asked a short question with this much patience at first, and twice as much each time after.
TRIAL_S = 3.0
LONGEST_REST_S = 5.0
# What a server said a while ago, and nobody has asked since, is no news.
_NEWS_S = 10.0
# How many answers the usual time of an answer is taken from.
_REMEMBERED = 32

Discover = Callable[[Client, str, "float | None"], Peer]
"""Asks a client's server who it is: the client, the model's name ("" for any), the longest wait for an answer."""


class Server:
    """One server and how it has been doing. May be asked from any thread.

    Attributes:
        name: its URL.
        client: talks to it.
        peer: who it is; None until it has answered once.
        busy: most requests under way at once as things are; fewer than it may have when it says that it is busy.
        trusted: whether it may be asked at all.
    """

    def __init__(self, client: Client, concurrency: int) -> None:
        self.name = client.address.base
        self.client = client
        self.peer: Peer | None = None
        self.busy = concurrency
        self.trusted = True
        self._most = concurrency
        self._lock = threading.Lock()
        self._down: tuple[str, float] | None = ("has not been asked yet", time.monotonic())
        # What it said, since when, and when last.
        self._trouble: tuple[str, float, float] | None = None
        self._waiting_since: float | None = None
        self._took_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._ignored = ""
        self._answers = 0
        # Frames in a row that became too old without an answer.
        self._unheard = 0

    @property
    def up(self) -> bool:
        """Whether it is worth asking."""
        return self._down is None and self.trusted

    def require_peer(self) -> Peer:
        """Who it is.

        Raises:
            EngineError: it has never answered.
        """
        if self.peer is None:
            raise EngineError(self.reason())
        return self.peer

    @property
    def most(self) -> int:
        """Most requests under way at once when it isn't overloaded."""
        told = self.peer.concurrency if self.peer is not None else None
        return self._most if told is None else min(self._most, told)

    @property
    def patience_s(self) -> float:
        """How long nothing may be heard of it without a word about it."""
        took = list(self._took_s)
        return max(SILENCE_S, 2 * statistics.median(took)) if took else SILENCE_S

    @property
    def has_answered(self) -> bool:
        """Whether it has answered a question since it was last found healthy."""
        return self._answers > 0

    @property
    def longest_trial_s(self) -> float:
        """More patience than this isn't worth it with a server whose usual time is known."""
        took = list(self._took_s)
        return max(TRIAL_S, 4 * statistics.median(took)) if took else float("inf")

    def reason(self) -> str:
        """Why it is down; empty while it is up."""
        down = self._down
        if not self.trusted:
            return f"{self.name} was not compared with its reference"
        return "" if down is None else f"{self.name} {down[0]}"

    def complaints(self) -> list[str]:
        """What is wrong now, a sentence each."""
        now = time.monotonic()
        down, trouble, waiting = self._down, self._trouble, self._waiting_since
        said = []
        if down is not None:
            said.append(f"{self.name} has been out of use for {now - down[1]:.0f} s: {down[0]}")
        elif waiting is not None and now - waiting >= self.patience_s:
            said.append(f"{self.name} has not answered for {now - waiting:.0f} s")
        elif trouble is not None and now - trouble[2] < _NEWS_S:
            said.append(f"{self.name} {trouble[0]}, for {now - trouble[1]:.0f} s")
        said += [f"{self.name} {text}" for text in (*(self.peer.warnings if self.peer else ()), self._ignored) if text]
        return said

    def admit(self, peer: Peer) -> None:
        """It answers, again."""
        with self._lock:
            self.peer = peer
            self.busy = self.most
            self._down = self._trouble = self._waiting_since = None
            self._ignored = ""
            self._answers = self._unheard = 0

    def relearn(self, peer: Peer) -> None:
        """It refuses something that it seemed to know."""
        self.peer = peer

    def drop(self, reason: str) -> bool:
        """It failed; returns whether it had been up."""
        with self._lock:
            was_up = self._down is None
            since = time.monotonic() if was_up or self._down is None else self._down[1]
            # What it is silent since is what a person wants to know.
            since = min(since, self._waiting_since or since)
            self._down = reason, since
            self._trouble = self._waiting_since = None
            return was_up

    def sent(self) -> None:
        """A question was sent."""
        with self._lock:
            if self._waiting_since is None:
                self._waiting_since = time.monotonic()

    def answered(self, took_s: float, waits: bool) -> None:
        """An answer came.

        Args:
            took_s: seconds that it took.
            waits: whether other questions are under way.
        """
        with self._lock:
            self._took_s.append(took_s)
            self._answers += 1
            self._unheard = 0
            self._waiting_since = time.monotonic() if waits else None
            self._trouble = None

    def is_silent(self, waited_s: float) -> bool:
        """Whether a frame that became too old without one answer is the server's fault.

        Args:
            waited_s: how long the frame waited for it; a moment says nothing, the second time in a row does.
        """
        with self._lock:
            self._unheard += 1
            return waited_s >= SHORT_S or self._unheard > 1

    def quiet(self) -> None:
        """Nothing is under way any more."""
        with self._lock:
            self._waiting_since = None

    def struggles(self, what: str) -> None:
        """It said that it can't answer now, and is asked again."""
        with self._lock:
            now = time.monotonic()
            self._trouble = what, self._trouble[1] if self._trouble else now, now
            # It was heard of.
            self._waiting_since = None

    def ignores(self, text: str) -> None:
        """An answer didn't keep to its guide."""
        self._ignored = text


class Servers:
    """The servers, the preferred one first.

    Args:
        servers: all of them.
        discover: asks one who it is.
        model: the name that they know the model by; empty: the first that answers says it, and the others are to have
            the same.
        timeout_s: longest wait for an answer.
    """

    def __init__(self, servers: Sequence[Server], discover: Discover, model: str, timeout_s: float) -> None:
        self.all = tuple(servers)
        self._discover = discover
        self._model = model
        self._timeout_s = timeout_s
        self._closing = threading.Event()

    @property
    def complaints(self) -> tuple[str, ...]:
        """What is wrong now, a sentence each."""
        said = [text for server in self.all for text in server.complaints()]
        first = next((server for server in self.all if server.up), None)
        if first is not None and first is not self.all[0]:
            said.append(f"{first.name} is asked instead")
        return tuple(said)

    def open(self) -> None:
        """Asks all of them who they are; those that don't answer are watched.

        Raises:
            EngineError: none can be used; the message says why of each.
        """
        for server in self.all:
            try:
                self._admit(server, None)
            except Exception as error:
                server.drop(_reason(error))
        if not any(server.up for server in self.all):
            reasons = "; ".join(server.reason() for server in self.all)
            raise EngineError(
                f"no server can be asked: {reasons}. Start the server, or correct server_urls, server_model and "
                "server_dialect"
            )
        for server in self.all:
            if not server.up:
                self._watch(server)

    def choose(self, tried: dict[Server, str]) -> Server:
        """The first that is healthy and hasn't been tried.

        Args:
            tried: servers that failed with these questions, and how.

        Raises:
            EngineError: there is none; the message says why of each.
        """
        for server in self.all:
            if server.up and server not in tried:
                return server
        # The watching may let one in between the loop and here.
        reasons = "; ".join(
            server.reason() or f"{server.name} {tried.get(server) or 'is back just now'}" for server in self.all
        )
        raise EngineError(f"no server answers: {reasons}; each is asked again as soon as it does")

    def others(self, server: Server, tried: dict[Server, str]) -> bool:
        """Whether another one could be asked."""
        return any(other.up and other is not server and other not in tried for other in self.all)

    def fail(self, server: Server, reason: str, pause_s: float = 0.0) -> None:
        """Doesn't ask a server any more until it answers again.

        Args:
            server: that failed.
            reason: why, for a person.
            pause_s: how long it wants to be left alone; some say minutes and are back in seconds.
        """
        server.client.cut()
        if server.drop(reason):
            self._watch(server, min(pause_s, LONGEST_REST_S))

    def close(self) -> None:
        """Ends the watching and gives the connections back."""
        self._closing.set()
        for server in self.all:
            server.client.close()

    def _admit(self, server: Server, timeout_s: float | None) -> None:
        peer = self._discover(server.client, self._model, timeout_s)
        self._model = self._model or peer.model
        server.admit(peer)

    def _watch(self, server: Server, pause_s: float = 0.0) -> None:
        threading.Thread(
            target=self._look_until_up, args=(server, pause_s), name=f"watching {server.name}", daemon=True
        ).start()

    def _look_until_up(self, server: Server, pause_s: float) -> None:
        trial_s = min(TRIAL_S, self._timeout_s)
        self._closing.wait(pause_s)
        while not self._closing.wait(PROBE_S):
            try:
                self._admit(server, trial_s)
                return
            except TimedOut as error:
                # It may only be slow: loading, or computing what it was asked before.
                trial_s = min(2 * trial_s, max(self._timeout_s, TRIAL_S), server.longest_trial_s)
                reason = _reason(error)
            except Exception as error:
                # A thread that ends would leave the server unused for ever.
                reason = _reason(error)
            server.drop(reason)


def _reason(error: Exception) -> str:
    """Why a server couldn't be asked who it is; what nobody thought of is only named, it may hold anything."""
    if isinstance(error, Refused | TimedOut | Broken | Unusable):
        return str(error)
    return f"can't be asked: {type(error).__name__}"
