"""Distances, speed and time: the other tasks of DepthLM's multi-task model (arXiv 2509.25413), and their geometry.

The questions are those of the published figure (media/multiTask.jpg); no code and no training prompts of them are
public. That points are marked with the red arrow, two of them with two arrows, is therefore assumed.

The same quantities can be *measured*: depth is asked, and camera geometry does the rest (`Measured`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from depthlm_ros.errors import ConfigError, PixelError
from depthlm_ros.prompts import parse_depth
from depthlm_ros.tasks import SIGNED, finite, strip_thinking

AXIS_DISTANCE = "How far is this point from the camera in the forward backward direction?"
SPEED = "How many meters per second should we move in order to reach this point in exactly {seconds} seconds?"
TIME = "How many seconds do we need to reach this point if we move towards it with the speed of {speed}m/s?"
TWO_POINTS = "How far are these 2 points from each other?"
METRES_MOVED = "How many meters has the camera moved between these 2 images?"

_METRES = re.compile(rf"({SIGNED})\s*(?:meters?|metres?|m)\b(?!\s*(?:/|per\b))", re.IGNORECASE)
_SPEED = re.compile(rf"({SIGNED})\s*(?:m\s*/\s*s|met(?:er|re)s?\s*per\s*second)\b", re.IGNORECASE)
_SECONDS = re.compile(rf"({SIGNED})\s*(?:seconds?|s)\b", re.IGNORECASE)


def speed_question(seconds: float) -> str:
    """How fast to move to reach the marked point in this time.

    Raises:
        ConfigError: not a positive time.
    """
    return SPEED.format(seconds=_decimal(seconds, "time in seconds"))


def time_question(speed_mps: float) -> str:
    """How long it takes to the marked point at this speed.

    Raises:
        ConfigError: not a positive speed.
    """
    return TIME.format(speed=_decimal(speed_mps, "speed in metres a second"))


def parse_metres(text: str) -> float | None:
    """The distance that an answer ends with, in metres; None where there is none.

    As in all answers of this room, an `<answer>` tag with a plain number counts before all; without one it is the last
    number with the unit, since the published style reckons first ("7.23 / 4.0 = 1.81m/s").
    """
    return _conclusion(_METRES, text)


def parse_speed_mps(text: str) -> float | None:
    """The speed that an answer ends with, in metres a second; None where there is none."""
    return _conclusion(_SPEED, text)


def parse_seconds(text: str) -> float | None:
    """The time that an answer ends with, in seconds; None where there is none."""
    return _conclusion(_SECONDS, text)


@dataclass(frozen=True, eq=False)
class Said:
    """What a model says in words. Row i of every array belongs to question i.

    Attributes:
        values: (N,) float64 in the unit asked for (metres, metres a second, seconds); NaN where unparsed or not asked.
        asked: (N,) bool, False where an arrow can't be drawn (near the border).
        texts: the model's answers, empty where not asked.
    """

    values: np.ndarray
    asked: np.ndarray
    texts: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Measured:
    """Points of one image in space, from asked depth and the camera; exact geometry from there on.

    Attributes:
        pixels: (N, 2) `(u, v)`.
        points_m: (N, 3) float64 in the optical frame (x right, y down, z forward); NaN where there is no depth.
    """

    pixels: np.ndarray
    points_m: np.ndarray

    @property
    def axis_distance_m(self) -> np.ndarray:
        """(N,) metres along the optical axis: z-depth."""
        return self.points_m[:, 2]

    @property
    def range_m(self) -> np.ndarray:
        """(N,) metres from the camera's centre to each point."""
        return np.linalg.norm(self.points_m, axis=1)

    def distance_m(self, first: int, second: int) -> float:
        """Metres between the points of two rows."""
        count = len(self.points_m)
        if not (-count <= first < count and -count <= second < count):
            raise PixelError(f"points {first} and {second} of {count} were asked for; count from 0")
        return float(np.linalg.norm(self.points_m[first] - self.points_m[second]))

    def speed_to_reach_mps(self, seconds: float) -> np.ndarray:
        """(N,) metres a second that take the camera's centre to each point in this time."""
        _decimal(seconds, "time in seconds")
        return self.range_m / seconds

    def time_to_reach_s(self, speed_mps: float) -> np.ndarray:
        """(N,) seconds to each point at this speed."""
        _decimal(speed_mps, "speed in metres a second")
        return self.range_m / speed_mps


def _decimal(value: float, name: str) -> str:
    """The number with at least one decimal, as published ("4.0"), and no digit lost ("2.25")."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} is {value}; pass a positive number")
    return np.format_float_positional(float(value), trim="0")


def _conclusion(pattern: re.Pattern[str], text: str) -> float | None:
    tagged = parse_depth(text)
    if tagged is not None:
        return tagged
    found = pattern.findall(strip_thinking(text))
    values = finite(found[-1]) if found else None
    return values[0] if values and values[0] >= 0 else None
