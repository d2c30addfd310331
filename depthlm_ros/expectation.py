"""What a model expects, beyond what it says: distributions of numbers as the arrays of a result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from depthlm_ros.errors import ConfigError, unknown_choice

if TYPE_CHECKING:
    from depthlm_ros.engines.base import Answer

DEPTH_VALUES = ("greedy", "median", "mean")


@dataclass(frozen=True)
class Expected:
    """Of each pixel's answer, in metres of the kind that the model answers in; NaN where nothing is known.

    Attributes:
        std, sigma_log, median, mean: (N,) as of `NumberDistribution`.
        near: by depth value, (N,) the model's own probability that it is right in δ1; 0 where nothing is known.
    """

    std: np.ndarray
    sigma_log: np.ndarray
    median: np.ndarray
    mean: np.ndarray
    near: dict[str, np.ndarray]

    @classmethod
    def of(cls, answers: Sequence[Answer], rows: np.ndarray, count: int) -> Expected:
        """Gathers the numbers of answers about pixels `rows` of `count`."""

        def column(name: str, unknown: float = math.nan) -> np.ndarray:
            values = np.full(count, unknown, np.float32)
            values[rows] = [unknown if a.number is None else getattr(a.number, name) for a in answers]
            return values

        near = {value: np.nan_to_num(column(f"near_{value}", 0.0)) for value in DEPTH_VALUES}
        return cls(column("std"), column("sigma_log"), column("median"), column("mean"), near)

    def depth(self, said: np.ndarray, value: str) -> np.ndarray:
        """(N,) metres that `value`, one of `DEPTH_VALUES`, stands for; `said` is what greedy decoding wrote."""
        return {"greedy": said, "median": self.median, "mean": self.mean}[value]

    def fields(self, said: np.ndarray, to_z: Callable[[np.ndarray], np.ndarray], good: np.ndarray) -> dict:
        """The arrays of a `DepthResult`, NaN where not `good`; `to_z` turns metres of the answers into z-depth."""
        metres = {"std_m": self.std, "greedy_m": said, "median_m": self.median, "mean_m": self.mean}
        arrays = {name: to_z(values) for name, values in metres.items()} | {"sigma_log": self.sigma_log}
        return {name: np.where(good, values, np.nan).astype(np.float32) for name, values in arrays.items()}


def check_distribution(distribution: bool, depth_value: str, dialect: str, points_per_question: int) -> None:
    """Checks that what is expected can be known.

    Raises:
        ConfigError: an unknown depth value, one that needs the distribution, or a way of asking that has none.
    """
    if depth_value not in DEPTH_VALUES:
        raise ConfigError(unknown_choice("depth_value", depth_value, DEPTH_VALUES))
    if depth_value != "greedy" and not distribution:
        raise ConfigError(f"depth_value {depth_value!r} is of the distribution of the digits; set distribution to true")
    if distribution and dialect == "dense":
        raise ConfigError("the dense dialect writes no digits to have a distribution; set distribution to false")
    if distribution and points_per_question > 1:
        raise ConfigError(
            f"the distribution is of one number an answer and {points_per_question} points a question have several; "
            "set points_per_question to 1 or distribution to false"
        )
