"""One request: what is sent, and what becomes of the answer."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from depthlm_ros.engines.served.client import Broken, Client, Refused, Response, TimedOut
from depthlm_ros.engines.served.dialects import NoAnswer, WrongModel, read_answer, read_error
from depthlm_ros.engines.served.discovery import Peer
from depthlm_ros.engines.served.images import Picture
from depthlm_ros.engines.worded import Ask, Reply

_AGAIN = (408, 429, 502, 503, 504)
# A server that isn't reached so often within a moment isn't there.
_CONNECTIONS = 3


class Over(Exception):
    """The server can't be asked any more: another one may be."""

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


class Late(Over):
    """The answer didn't come in time."""


class Again(Exception):
    """The question may be put again after a while.

    Args:
        reason: what the server said.
        after_s: how long it wants to be left alone; None where it doesn't tell.
        overloaded: whether it has too much to do.
        elsewhere: whether another server is to be asked at once, if there is one.
        tries: after how many the server is given up; 0: after none, only time counts.
    """

    def __init__(
        self,
        reason: str,
        after_s: float | None = None,
        overloaded: bool = False,
        elsewhere: bool = True,
        tries: int = 0,
    ) -> None:
        super().__init__(reason)
        self.after_s = after_s
        self.overloaded = overloaded
        self.elsewhere = elsewhere
        self.tries = tries


class Refusal(Exception):
    """The server refuses what was asked: 4xx."""


@dataclass
class Question:
    """A question under way.

    Attributes:
        at: its place in the frame.
        pictures: its images.
        ask: the rest of it.
        began: when it was first put to this server, in seconds of `time.monotonic`; 0 before.
        not_before: when it may be put.
        tries: how often it was put to this server.
        follows: questions about the same images that wait for its answer.
    """

    at: int
    pictures: tuple[Picture, ...]
    ask: Ask
    began: float = 0.0
    not_before: float = 0.0
    tries: int = 0
    follows: tuple[Question, ...] = ()


def put(
    client: Client, peer: Peer, system: str | None, question: Question, limit: float, cuts: int
) -> tuple[Reply, str | None]:
    """Sends a question and waits for its answer.

    Args:
        client: of the server.
        peer: who it is.
        system: text of the system message; None for none.
        question: what is asked.
        limit: latest end, in seconds of `time.monotonic`.
        cuts: the client's, from when the frame put the question.

    Returns:
        The answer and why it ended.

    Raises:
        Over, Again, Refusal: as they say.
        ImageError: an image is too large.
    """
    ask = question.ask
    body = peer.dialect.body(peer.model, system, question.pictures, ask.question, ask.max_new_tokens, ask.guide)
    try:
        response = client.post("/v1/chat/completions", body, limit, cuts)
    except Refused as error:
        raise Again(f"can't be reached: {error}", tries=_CONNECTIONS) from error
    except TimedOut as error:
        # It may be at it still; the same question once more would only make it later.
        raise Late(str(error)) from error
    except Broken as error:
        raise Over(f"sent {error}") from error
    if response.status != 200:
        raise _judge(client, response)
    try:
        return read_answer(response.json(), peer.names, peer.dialect.lists)
    except NoAnswer as error:
        raise Over(client.hide(f"sent {error}")) from error
    except WrongModel as error:
        raise Over(client.hide(str(error))) from error


def _judge(client: Client, response: Response) -> Exception:
    """What an answer other than 200 means."""
    text = response.body[:2000].decode("utf-8", "replace")
    said = client.hide(read_error(response.status, response.json(), text))
    status = response.status
    if status in _AGAIN:
        # One that has too much to do gets less; one that starts or ends is left.
        return Again(said, retry_after(response), status in (429, 503), elsewhere=status != 429)
    if status in (401, 403):
        return Over(f"{said}: it wants a key, or another one")
    if status == 404:
        return Over(said)
    if 400 <= status < 500:
        return Refusal(said)
    # What failed while it was computed may succeed the next time.
    return Again(said, tries=2)


def retry_after(response: Response) -> float | None:
    """Seconds of the header, which gives them or a date; None where it says nothing of use."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        until = _date(value)
        # By the server's own clock, which may be another than ours.
        now = _date(response.headers.get("date", "")) or datetime.now(timezone.utc)
        seconds = (until - now).total_seconds() if until is not None else 0.0
        # A date that has passed says nothing about now.
        if seconds <= 0:
            return None
    return max(0.0, seconds) if seconds < 3600 else None


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=timezone.utc)
