"""Finds a model and its card by name, folder or hub id.

A card (`modelcard.py`) holds what can't be read from the weights: the questions the model knows, the focal length it
wants, which kind of depth it answers, who may use it and how well it did. A folder of weights without a card is
recognised by its config.json, and what had to be assumed then is listed in `ModelCard.assumptions`.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from depthlm_ros.errors import LicenceError, ModelError, unknown_choice
from depthlm_ros.manifest import ENGINE_FILE
from depthlm_ros.modelcard import ModelCard, read_card
from depthlm_ros.prompts import SYSTEM_TEXT
from depthlm_ros.weights import (
    ARCHITECTURES,
    check_sha256,
    check_weights,
    depth_head,
    folder_config,
    hub_config,
    processor_differences,
)

CARD_FILE = "depthlm_card.yaml"
UNKNOWN_LICENCE = "unknown"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def models_dir() -> Path:
    """The folder of the shipped cards: `models/` of the checkout, else `share/depthlm_ros/models` of the installation.

    The installation is looked for above the package itself first, so that the cards belong to the code that runs,
    then in AMENT_PREFIX_PATH and in `sys.prefix`.

    Raises:
        ModelError: none of these places holds the demo's card.
    """
    package = Path(__file__).resolve().parent
    prefixes = [*package.parents, *filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)), sys.prefix]
    places = [package.parent / "models", *(Path(p) / "share" / "depthlm_ros" / "models" for p in prefixes)]
    for place in places:
        if (place / "demo.yaml").is_file():
            return place
    raise ModelError(
        f"no model cards found (looked in {places[0]} and share/depthlm_ros/models of {len(prefixes)} prefixes); "
        "install the package with its data files, or pass the path of a model folder"
    )


def shipped_cards() -> dict[str, Path]:
    """Names and files of the cards that come with the package."""
    return {path.stem: path for path in sorted(models_dir().glob("*.yaml"))}


def load_card(
    model: str | os.PathLike[str], *, commercial_use: bool = False, weights: bool = True
) -> tuple[ModelCard, Path | str]:
    """Finds a model by name, folder or hub id, and checks that its weights can be used.

    1. The name of a shipped card ("demo", "vlm3-depth"), or the hub id that one of them names.
    2. A local folder. Its card is `depthlm_card.yaml` inside or `<folder>.yaml` beside it; without one it is
       recognised from config.json.
    3. Any other hub id: config.json is fetched and recognised the same way.

    Args:
        model: name, folder or hub id.
        commercial_use: whether the answers serve a commercial purpose.
        weights: whether a folder has to hold them; not where a server has.

    Returns:
        The card, and where the weights are: a folder that holds config.json and safetensors, or a hub id.

    Raises:
        LicenceError: `commercial_use` of a model whose licence forbids it, or isn't known.
        ModelError: no such model, no usable weights, an unknown architecture.
        ConfigError: a faulty card.
    """
    model = os.fspath(model)
    cards = shipped_cards()
    if model in cards:
        return _load_named(cards[model], commercial_use, weights)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _load_folder(folder, commercial_use, weights)
    if _HUB_ID.fullmatch(model) and not folder.parent.is_dir():
        for path in cards.values():
            if read_card(path).source == model:
                return _load_named(path, commercial_use, weights)
        card = _recognise(hub_config(model), name=model.partition("/")[2], source=model)
        _check_licence(card, commercial_use)
        return card, model
    if os.sep in model or model.startswith((".", "~")):
        raise ModelError(f"model folder {model} doesn't exist; check the path, or name one of {', '.join(cards)}")
    raise ModelError(f"{unknown_choice('model', model, cards)}; a folder or a hub id organisation/name will do too")


def _load_named(path: Path, commercial_use: bool, weights: bool) -> tuple[ModelCard, Path | str]:
    card = read_card(path)
    _check_licence(card, commercial_use)
    folder = path.parent / card.source
    if folder.is_dir():
        return _checked(card, folder, weights), folder
    if not card.released:
        raise ModelError(
            f"the weights of {card.name!r} have not been released; to use weights of your own with this card, put them "
            f"into {folder}, or pass their folder as the model"
        )
    if _HUB_ID.fullmatch(card.source):
        return card, card.source
    raise ModelError(f"{folder} doesn't exist, though card {path} names it; fetch or train the model first")


def _load_folder(folder: Path, commercial_use: bool, weights: bool) -> tuple[ModelCard, Path]:
    for path in (folder / CARD_FILE, folder.resolve().parent / f"{folder.resolve().name}.yaml"):
        if path.is_file():
            card = read_card(path)
            _check_licence(card, commercial_use)
            return _checked(card, folder, weights), folder
    config = folder_config(folder)
    if weights:
        check_weights(folder)
    head = depth_head(folder) or config.get("depth_head_type")
    card = _recognise(config, name=folder.resolve().name, source=str(folder), head=head)
    _check_licence(card, commercial_use)
    return card, folder


def _check_licence(card: ModelCard, commercial_use: bool) -> None:
    if not commercial_use or card.commercial_use:
        return
    if card.licence == UNKNOWN_LICENCE:
        raise LicenceError(
            f"model {card.name!r} comes without a card, so nothing says that its licence allows commercial use; where "
            f"you know that it does, write licence and commercial_use into a {CARD_FILE} in its folder"
        )
    free = [name for name, path in shipped_cards().items() if read_card(path).commercial_use]
    raise LicenceError(
        f"model {card.name!r} may not be used commercially: its licence is {card.licence}. Ask its owners, take a "
        f"model that may be ({', '.join(free)}), or leave commercial_use off where the use isn't commercial"
    )


def _checked(card: ModelCard, folder: Path, weights: bool) -> ModelCard:
    """The card, once its folder is known to hold what the card says."""
    seen = folder_config(folder).get("model_type")
    if seen != card.architecture:
        raise ModelError(
            f"{folder}/config.json has model_type {seen!r} but its card says {card.architecture!r}; correct one of them"
        )
    if weights and not (folder / ENGINE_FILE).is_file():
        # An export has none, or others; its manifest names the sha256 of what it has.
        check_weights(folder)
        check_sha256(folder, card.sha256)
    if others := processor_differences(folder, card.processor):
        told = f"the folder's image processor is meant to differ from the published one: {'; '.join(others)}"
        return replace(card, assumptions=(*card.assumptions, told))
    return card


def _recognise(config: dict[str, Any], *, name: str, source: str, head: str | None = None) -> ModelCard:
    """A card for weights without one, from `model_type` and whether there is a depth head."""
    architecture = config.get("model_type")
    head = head or config.get("depth_head_type")
    vision = (config.get("vision_config") or {}).get("model_type")
    tasks, system_text, policy = ("depth",), None, "published"
    if architecture == "qwen3_vl" and head:
        like, system, system_text = f"DepthVLM (a depth head is present: {head})", "depthvlm", SYSTEM_TEXT
        dialect, focal_px, depth_kind = "dense", 1000.0, "z"
    elif architecture == "qwen3_vl":
        like, system, tasks = "VLM3", "vlm3", ("depth", "object", "correspondence", "pose")
        dialect, focal_px, depth_kind = "coordinates", 1000.0, "euclidean"
    elif architecture == "qwen2_5_vl":
        like, system, tasks, system_text = "DepthLM 3B/7B", "depthlm", ("depth", "motion"), SYSTEM_TEXT
        dialect, focal_px, depth_kind = "marker", 1000.0, "euclidean"
    elif architecture == "llava" and vision == "pixtral":
        like, system, tasks = "DepthLM 12B", "depthlm", ("depth", "motion")
        dialect, focal_px, depth_kind = "marker", 750.0, "euclidean"
    else:
        seen = f"{architecture!r}" + (f" with vision {vision!r}" if architecture == "llava" else "")
        raise ModelError(
            f"{source}: model_type {seen} isn't known; known: {', '.join(ARCHITECTURES)} (llava with pixtral vision)"
        )
    return ModelCard(
        name=name,
        source=source,
        licence=UNKNOWN_LICENCE,
        commercial_use=False,
        architecture=architecture,
        system=system,
        tasks=tasks,
        dialects=(dialect,),
        default_dialect=dialect,
        focal_px=focal_px,
        policy=policy,
        depth_kind=depth_kind,
        system_text=system_text,
        max_new_tokens=128,
        description=f"Weights without a card, taken for a model like {like}.",
        assumptions=(
            f"no {CARD_FILE}: model_type {architecture!r} is taken for a model trained like {like}",
            f"dialect {dialect!r}, " + ("no system message" if system_text is None else f"system {system_text!r}"),
            f"focal length {focal_px:g} px with the {policy!r} policy",
            f"answers are {'z-depth' if depth_kind == 'z' else 'Euclidean distance'}",
            *([f"may be asked about {', '.join(tasks)}: which of them it learnt can't be seen"] * (len(tasks) > 1)),
            "the licence isn't known, so commercial use is taken as forbidden",
        ),
    )
