"""What the package has to know about a model besides its weights, and the YAML file it is read from."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from depthlm_ros.depth import DEPTH_KINDS
from depthlm_ros.errors import ConfigError, DialectError, unknown_choice
from depthlm_ros.prompts import COMPACT_RANGE, COORDINATE_RANGE, DIALECTS, NUMBER, answer_template
from depthlm_ros.unify import POLICIES
from depthlm_ros.weights import ARCHITECTURES

SYSTEMS = ("depthlm", "vlm3", "depthvlm", "own")

# What a model can be asked. `depth` is the distance of a point, in one of the dialects; `object`, `correspondence` and
# `pose` are VLM3's; `motion` stands for the questions of DepthLM's multi-task model.
TASKS = ("depth", "object", "correspondence", "pose", "motion")

_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a model was trained to see and to say.

    Attributes:
        name: short name; for a shipped card the name of its file.
        source: weights: a folder relative to the card's own folder, or a hub id `organisation/name`.
        revision: commit of the hub repository, None for its newest or for a folder.
        sha256: hex digest of files among the weights, where known; checked when a folder is loaded.
        released: whether weights by this name can be had at all.
        licence: of the weights.
        commercial_use: whether that licence allows it.
        architecture: `model_type` of config.json, one of `ARCHITECTURES`.
        system: whose preprocessing `policy: published` means, one of `SYSTEMS`. A model of one's "own" has no
            published preprocessing of its own and is shown images as DepthLM's are.
        tasks: what it was trained to be asked, of `TASKS`; free questions can be put to any.
        dialects: the depth questions it was trained on; none for a model without the task "depth".
        default_dialect: one of them; None where there are none.
        focal_px: focal length in pixels that images are brought to (f_uni of the papers); None where images aren't.
        policy: how they are brought there, "published" or "exact" (see `camera.unify`).
        depth_kind: what its answers measure, "z" or "euclidean"; None for a model without the task "depth".
        coordinate_range: steps along each side of pixels that are named in the text of the coordinates dialect.
        compact_range: the same of the compact dialect.
        points_per_question: most points that one question of the compact dialect may ask about.
        answer: what it was trained to answer in the coordinates and marker dialects, "{number}" where the number
            stands and "{same}" where it is repeated; None for the published sentence. It saves time where the model
            keeps to it and changes no answer.
        system_text: system message, None to send none.
        chat: how a question is laid out in the published code, by topic; for people.
        processor: settings of the published image processor; where a folder has others, `assumptions` tells.
        max_new_tokens: answer budget.
        description: a sentence or two for people.
        scores: measured or published figures; holds a `source` when it holds anything.
        assumptions: what isn't known about the model and was assumed.
    """

    name: str
    source: str
    revision: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict, hash=False)
    released: bool = True
    licence: str
    commercial_use: bool
    architecture: str
    system: str = "own"
    tasks: tuple[str, ...] = ("depth",)
    dialects: tuple[str, ...]
    default_dialect: str | None = None
    focal_px: float | None
    policy: str
    depth_kind: str | None = None
    coordinate_range: int = COORDINATE_RANGE
    compact_range: int = COMPACT_RANGE
    points_per_question: int = 1
    answer: str | None = None
    system_text: str | None = None
    chat: Mapping[str, str] = field(default_factory=dict, hash=False)
    processor: Mapping[str, Any] = field(default_factory=dict, hash=False)
    max_new_tokens: int
    description: str
    scores: Mapping[str, Any] = field(default_factory=dict, hash=False)
    assumptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("name", "source", "licence", "architecture", "system", "policy"):
            self._check(key, isinstance(getattr(self, key), str) and getattr(self, key) != "", "a text")
        self._check("description", isinstance(self.description, str), "a text")
        for key in ("revision", "system_text", "default_dialect", "depth_kind"):
            value = getattr(self, key)
            self._check(key, value is None or isinstance(value, str), "a text (in quotes if it looks like a number)")
        for key in ("commercial_use", "released"):
            self._check(key, isinstance(getattr(self, key), bool), "true or false")
        for key, least in (
            ("coordinate_range", 2),
            ("compact_range", 2),
            ("points_per_question", 1),
            ("max_new_tokens", 1),
        ):
            self._check(key, _is_whole(getattr(self, key), least), f"a whole number of at least {least}")
        good = self.answer is None or (isinstance(self.answer, str) and NUMBER in self.answer)
        self._check("answer", good, f"a text with {NUMBER} where the number stands")
        for key in ("tasks", "dialects", "assumptions"):
            self._check(key, _is_texts(getattr(self, key)), f"a list of {key if key != 'assumptions' else 'texts'}")
            object.__setattr__(self, key, tuple(getattr(self, key)))
        for key in ("sha256", "chat", "processor", "scores"):
            value = getattr(self, key)
            self._check(key, isinstance(value, Mapping) and all(isinstance(k, str) for k in value),
                        "a mapping of names to values")  # fmt: skip
        self._check_choice("architecture", self.architecture, ARCHITECTURES)
        self._check_choice("system", self.system, SYSTEMS)
        self._check_choice("policy", self.policy, POLICIES)
        self._check_tasks()
        for file, digest in self.sha256.items():
            if not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
                raise ConfigError(f"card {self.name!r}: sha256 of {file} is {digest!r}; it must be 64 hex digits")
        self._check("chat", all(isinstance(value, str) for value in self.chat.values()), "a mapping of topics to texts")
        if self.scores and not self.scores.get("source"):
            raise ConfigError(f"card {self.name!r}: scores have no 'source'; say where or how they were measured")

    def _check_tasks(self) -> None:
        """Checks tasks, and dialects, depth kind and focal length, which belong to them."""
        self._check("tasks", len(set(self.tasks)) == len(self.tasks) > 0, "a list that names each task once")
        for task in self.tasks:
            self._check_choice("task", task, TASKS)
        focal = self.focal_px
        if focal is not None or self.tasks != ("correspondence",):
            good = _is_number(focal) and math.isfinite(focal) and focal > 0
            self._check("focal_px", good, "a positive number of pixels")
            object.__setattr__(self, "focal_px", float(focal))
        if "depth" not in self.tasks:
            self._check("dialects", not self.dialects, "an empty list, since the tasks don't include depth")
            self._check("default_dialect", self.default_dialect is None, "null, since there is no dialect")
            return
        self._check("dialects", len(self.dialects) > 0, "a list of dialects, since the tasks include depth")
        for dialect in self.dialects:
            self._check_choice("dialect", dialect, DIALECTS)
        self._check("dialects", len(set(self.dialects)) == len(self.dialects), "a list that names each dialect once")
        self._check_choice("default_dialect", self.default_dialect, self.dialects)
        self._check_choice("depth_kind", self.depth_kind, tuple(DEPTH_KINDS))

    @property
    def about(self) -> str:
        """Name and description in one line, for whoever reads figures that the model has made."""
        return f"{self.name}: {' '.join(self.description.split())}"

    def _check(self, key: str, good: bool, wanted: str) -> None:
        if not good:
            raise ConfigError(f"card {self.name!r}: {key} is {getattr(self, key)!r}; it must be {wanted}")

    def _check_choice(self, key: str, seen: object, known: tuple[str, ...]) -> None:
        if seen not in known:
            raise ConfigError(f"card {self.name!r}: {unknown_choice(key, str(seen), known)}")

    def require_dialect(self, dialect: str | None = None) -> str:
        """The dialect to speak: the asked one, or the default for None.

        Raises:
            DialectError: the model doesn't speak it, or answers no depth questions; the message lists what it does.
        """
        self.require_task("depth")
        dialect = self.default_dialect if dialect is None else dialect
        if dialect not in self.dialects:
            raise DialectError(f"model {self.name!r}: {unknown_choice('dialect', str(dialect), self.dialects)}")
        return dialect

    def answer_template(self, dialect: str, points: int = 1) -> str:
        """`prompts.answer_template`, or this model's own sentence.

        Raises:
            DialectError: the dialect has no answer in words about so many points.
            ConfigError: more points a question than the model was trained on.
        """
        template = answer_template(dialect, points)
        if points > self.points_per_question:
            raise ConfigError(
                f"points_per_question is {points}; model {self.name!r} answers at most {self.points_per_question} "
                "(points_per_question of its card)"
            )
        return template if self.answer is None or dialect == "compact" else self.answer

    def require_task(self, task: str) -> str:
        """The task, once the model is known to have been trained for it.

        Raises:
            DialectError: it wasn't; the message lists what it is for.
            ConfigError: there is no such task.
        """
        if task not in TASKS:
            raise ConfigError(unknown_choice("task", task, TASKS))
        if task not in self.tasks:
            raise DialectError(
                f"model {self.name!r} was not trained for {task}, it is for {', '.join(self.tasks)}; load a model that "
                f"is for {task}, or add it to `tasks` in a card of your own"
            )
        return task


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


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
