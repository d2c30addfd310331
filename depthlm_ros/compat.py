"""The verdicts that the authors' own metrics give on answers, for figures to be compared with published ones.

Ours is `prompts.parse_depth` with `metrics.depth_metrics`, which is stricter; a report shows both. DepthLM's rule
(utils/metrics.py of its repository):

1. The prediction is the first thing that math-verify 0.9.0 parses from the *whole* answer, thinking included, as float.
2. It is right if max(p / g, g / p) < 1.25, the bound itself excluded, g being the true depth in metres.
3. Whatever raises on the way is wrong: nothing parsed, a percentage, a complex number, a zero.

What follows from it, and is reproduced: a negative prediction is always right, since both ratios are negative; "1e1" is
read as 1; "<answer>3.5</answer>" without white space isn't read at all; a number in the thinking counts where the
answer has none; of several answers the last one counts.

math-verify is run, not imitated: its reading of free text is hundreds of lines of patterns on top of sympy.

VLM3's rule (its notebook) needs no library: one expression reads the number, and answers without one, or with a number
that isn't positive, are left out of the count.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata

import numpy as np

from depthlm_ros.errors import DatasetError, MissingDependencyError

# The version whose verdicts DepthLM's figures were checked against.
MATH_VERIFY = "0.9.0"
INSTALL = f'pip install "math-verify[antlr4_13_2]=={MATH_VERIFY}"'
DELTA = 1.25
# math-verify's own limit for parsing. A tower of powers parses at once and then can't be evaluated in any time.
_SECONDS = 5
# VLM3's <answer>\s*([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*</answer>, without two adjacent loops over digits, so that it
# stays linear on a megabyte of them.
_VLM3_ANSWER = re.compile(r"<answer>\s*([-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)\s*</answer>")


@lru_cache(maxsize=1)
def require_math_verify() -> None:
    """Checks that math-verify is there in the version that gives the published verdicts.

    Raises:
        MissingDependencyError: it isn't, or its parser's runtime isn't; the message has the line that installs it.
    """
    try:
        seen = metadata.version("math-verify")
    except metadata.PackageNotFoundError as error:
        raise MissingDependencyError(f"the published metric needs math-verify; run: {INSTALL}") from error
    if seen != MATH_VERIFY:
        raise MissingDependencyError(
            f"the published verdicts are those of math-verify {MATH_VERIFY} and {seen} is installed; run: {INSTALL}"
        )
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"math-verify can't be imported ({error}); run: {INSTALL}") from error


def read_number(text: str) -> float | None:
    """What the published metric reads in an answer; may be negative, zero or infinite.

    In the main thread parsing and evaluating take five seconds at most each; in other threads there is no limit, since
    math-verify's is a signal.

    Raises:
        MissingDependencyError: as `require_math_verify`.
    """
    require_math_verify()
    return _read(text, threading.current_thread() is threading.main_thread())


def is_correct(text: str, true_m: float) -> bool:
    """The published verdict on one answer.

    Args:
        text: what the model wrote, special tokens removed.
        true_m: true depth in metres, as exactly as the labels have it: the bound is sharp.

    Raises:
        MissingDependencyError: as `require_math_verify`.
    """
    number = read_number(text)
    if not number or not true_m:
        return False
    return max(number / float(true_m), float(true_m) / number) < DELTA


def verdicts(texts: Sequence[str], true_m: Sequence[float] | np.ndarray) -> np.ndarray:
    """The published verdicts on many answers.

    Returns:
        (N,) bool. Their mean over all answers of a data set is the published delta1.

    Raises:
        DatasetError: another number of texts than of depths.
        MissingDependencyError: as `require_math_verify`.
    """
    if len(texts) != len(true_m):
        raise DatasetError(f"{len(texts)} answers for {len(true_m)} depths; give one true depth for each answer")
    pairs = zip(texts, np.asarray(true_m, np.float64).tolist(), strict=True)
    return np.array([is_correct(text, true) for text, true in pairs], dtype=bool)


def read_vlm3_number(text: str) -> float | None:
    """What VLM3's notebook reads in an answer: the first tagged number, sign and exponent allowed; None without one."""
    found = _VLM3_ANSWER.search(text)
    return float(found.group(1)) if found else None


def vlm3_delta1(texts: Sequence[str], true_m: Sequence[float] | np.ndarray) -> tuple[float, int]:
    """VLM3's delta1, which leaves out what it can't read.

    Args:
        texts: what the model wrote, special tokens removed.
        true_m: true depths in metres, above zero.

    Returns:
        The share of right answers among the counted ones (NaN without any), and how many were counted.

    Raises:
        DatasetError: another number of texts than of depths.
    """
    if len(texts) != len(true_m):
        raise DatasetError(f"{len(texts)} answers for {len(true_m)} depths; give one true depth for each answer")
    pairs = [(read_vlm3_number(text), float(true)) for text, true in zip(texts, true_m, strict=True)]
    right = [max(said / true, true / said) < DELTA for said, true in pairs if said is not None and said > 0]
    return (sum(right) / len(right) if right else math.nan), len(right)


# Answers repeat: a model says few distinct depths.
@lru_cache(maxsize=4096)
def _read(text: str, timed: bool) -> float | None:
    from math_verify import parse
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    seconds = _SECONDS if timed else None
    try:
        return timeout(seconds)(float)(parse(text, parsing_timeout=seconds)[0])
    # By the metric's definition whatever is raised means "wrong", and sympy raises anything on free text.
    except (Exception, TimeoutException):
        return None
