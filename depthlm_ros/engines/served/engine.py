"""`load_served`: an engine that asks a server."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from depthlm_ros.engines.base import EngineInfo
from depthlm_ros.engines.checkpoint import Checkpoint, open_processor
from depthlm_ros.engines.image_sizes import ImageSizes
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.engines.served.address import Address, Key
from depthlm_ros.engines.served.backend import ServedBackend
from depthlm_ros.engines.served.client import Client
from depthlm_ros.engines.served.discovery import Peer, Wish, discover
from depthlm_ros.engines.served.images import Picture
from depthlm_ros.engines.served.servers import Server, Servers
from depthlm_ros.engines.worded import WordedEngine
from depthlm_ros.errors import ConfigError

if TYPE_CHECKING:
    from depthlm_ros.cards import ModelCard

# A question about nothing is asked about this; small, and large enough for every vision tower.
_SHOT_PX = 64
# For the watching of a server, beside the questions.
_SPARE_CONNECTIONS = 2


@dataclass(frozen=True)
class Served:
    """What an engine is made of.

    Attributes:
        backend: asks the servers.
        sizes: of images, as the model's processor has them.
        info: what was found.
    """

    backend: ServedBackend
    sizes: ImageSizes
    info: EngineInfo


def load_served(source: str | Path, card: ModelCard, options: EngineOptions) -> WordedEngine:
    """Asks the servers who they are and makes an engine of them; arguments and errors as `open_served`."""
    served = open_served(source, card, options)
    return WordedEngine(served.backend, served.info, served.sizes, options.guided)


def open_served(source: str | Path, card: ModelCard, options: EngineOptions) -> Served:
    """Asks the servers who they are.

    Args:
        source: folder or hub id of the model that the servers serve; its image processor's settings are read, no
            weights and no tokenizer: whether the chat template fits the prompts is for the parity check to find out.
        card: the model's; its system text is sent with every question.
        options: URLs, key and limits.

    Raises:
        ConfigError: no URL, a URL that is none, a key that would go out unencrypted, a proxy that is none.
        MissingDependencyError: httpx isn't installed.
        ModelError: the processor's files can't be read.
        EngineError: no server can be asked.
    """
    if not options.server_urls:
        raise ConfigError("server_urls is empty; engine openai wants at least one, such as http://localhost:8000")
    addresses = [Address.parse(url) for url in options.server_urls]
    twice = next((address.base for at, address in enumerate(addresses) if address in addresses[:at]), None)
    if twice is not None:
        raise ConfigError(f"server_urls names {twice} twice; name each server once")
    key = Key.read(options.server_key_variable)
    for address in addresses:
        key.check(address)
    checkpoint = open_processor(source, card.revision)
    sizes = ImageSizes(checkpoint)
    wish = _wish(sizes, checkpoint, card, options)
    connections = options.server_concurrency + _SPARE_CONNECTIONS
    with contextlib.ExitStack() as undo:
        clients = []
        for address in addresses:
            clients.append(Client(address, key, connections))
            undo.callback(clients[-1].close)
        servers = Servers(
            [Server(client, options.server_concurrency) for client in clients],
            lambda client, model, timeout_s: discover(client, replace(wish, model=model), timeout_s),
            options.server_model,
            options.server_timeout_s,
        )
        undo.callback(servers.close)
        servers.open()
        backend = ServedBackend(
            servers,
            options.server_concurrency,
            options.server_timeout_s,
            options.server_image,
            card.system_text,
            options.prefix_reuse,
        )
        served = Served(backend, sizes, _describe(servers, checkpoint, options))
        undo.pop_all()
    return served


def _wish(sizes: ImageSizes, checkpoint: Checkpoint, card: ModelCard, options: EngineOptions) -> Wish:
    grey = sizes.shown(np.full((_SHOT_PX, _SHOT_PX, 3), 127, np.uint8))
    extras: tuple[tuple[str, object], ...] = ()
    # Part of the model: generation without it gives other answers.
    penalty = _generation_config(checkpoint.folder).get("repetition_penalty")
    if isinstance(penalty, int | float) and penalty != 1:
        extras = (("repetition_penalty", float(penalty)),)
    return Wish(
        options.server_dialect,
        options.server_model,
        options.guided,
        card.system_text,
        Picture(grey, options.server_image),
        extras,
    )


def _generation_config(folder: Path) -> dict:
    try:
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _describe(servers: Servers, checkpoint: Checkpoint, options: EngineOptions) -> EngineInfo:
    first = next(server for server in servers.all if server.up)
    peer = first.require_peer()
    model = first.client.hide(peer.model)
    reasons = [
        f"{', '.join(server.name for server in servers.all)} serve{'s' if len(servers.all) == 1 else ''} {model}",
        f"up to {min(server.most for server in servers.all if server.up)} questions at once, images as "
        f"{options.server_image}",
        *_sentences(peer),
    ]
    return EngineInfo(
        engine="openai",
        model=model,
        architecture=checkpoint.architecture,
        device=", ".join(server.name for server in servers.all),
        dtype="served",
        reasons=tuple(reasons),
        parameters=0,
        dense=False,
        words=True,
        distributions=False,
        version=f"{peer.dialect.name} {peer.version}".strip(),
    )


def _sentences(peer: Peer) -> list[str]:
    return [f"the server {text}" for text in (*peer.notes, *peer.warnings)]
