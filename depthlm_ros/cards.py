"""Model cards: what a model was trained to see and to say, one YAML file each.

A card holds what can't be read from the weights: the questions the model knows, the focal length it wants, which kind
of depth it answers, who may use it and how well it did. A folder of weights without a card is recognised by its
config.json, and what had to be assumed then is listed in `ModelCard.assumptions`.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from depthlm_ros.depth import DEPTH_KINDS
from depthlm_ros.errors import ConfigError, DialectError, ModelError, unknown_choice
from depthlm_ros.prompts import COORDINATE_RANGE, DIALECTS, SYSTEM_TEXT
from depthlm_ros.unify import POLICIES
from depthlm_ros.weights import ARCHITECTURES, check_weights, folder_config, has_depth_head, hub_config

CARD_FILE = "depthlm_card.yaml"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What the package has to know about a model besides its weights.

    Attributes:
        name: short name; for a shipped card the name of its file.
        source: weights: a folder relative to the card's own folder, or a hub id `organisation/name`.
        revision: commit of the hub repository, None for its newest or for a folder.
        licence: of the weights.
        commercial_use: whether that licence allows it.
        architecture: `model_type` of config.json, one of `ARCHITECTURES`.
        dialects: the questions it was trained on.
        default_dialect: one of them.
        focal_px: focal length in pixels that images are brought to (f_uni of the papers).
        policy: how they are brought there, "published" or "exact" (see `camera.unify`).
        depth_kind: what its answers measure, "z" or "euclidean".
        coordinate_range: steps along each side in the coordinates dialect.
        system_text: system message, None to send none.
        max_new_tokens: answer budget.
        description: a sentence or two for people.
        scores: measured or published figures; holds a `source` when it holds anything.
        assumptions: what isn't known about the model and was assumed.
    """

    name: str
    source: str
    revision: str | None = None
    licence: str
    commercial_use: bool
    architecture: str
    dialects: tuple[str, ...]
    default_dialect: str
    focal_px: float
    policy: str
    depth_kind: str
    coordinate_range: int = COORDINATE_RANGE
    system_text: str | None = None
    max_new_tokens: int
    description: str
    scores: Mapping[str, Any] = field(default_factory=dict, hash=False)
    assumptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("name", "source", "licence", "architecture", "default_dialect", "policy", "depth_kind"):
            self._check(key, isinstance(getattr(self, key), str) and getattr(self, key) != "", "a text")
        self._check("description", isinstance(self.description, str), "a text")
        for key in ("revision", "system_text"):
            value = getattr(self, key)
            self._check(key, value is None or isinstance(value, str), "a text (in quotes if it looks like a number)")
        self._check("commercial_use", isinstance(self.commercial_use, bool), "true or false")
        focal = self.focal_px
        self._check("focal_px", _is_number(focal) and math.isfinite(focal) and focal > 0, "a positive number of pixels")
        self._check("coordinate_range", _is_whole(self.coordinate_range, 2), "a whole number of at least 2")
        self._check("max_new_tokens", _is_whole(self.max_new_tokens, 1), "a whole number of at least 1")
        self._check("dialects", _is_texts(self.dialects) and len(self.dialects) > 0, "a list of dialects")
        self._check("assumptions", _is_texts(self.assumptions), "a list of texts")
        for dialect in self.dialects:
            self._check_choice("dialect", dialect, DIALECTS)
        self._check("dialects", len(set(self.dialects)) == len(self.dialects), "a list that names each dialect once")
        self._check_choice("default_dialect", self.default_dialect, self.dialects)
        self._check_choice("architecture", self.architecture, ARCHITECTURES)
        self._check_choice("policy", self.policy, POLICIES)
        self._check_choice("depth_kind", self.depth_kind, tuple(DEPTH_KINDS))
        self._check("scores", isinstance(self.scores, Mapping) and all(isinstance(k, str) for k in self.scores),
                    "a mapping of names to figures")  # fmt: skip
        if self.scores and not self.scores.get("source"):
            raise ConfigError(f"card {self.name!r}: scores have no 'source'; say where or how they were measured")
        object.__setattr__(self, "focal_px", float(focal))
        object.__setattr__(self, "dialects", tuple(self.dialects))
        object.__setattr__(self, "assumptions", tuple(self.assumptions))

    @property
    def about(self) -> str:
        """Name and description in one line, for whoever reads figures that the model has made."""
        return f"{self.name}: {' '.join(self.description.split())}"

    def _check(self, key: str, good: bool, wanted: str) -> None:
        if not good:
            raise ConfigError(f"card {self.name!r}: {key} is {getattr(self, key)!r}; it must be {wanted}")

    def _check_choice(self, key: str, seen: str, known: tuple[str, ...]) -> None:
        if seen not in known:
            raise ConfigError(f"card {self.name!r}: {unknown_choice(key, seen, known)}")

    def require_dialect(self, dialect: str | None = None) -> str:
        """The dialect to speak: the asked one, or the default for None.

        Raises:
            DialectError: the model doesn't speak it; the message lists what it does speak.
        """
        dialect = self.default_dialect if dialect is None else dialect
        if dialect not in self.dialects:
            raise DialectError(f"model {self.name!r}: {unknown_choice('dialect', dialect, self.dialects)}")
        return dialect


def read_card(path: str | os.PathLike[str]) -> ModelCard:
    """Reads one card.

    Raises:
        ConfigError: not YAML, an unknown or missing key, a value of the wrong type or out of range.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} isn't valid YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}; a card is a mapping of keys to values")
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(ModelCard)}
    for key in data:
        if key not in known:
            raise ConfigError(f"{path}: {unknown_choice('key', key, known)}")
    missing = [key for key, required in known.items() if required and key not in data]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}; add {'it' if len(missing) == 1 else 'them'}")
    try:
        return ModelCard(**data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


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


def load_card(model: str | os.PathLike[str]) -> tuple[ModelCard, Path | str]:
    """Finds a model by name, folder or hub id, and checks that its weights can be used.

    1. The name of a shipped card ("demo", "vlm3-depth"), or the hub id that one of them names.
    2. A local folder. Its card is `depthlm_card.yaml` inside or `<folder>.yaml` beside it; without one it is
       recognised from config.json.
    3. Any other hub id: config.json is fetched and recognised the same way.

    Returns:
        The card, and where the weights are: a folder that holds config.json and safetensors, or a hub id.

    Raises:
        ModelError: no such model, no usable weights, an unknown architecture.
        ConfigError: a faulty card.
    """
    model = os.fspath(model)
    cards = shipped_cards()
    if model in cards:
        return _load_named(cards[model])
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _load_folder(folder)
    if _HUB_ID.fullmatch(model) and not folder.parent.is_dir():
        for path in cards.values():
            if read_card(path).source == model:
                return _load_named(path)
        return _recognise(hub_config(model), name=model.partition("/")[2], source=model), model
    if os.sep in model or model.startswith((".", "~")):
        raise ModelError(f"model folder {model} doesn't exist; check the path, or name one of {', '.join(cards)}")
    raise ModelError(f"{unknown_choice('model', model, cards)}; a folder or a hub id organisation/name will do too")


def _load_named(path: Path) -> tuple[ModelCard, Path | str]:
    card = read_card(path)
    folder = path.parent / card.source
    if folder.is_dir():
        return _checked(card, folder), folder
    if _HUB_ID.fullmatch(card.source):
        return card, card.source
    raise ModelError(f"{folder} doesn't exist, though card {path} names it; fetch or train the model first")


def _load_folder(folder: Path) -> tuple[ModelCard, Path]:
    for path in (folder / CARD_FILE, folder.resolve().parent / f"{folder.resolve().name}.yaml"):
        if path.is_file():
            return _checked(read_card(path), folder), folder
    config = folder_config(folder)
    check_weights(folder)
    dense = "depth_head_type" in config or has_depth_head(folder)
    return _recognise(config, name=folder.resolve().name, source=str(folder), dense=dense), folder


def _checked(card: ModelCard, folder: Path) -> ModelCard:
    """The card, once its folder is known to hold what the card says."""
    seen = folder_config(folder).get("model_type")
    if seen != card.architecture:
        raise ModelError(
            f"{folder}/config.json has model_type {seen!r} but its card says {card.architecture!r}; correct one of them"
        )
    check_weights(folder)
    return card


def _recognise(config: dict[str, Any], *, name: str, source: str, dense: bool | None = None) -> ModelCard:
    """A card for weights without one, from `model_type` and whether there is a depth head."""
    architecture = config.get("model_type")
    dense = "depth_head_type" in config if dense is None else dense
    vision = (config.get("vision_config") or {}).get("model_type")
    if architecture == "qwen3_vl" and dense:
        like, system_text = "DepthVLM (a depth head is present)", SYSTEM_TEXT
        dialect, focal_px, policy, depth_kind = "dense", 1000.0, "exact", "z"
    elif architecture == "qwen3_vl":
        like, system_text = "VLM3", None
        dialect, focal_px, policy, depth_kind = "coordinates", 1000.0, "published", "euclidean"
    elif architecture == "qwen2_5_vl":
        like, system_text = "DepthLM 3B/7B", SYSTEM_TEXT
        dialect, focal_px, policy, depth_kind = "marker", 1000.0, "published", "euclidean"
    elif architecture == "llava" and vision == "pixtral":
        like, system_text = "DepthLM 12B", None
        dialect, focal_px, policy, depth_kind = "marker", 750.0, "published", "euclidean"
    else:
        seen = f"{architecture!r}" + (f" with vision {vision!r}" if architecture == "llava" else "")
        raise ModelError(
            f"{source}: model_type {seen} isn't known; known: {', '.join(ARCHITECTURES)} (llava with pixtral vision)"
        )
    return ModelCard(
        name=name,
        source=source,
        licence="unknown",
        commercial_use=False,
        architecture=architecture,
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
            "the licence isn't known, so commercial use is taken as forbidden",
        ),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
