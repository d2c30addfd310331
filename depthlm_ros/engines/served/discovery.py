"""Finds out whose server answers at a URL, which model it has and what it can do.

Headers say nothing: all of them are uvicorn's. The list of models, the health page and the version each tell some of
the kinds apart; what a server says of itself is then tried with one short question, the only way to see a guide that is
dropped without a word.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from depthlm_ros.engines.served.client import Broken, Client, Refused, Response, TimedOut
from depthlm_ros.engines.served.dialects import (
    DIALECTS,
    GUIDES,
    Dialect,
    NoAnswer,
    WrongModel,
    read_answer,
    read_error,
)
from depthlm_ros.engines.served.images import Picture
from depthlm_ros.engines.worded import Reply

PAGE_S = 2.0
# At the start, where no server may be up that could be asked instead, and a machine has much to do.
FIRST_PAGE_S = 10.0
# The first question of a server may have it compile, or load the model.
FIRST_S = 30.0
LOADING_S = 300.0
# Nobody says this unless a guide makes them.
SHOT_TEXT = "How many?"
SHOT_GUIDE = "7391"
SHOT_TOKENS = 8
# Guides in the order in which they are tried: of an unknown kind all, of vLLM those of its younger and older versions.
_TRIED = {"generic": tuple(GUIDES), "vllm": ("structured_outputs", "guided_regex")}
_OWNERS = {"tensorrt_llm": "trtllm-serve", "vllm": "vllm", "tensorrt-edgellm": "edge-llm"}


class Unusable(Exception):
    """Somebody answers, and can't be asked as things are; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A server that answers.

    Attributes:
        dialect: how it is asked.
        model: the name that it knows the model by.
        names: those that its answers may bear.
        version: of the program; empty where it doesn't tell.
        concurrency: most questions at once; None where it doesn't tell.
        notes: what was found out, a sentence each.
        warnings: what is not as it was asked for, a sentence each, and stays so.
    """

    dialect: Dialect
    model: str
    names: frozenset[str]
    version: str = ""
    concurrency: int | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wish:
    """What is looked for.

    Attributes:
        dialect: "auto" or a name in `DIALECTS`.
        model: empty: the only one that is listed.
        guided: whether a guide is wanted.
        system: text of the system message.
        picture: a small image to ask about.
        extras: fields that are sent to the servers that know them.
    """

    dialect: str
    model: str
    guided: bool
    system: str | None
    picture: Picture
    extras: tuple[tuple[str, Any], ...] = ()


def discover(client: Client, wish: Wish, timeout_s: float | None = None) -> Peer:
    """Asks a server who it is, and one question.

    Args:
        client: of the server.
        wish: what is looked for.
        timeout_s: longest wait for the answer to the question; None waits as a server needs at its start, and for each
            of its pages `FIRST_PAGE_S` instead of `PAGE_S`.

    Raises:
        Refused, TimedOut, Broken: it can't be reached, or doesn't speak HTTP.
        Unusable: it serves another model, wants a key, or doesn't answer questions.
    """
    page_s = FIRST_PAGE_S if timeout_s is None else PAGE_S
    listed = client.get("/v1/models", page_s)
    if listed.status in (401, 403):
        raise Unusable(f"{_told(client, listed)}: it wants a key, or another one")
    if listed.status not in (200, 404, 405):
        # transformers serve lists what lies in the hub's cache, and fails where there is no such folder.
        health = _page(client, "/health", page_s)
        if health is None or health.status != 200:
            raise Unusable(_told(client, listed))
    cards = _cards(listed)
    dialect, health = _identify(client, wish.dialect, cards, page_s)
    version = _version(client, page_s)
    if dialect.name in ("vllm", "trtllm-serve"):
        dialect = replace(dialect, extras={**dialect.extras, **dict(wish.extras)})
    if not wish.guided:
        dialect = replace(dialect, guide="")
    model, names = _choose(client, wish.model, cards, dialect)
    peer = Peer(dialect, model, names, version, _concurrency(dialect, health))
    wait = timeout_s if timeout_s is not None else LOADING_S if dialect.loads else FIRST_S
    return _try_out(client, peer, wish, wait)


def ask_once(client: Client, peer: Peer, wish: Wish, guide: str, limit: float) -> tuple[Reply, str | None]:
    """The short question.

    Raises:
        Refused, TimedOut, Broken, NoAnswer, WrongModel: as they say.
        Unusable: the server refuses; the message is what it says.
    """
    body = peer.dialect.body(peer.model, wish.system, [wish.picture], SHOT_TEXT, SHOT_TOKENS, guide)
    response = client.post("/v1/chat/completions", body, limit)
    if response.status != 200:
        raise Unusable(_told(client, response))
    return read_answer(response.json(), peer.names, peer.dialect.lists)


def _try_out(client: Client, peer: Peer, wish: Wish, wait_s: float) -> Peer:
    """Asks the short question, leaves out what is refused, and looks whether the guide was kept to."""
    limit = time.monotonic() + wait_s
    if wish.guided and peer.dialect.name in _TRIED:
        peer = _find_guide(client, peer, wish, limit)
    guide = SHOT_GUIDE if peer.dialect.guide else ""
    while True:
        try:
            reply, _ = ask_once(client, peer, wish, guide, limit)
            break
        except Unusable as error:
            dialect = peer.dialect.without(str(error))
            if dialect is None:
                raise
            peer = _without(peer, dialect, str(error))
        except (NoAnswer, WrongModel) as error:
            raise Unusable(client.hide(str(error))) from error
    dialect = peer.dialect
    if dialect.guide and reply.text.strip() != SHOT_GUIDE:
        remedy = (
            "start it with guided_decoding_backend: xgrammar" if dialect.name == "trtllm-serve" else "look at its log"
        )
        said = client.hide(reply.text)[:40]
        text = f"ignores guides: it was to say {SHOT_GUIDE} and said {said!r}; {remedy}, or set guided to false"
        peer = replace(peer, warnings=(*peer.warnings, text))
    if dialect.logprobs and not reply.logprobs:
        dialect = replace(dialect, logprobs={}, refused=dialect.refused | {"logprobs"})
    if not dialect.logprobs:
        peer = replace(peer, notes=(*peer.notes, "tells no probabilities, so that confidences are unknown"))
    if not dialect.guide and wish.guided and "guide" not in dialect.refused:
        peer = replace(peer, notes=(*peer.notes, "has no guides, answers are read as they come"))
    return replace(peer, dialect=dialect)


def _find_guide(client: Client, peer: Peer, wish: Wish, limit: float) -> Peer:
    """Tries guides one after the other where a server takes what it doesn't know without a word."""
    for name in _TRIED[peer.dialect.name]:
        tried = replace(peer, dialect=replace(peer.dialect, guide=name))
        try:
            reply, _ = ask_once(client, tried, wish, SHOT_GUIDE, limit)
        except (Unusable, NoAnswer):
            continue
        except WrongModel as error:
            raise Unusable(client.hide(str(error))) from error
        if reply.text.strip() == SHOT_GUIDE:
            return tried if name == peer.dialect.guide else replace(tried, notes=(*peer.notes, f"has guides in {name}"))
    return peer


def _without(peer: Peer, dialect: Dialect, said: str) -> Peer:
    gone = ", ".join(sorted(dialect.refused - peer.dialect.refused))
    text = f"refuses {gone} ({said})"
    if gone == "guide":
        return replace(peer, dialect=dialect, warnings=(*peer.warnings, f"{text}; answers are read as they come"))
    return replace(peer, dialect=dialect, notes=(*peer.notes, text))


def _identify(client: Client, wanted: str, cards: Sequence[dict], page_s: float) -> tuple[Dialect, dict]:
    owner = str(cards[0].get("owned_by", "")) if cards else ""
    name = wanted if wanted != "auto" else _OWNERS.get(owner, "")
    health: dict = {}
    if name in ("", "edge-llm"):
        page = _page(client, "/health", page_s)
        body = page.json() if page is not None else None
        health = body if isinstance(body, dict) else {}
        if not name and isinstance(health.get("capabilities"), dict):
            name = "edge-llm"
        elif not name and health.get("status") == "ok" and "x-request-id" in (page.headers if page else {}):
            name = "transformers"
    return DIALECTS[name or _from_schema(client, page_s)], health


def _from_schema(client: Client, page_s: float) -> str:
    """The kind that the schema of its pages speaks for."""
    page = _page(client, "/openapi.json", page_s)
    schema = page.json() if page is not None and page.status == 200 else None
    if not isinstance(schema, dict):
        return "generic"
    paths = schema.get("paths") if isinstance(schema.get("paths"), dict) else {}
    title = str((schema.get("info") or {}).get("title", "")) if isinstance(schema.get("info"), dict) else ""
    if "Edge LLM" in title:
        return "edge-llm"
    if "/v1/systemone" in paths:
        return "transformers"
    if "/health_generate" in paths or "/_internal/tokenize" in paths:
        return "trtllm-serve"
    return "vllm" if "/v1/chat/completions/batch" in paths else "generic"


def _choose(client: Client, wanted: str, cards: Sequence[dict], dialect: Dialect) -> tuple[str, frozenset[str]]:
    """The model's name and the names that stand for the same one.

    Raises:
        Unusable: it isn't there, or there are several and none was named.
    """
    listed = [str(card.get("id", "")) for card in cards if card.get("id")]
    if not wanted:
        if len(listed) != 1 or not dialect.lists:
            seen = ", ".join(listed[:8]) or "none"
            raise Unusable(f"lists {len(listed)} models ({client.hide(seen)}); set server_model to the one to ask")
        wanted = listed[0]
    elif dialect.lists and listed and wanted not in listed:
        raise Unusable(f"doesn't serve {client.hide(wanted)!r}; it lists {client.hide(', '.join(listed[:8]))}")
    roots = {_root(card) for card in cards if card.get("id") == wanted} - {""}
    same = {str(card["id"]) for card in cards if card.get("id") and _root(card) in roots}
    return wanted, frozenset({wanted} | same)


def _root(card: dict) -> str:
    root = card.get("root")
    return root if isinstance(root, str) else ""


def _concurrency(dialect: Dialect, health: dict) -> int | None:
    if not dialect.parallel:
        return 1
    told = health.get("capabilities")
    if not isinstance(told, dict):
        return None
    # One more than it works on waits at its door, so that it is never idle.
    most = told.get("max_batch_size") if told.get("in_flight_batching") else 1
    return most + 1 if isinstance(most, int) and 0 < most < 4096 else None


def _cards(response: Response) -> list[dict]:
    body = response.json() if response.status == 200 else None
    data = body.get("data") if isinstance(body, dict) else None
    return [card for card in data if isinstance(card, dict)] if isinstance(data, list) else []


def _version(client: Client, page_s: float) -> str:
    page = _page(client, "/version", page_s)
    body = page.json() if page is not None and page.status == 200 else None
    version = body.get("version") if isinstance(body, dict) else None
    return client.hide(version)[:40] if isinstance(version, str) else ""


def _page(client: Client, path: str, page_s: float) -> Response | None:
    try:
        return client.get(path, page_s)
    except (Refused, TimedOut, Broken):
        return None


def _told(client: Client, response: Response) -> str:
    text = response.body[:2000].decode("utf-8", "replace")
    return client.hide(read_error(response.status, response.json(), text))
