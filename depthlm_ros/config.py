"""Every setting of the node once: its default, what it means, its range, whether it can change while the node runs.

ROS parameter descriptors, launch arguments, `--help` and the README's table are made from `Parameters`.
Nothing else in the package holds a default of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from depthlm_ros.engines import ENGINES
from depthlm_ros.engines.options import SERVER_DIALECTS, EngineOptions
from depthlm_ros.errors import ConfigError, unknown_choice

NODE_NAME = "depth_node"
# Points a frame when `points` is 0 and the dialect answers in words: each point costs a question.
POINTS_IN_WORDS = 256
# What the commands that load a model take about its engine.
ENGINE_SETTINGS = (
    "engine",
    "server_urls",
    "server_model",
    "server_dialect",
    "server_key_variable",
    "server_concurrency",
    "server_timeout_s",
    "server_image",
    "guided",
    "prefix_reuse",
    "reference",
    "accept_unproven",
)
_WITH_ARTICLE = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Spec:
    """One setting.

    Attributes:
        name: as in `Parameters`, on the command line, in YAML and in ROS.
        type: bool, int, float or str.
        default: its value when nobody says anything.
        description: one or two sentences for a person.
        low: smallest value allowed, None without a limit.
        high: largest value allowed, None without a limit.
        choices: the values allowed; empty when any of the type will do.
        dynamic: whether it can change while frames flow; the others change between cleanup and configure.
    """

    name: str
    type: type
    default: Any
    description: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    dynamic: bool = False

    @property
    def allowed(self) -> str:
        """The values allowed, in words; empty when any value of the type will do."""
        if self.choices:
            return ", ".join(choice or '""' for choice in self.choices)
        if self.low is not None and self.high is not None:
            return f"{_number(self.low)} to {_number(self.high)}"
        return ""

    def check(self, value: Any) -> Any:
        """Returns `value` in this setting's type.

        Raises:
            ConfigError: the value is of another type, out of range or not among the choices.
        """
        if self.type is float and type(value) is int:
            value = float(value)
        if type(value) is not self.type:
            raise ConfigError(
                f"{self.name} is {value!r}, which is of type {type(value).__name__}; give {_WITH_ARTICLE[self.type]}"
            )
        if self.type is float and not math.isfinite(value):
            raise ConfigError(f"{self.name} is {value}; give a finite number")
        if self.choices and value not in self.choices:
            nearest = difflib.get_close_matches(value, self.choices, n=1, cutoff=0.5)
            hint = f" (did you mean {nearest[0]}?)" if nearest else ""
            raise ConfigError(f"{self.name} is {value!r}{hint}; choose one of {self.allowed}")
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise ConfigError(f"{self.name} is {value}; choose a value of {self.allowed}")
        return value

    def parse(self, text: str) -> Any:
        """Reads a value from a command line or a launch argument.

        Raises:
            ConfigError: as `check`.
        """
        if self.type is bool:
            return self.check({"true": True, "false": False}.get(text.lower(), text))
        try:
            return self.check(self.type(text))
        except ValueError as error:
            raise ConfigError(f"{self.name} is {text!r}; give {_WITH_ARTICLE[self.type]}") from error


def _setting(
    default: Any,
    description: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    dynamic: bool = False,
) -> Any:
    metadata = {"description": description, "low": low, "high": high, "choices": choices, "dynamic": dynamic}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Parameters:
    """The settings of `depth_node`, checked.

    Raises:
        ConfigError: a value of the wrong type, out of range or not among the choices.
    """

    model: str = _setting("demo", "Name of a model card, folder with a checkpoint, or hub id.")
    engine: str = _setting(
        "transformers",
        "What runs the model: transformers (a checkpoint, with PyTorch), onnxruntime or tensorrt (dense maps, from an "
        "export or a plan), tensorrt_llm (in this process), openai (a server: trtllm-serve, vLLM, TensorRT Edge-LLM, "
        "transformers serve) or edge_llm (TensorRT Edge-LLM on Jetson).",
        choices=ENGINES,
    )
    accept_unproven: bool = _setting(
        False,
        "Activate an engine although its answers differ from those of the model that it was exported from. The log and "
        "the diagnostics warn for as long as it runs.",
    )
    reference: str = _setting(
        "",
        "Folder of reference answers ('depthlm parity --record') that the engine's are compared with at start. Empty: "
        "the ones in the model's folder, where it has any.",
    )
    server_urls: str = _setting(
        "",
        "For engine openai: URLs of servers of the same model with commas between them, such as "
        "http://localhost:8000; the first is asked while it answers, the others take over.",
    )
    server_model: str = _setting("", "The name that the server knows the model by. Empty: the only one that it lists.")
    server_dialect: str = _setting(
        "auto",
        "Whose server it is, since each wants guides and limits told in its own way. auto: found out at start.",
        choices=SERVER_DIALECTS,
    )
    server_key_variable: str = _setting(
        "DEPTHLM_SERVER_KEY", "Environment variable with the server's key, if it wants one. The key is never logged."
    )
    server_concurrency: int = _setting(16, "Requests under way at once.", low=1, high=512)
    server_timeout_s: float = _setting(
        5.0, "Longest wait for one answer of a server before the frame is given up.", low=0.1, high=600.0
    )
    server_image: str = _setting(
        "png",
        "How images are sent to a server: png changes nothing, jpeg is smaller and changes answers a little.",
        choices=("png", "jpeg"),
    )
    guided: bool = _setting(
        True, "Hold answers of servers and of TensorRT-LLM to the sentence that the model was trained to answer with."
    )
    prefix_reuse: bool = _setting(
        True, "Let TensorRT-LLM and Edge-LLM keep what the questions about an image share; false to compare."
    )
    max_age_s: float = _setting(
        0.0,
        "A frame whose answer comes later than this many seconds after its image came isn't published, and servers "
        "aren't waited for any longer. 0: however old.",
        low=0.0,
        high=3600.0,
        dynamic=True,
    )
    dialect: str = _setting(
        "",
        "How the model is asked: dense (one pass, depth head), coordinates (pixel in the text), marker (arrow in the "
        "image) or compact (pixel in a short text, answered by the bare number). Empty: the model card's default.",
        choices=("", "dense", "coordinates", "marker", "compact"),
        dynamic=True,
    )
    policy: str = _setting(
        "",
        "How images are brought to the model's focal length: published (what released weights saw) or exact "
        "(one resample, distortion removed). Empty: the model card's.",
        choices=("", "published", "exact"),
    )
    device: str = _setting("auto", "auto, cpu, or a CUDA device such as cuda:0.")
    dtype: str = _setting(
        "auto", "Number format of the weights while computing.", choices=("auto", "float32", "bfloat16", "float16")
    )
    commercial_use: bool = _setting(
        False,
        "The answers serve a commercial purpose: a model whose licence forbids that, or isn't known, is refused with "
        "the reason.",
    )
    batch_size: int = _setting(
        0, "Most questions answered together; smaller takes less memory. 0: as many as fit and help.", low=0, high=4096
    )
    points: int = _setting(
        0,
        "Pixels asked in each frame, placed by `sampling`. 0 leaves it to the dialect: dense takes every `stride`-th "
        f"row and column, the dialects that answer in words take {POINTS_IN_WORDS}.",
        low=0,
        high=1_000_000,
        dynamic=True,
    )
    points_per_question: int = _setting(
        1,
        "Points that one question of the compact dialect asks about: more are faster, and an answer that can't be read "
        "loses all of them. At most what the model's card says.",
        low=1,
        high=64,
        dynamic=True,
    )
    distribution: bool = _setting(
        False,
        "Also ask how the model's belief is spread over numbers: a field std (metres) in the cloud, and a confidence "
        "that is its own probability to be within 25 %. About 15 short passes a point more, at most 25. Not for dense.",
        dynamic=True,
    )
    depth_value: str = _setting(
        "greedy",
        "What is published as the depth: greedy, the number that was said, or median or mean of the distribution "
        "(`distribution` true), which lie nearer to the truth on average.",
        choices=("greedy", "median", "mean"),
        dynamic=True,
    )
    calibration: str = _setting(
        "",
        "File with a measured calibration (calibration.json of `depthlm evaluate`), so that a confidence of 0.7 means "
        "that 7 of 10 such depths are within 25 %. Empty: confidences as the model states them.",
    )
    stride: int = _setting(
        4,
        "Density of the cloud in the dense dialect while `points` is 0: every stride-th row and column becomes a "
        "point; 1 is every pixel. The depth map is computed whole either way, so this costs bandwidth, not inference.",
        low=1,
        high=64,
        dynamic=True,
    )
    sampling: str = _setting(
        "grid",
        "Where the asked pixels lie: an even grid, at random, random with even spacing (blue_noise), denser beside the "
        "image's edges (edges), or half of them evenly and half where the first half's answers were unsure or differed "
        "(uncertainty, which asks twice).",
        choices=("grid", "random", "blue_noise", "edges", "uncertainty"),
        dynamic=True,
    )
    region: str = _setting(
        "",
        "The part of the image that is asked: column and row of its corner, width and height in pixels, such as "
        '"100, 80, 200, 150". Empty: the whole image.',
        dynamic=True,
    )
    densify: bool = _setting(
        False,
        "Fill the depth image between the asked pixels along the edges of the colour image. The cloud keeps to the "
        "asked pixels. Changes nothing where every pixel is asked, as in the dense dialect while `points` is 0.",
        dynamic=True,
    )
    min_confidence: float = _setting(
        0.0, "Answers with less confidence are left out; 0 keeps all.", low=0.0, high=1.0, dynamic=True
    )
    max_depth_m: float = _setting(
        0.0,
        "Depths beyond this many metres (sky, far ground) are left out: NaN in the depth image and in organised "
        "clouds, absent from other clouds; 0 keeps all.",
        low=0.0,
        high=10_000.0,
        dynamic=True,
    )
    undrawable: str = _setting(
        "report",
        "Points too near the border for the marker (5 pixels of the image as the model sees it): report counts them "
        "as not askable in the diagnostics, they get no depth; shift asks the nearest pixel that can carry the marker "
        "(at most 6 away in each direction), takes its depth for the asked pixel and counts it.",
        choices=("report", "shift"),
        dynamic=True,
    )
    organised: bool = _setting(
        False,
        "Publish the stride grid as an organised cloud (height x width, NaN where there is no depth) instead of a "
        "list of the pixels that have a depth. Needs `points` 0 and the dense dialect; a list is published otherwise.",
        dynamic=True,
    )
    relative_pose: bool = _setting(
        False,
        "Publish on `relative_pose` where the camera is, seen from where it was at the frame before. For models whose "
        "card has the task pose.",
    )
    answer_tokens: int = _setting(
        256,
        "Longest answer to a question on `~/ask`, in tokens. A frame that comes meanwhile waits for it.",
        low=1,
        high=4096,
        dynamic=True,
    )
    question_timeout_s: float = _setting(
        5.0,
        "How long a question waits for a frame before it gets an error, and how much older than the question a frame "
        "may be to be asked about.",
        low=0.1,
        high=3600.0,
        dynamic=True,
    )
    rectified: bool = _setting(
        False, "The image is rectified: take P of camera_info. False: a raw image, take K and D."
    )
    compressed: bool = _setting(False, "Subscribe to image/compressed (JPEG or PNG) instead of image.")
    cpu_threads: int = _setting(
        0, "CPU threads for inference; 0 leaves the choice to the engine. Fewer leave cores to others.", low=0, high=256
    )
    autostart: bool = _setting(True, "Configure and activate at start. False: wait for a lifecycle manager to do so.")

    def __post_init__(self) -> None:
        for spec in specs():
            object.__setattr__(self, spec.name, spec.check(getattr(self, spec.name)))
        read_region(self.region)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Parameters:
        """Builds from names and values; what isn't named has its default.

        Raises:
            ConfigError: an unknown name (the message has the nearest valid one) or a bad value.
        """
        refuse_unknown(values)
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: Path | str) -> Parameters:
        """Reads a ROS 2 parameter file, the section of `depth_node` or of `/**`.

        Raises:
            ConfigError: no such file, no such section, an unknown name or a bad value.
        """
        return cls.from_mapping(read_yaml(path))

    def replaced(self, **changes: Any) -> Parameters:
        """A copy with some values changed.

        Raises:
            ConfigError: as `from_mapping`.
        """
        refuse_unknown(changes)
        return dataclasses.replace(self, **changes)

    def load_arguments(self) -> dict[str, Any]:
        """The keyword arguments of `Estimator.load`."""
        return {
            "model": self.model,
            "engine": self.engine,
            "options": self.engine_options(),
            "policy": self.policy or None,
            "dialect": self.dialect or None,
            "commercial_use": self.commercial_use,
            "calibration": self.calibration or None,
            "reference": self.reference or None,
            "accept_unproven": self.accept_unproven,
        }

    def engine_options(self) -> EngineOptions:
        """What the engine is told."""
        names = {field.name for field in dataclasses.fields(EngineOptions)} - {"server_urls"}
        urls = tuple(filter(None, (url.strip() for url in self.server_urls.split(","))))
        return EngineOptions(server_urls=urls, **{name: getattr(self, name) for name in names})

    def answer_arguments(self) -> dict[str, Any]:
        """The keyword arguments of `Estimator.estimate` about how it is answered; `distribution` only where wanted."""
        arguments: dict[str, Any] = {"points_per_question": self.points_per_question}
        if self.distribution:
            arguments["distribution"] = True
        if self.depth_value != "greedy":
            arguments["depth_value"] = self.depth_value
        return arguments


def read_region(text: str) -> tuple[int, int, int, int] | None:
    """Reads `region`: (u, v, width, height) in pixels, None for the whole image.

    Raises:
        ConfigError: not four whole numbers, a corner before 0, or a region without pixels.
    """
    if not text.strip():
        return None
    try:
        u, v, width, height = (int(part) for part in text.split(","))
    except ValueError:
        u = v = width = height = -1
    if min(u, v) < 0 or min(width, height) < 1:
        raise ConfigError(
            f"region is {text!r}; give column and row of its corner, width and height, such as 100, 80, 200, 150"
        )
    return u, v, width, height


def specs() -> tuple[Spec, ...]:
    """All settings in the order of `Parameters`."""
    types = get_type_hints(Parameters)
    return tuple(
        Spec(name=f.name, type=types[f.name], default=f.default, **f.metadata) for f in dataclasses.fields(Parameters)
    )


def spec(name: str) -> Spec:
    """The setting of this name.

    Raises:
        ConfigError: there is none; the message names the nearest one.
    """
    refuse_unknown([name])
    return next(s for s in specs() if s.name == name)


def refuse_unknown(names: Iterable[str]) -> None:
    """Checks that every name is one of ours.

    Raises:
        ConfigError: the first unknown name, with the nearest valid one.
    """
    known = [f.name for f in dataclasses.fields(Parameters)]
    for name in names:
        if name not in known:
            raise ConfigError(unknown_choice("parameter", name, known))


def read_yaml(path: Path | str, node: str = NODE_NAME) -> dict[str, Any]:
    """Reads the settings from a ROS 2 parameter file.

    Sections `/**`, `/**/node` (in any namespace), `node` and `/node` count, the later one wins. What belongs to
    ROS itself (`use_sim_time`, `qos_overrides`) is left out.

    Raises:
        ConfigError: the file can't be read, or has no such section.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"can't read parameters from {path}: {error}") from error
    sections = [
        name for name in ("/**", f"/**/{node}", node, f"/{node}") if isinstance(content, dict) and name in content
    ]
    if not sections:
        raise ConfigError(f"{path} has no section {node!r} with ros__parameters; see config/depthlm.yaml for the form")
    values: dict[str, Any] = {}
    for name in sections:
        if "ros__parameters" not in content[name]:
            raise ConfigError(f"{path}: section {name!r} lacks ros__parameters; see config/depthlm.yaml for the form")
        values.update(content[name]["ros__parameters"])
    return {name: value for name, value in values.items() if not belongs_to_ros(name)}


def belongs_to_ros(name: str) -> bool:
    """Whether a parameter is one that every ROS 2 node has."""
    return name in ("use_sim_time", "start_type_description_service") or name.split(".")[0] == "qos_overrides"


def add_arguments(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Adds one `--option` for each named setting, with its description, range and default.

    Raises:
        ConfigError: an unknown name.
    """
    for s in map(spec, names):
        option = "--" + s.name.replace("_", "-")
        text = describe(s).replace("%", "%%")
        if s.type is bool:
            parser.add_argument(
                option, dest=s.name, action=argparse.BooleanOptionalAction, default=s.default, help=text
            )
            continue
        parser.add_argument(option, dest=s.name, type=_argument_type(s), default=s.default, help=text)


def from_arguments(arguments: argparse.Namespace) -> Parameters:
    """The settings among parsed arguments; those that the parser doesn't have are at their defaults."""
    known = {s.name for s in specs()}
    return Parameters.from_mapping({name: value for name, value in vars(arguments).items() if name in known})


def describe(s: Spec) -> str:
    """Description, values allowed and default in one line, for `--help` and launch."""
    allowed = f" [{s.allowed}]" if s.allowed else ""
    return f"{s.description}{allowed} Default: {_yaml_value(s.default)}."


def markdown_table() -> str:
    """The table of all settings for the README."""
    rows = ["| parameter | default | values | at run time | what it does |", "|---|---|---|---|---|"]
    for s in specs():
        values = s.allowed or s.type.__name__
        dynamic = "yes" if s.dynamic else ""
        rows.append(f"| `{s.name}` | `{_yaml_value(s.default)}` | {values} | {dynamic} | {s.description} |")
    return "\n".join(rows) + "\n"


def yaml_text() -> str:
    """The content of config/depthlm.yaml: every setting at its default, with its description."""
    lines = [f"/**/{NODE_NAME}:", "  ros__parameters:"]
    for s in specs():
        lines += textwrap.wrap(describe(s), 110, initial_indent="    # ", subsequent_indent="    # ")
        lines.append(f"    {s.name}: {_yaml_value(s.default)}")
    return "\n".join(lines) + "\n"


def _argument_type(s: Spec) -> Any:
    def parse(text: str) -> Any:
        try:
            return s.parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    parse.__name__ = s.type.__name__
    return parse


def _yaml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else '""'


def _number(value: float) -> str:
    return f"{value:g}" if value < 1e6 else f"{value:.0f}"


if __name__ == "__main__":
    print(markdown_table(), end="")
