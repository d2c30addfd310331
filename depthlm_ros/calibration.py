"""What a confidence is worth: how often a depth of that confidence is right, measured and put in its place.

Right means within a factor 1.25 of the true depth (δ1's factor). A calibration is a rising curve from what the model
says of itself to how often it was right, fitted to one set of frames (isotonic regression on groups of equal
size) and meant for others of the same kind. It can't tell apart what the model takes for the same; it makes the
number true on average.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from depthlm_ros.errors import ConfigError, DatasetError

# Groups of equal size over which errors of calibration are counted (Guo et al. 2017 take 15 bins).
GROUPS = 15
# Points that a group of a fitted curve has at least, so that one doesn't hang on a handful.
_LEAST = 30
_FORMAT = "depthlm calibration 1"


@dataclass(frozen=True)
class Kind:
    """Which confidences a calibration is about; others mean something else.

    Attributes:
        model: name of the card.
        dialect: how it was asked.
        depth_value: what was published as the depth ("greedy", "median", "mean").
        distribution: whether the confidence came from the distribution of the digits.
    """

    model: str
    dialect: str
    depth_value: str = "greedy"
    distribution: bool = False

    def __str__(self) -> str:
        source = "the distribution of its digits" if self.distribution else "what was said alone"
        return f"model {self.model}, dialect {self.dialect}, depth_value {self.depth_value}, from {source}"


@dataclass(frozen=True)
class Calibration:
    """A rising curve from stated to true confidence.

    Attributes:
        said: (K,) rising confidences of the model.
        right: (K,) share of depths that were right there, rising.
        points: how many depths it was fitted to.
        frames: of how many images.
        kind: which confidences; None where nobody said.
    """

    said: tuple[float, ...]
    right: tuple[float, ...]
    points: int
    frames: int
    kind: Kind | None = None

    def __post_init__(self) -> None:
        said, right = np.array(self.said), np.array(self.right)
        if not (len(said) == len(right) >= 1 and _rising(said) and _rising(right) and _shares(right)):
            raise ConfigError(
                f"the curve {self.said} to {self.right} of a calibration doesn't rise from 0 to 1; fit it again with "
                "`depthlm evaluate`"
            )

    @property
    def about(self) -> str:
        """What it was fitted to, in words."""
        return f"on {self.points} depths in {self.frames} images; for {self.kind or 'whatever is given'}"

    @classmethod
    def fit(
        cls, confidence: np.ndarray, right: np.ndarray, frames: np.ndarray | None = None, kind: Kind | None = None
    ) -> Calibration:
        """Fits a curve.

        Args:
            confidence: (N,) of depths that were answered.
            right: (N,) bool, whether they were right.
            frames: (N,) label of the image that each belongs to.
            kind: which confidences these are.

        Raises:
            DatasetError: no depth, or arrays of different lengths.
        """
        confidence, right = _pair(confidence, right)
        right = _shared_by_equals(confidence, right)
        groups = _groups(confidence, max(1, min(GROUPS, len(confidence) // _LEAST)))
        # Rounding mustn't make the mean of equal confidences fall.
        said = np.maximum.accumulate([confidence[g].mean() for g in groups])
        # One success and one failure more in each: no group is ever certain (Laplace's rule).
        share = np.array([(right[g].sum() + 1) / (len(g) + 2) for g in groups])
        weights = np.array([float(len(g)) for g in groups])
        images = len(np.unique(frames)) if frames is not None else 1
        curve = _isotonic(share, weights)
        return cls(tuple(said.tolist()), tuple(curve.tolist()), len(confidence), images, kind)

    def apply(self, confidence: np.ndarray) -> np.ndarray:
        """(N,) float32 share of depths of these confidences that is right; 0, which is no answer, stays 0."""
        curve = np.interp(confidence, self.said, self.right)
        return np.where(np.asarray(confidence) > 0, curve, 0).astype(np.float32)

    def fits(self, kind: Kind) -> bool:
        """Whether confidences are of the kind that this was fitted to."""
        return self.kind is None or self.kind == kind

    def require(self, kind: Kind) -> None:
        """Checks that confidences are of the kind that this was fitted to.

        Raises:
            ConfigError: they are of another kind.
        """
        if not self.fits(kind):
            raise ConfigError(
                f"the calibration is for {self.kind}; these confidences are of {kind}. Give the parameters it was "
                "fitted with, or fit one with `depthlm evaluate` and these"
            )

    def save(self, path: Path | str) -> None:
        """Writes JSON."""
        content = {"format": _FORMAT, **asdict(self)}
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            ConfigError: no such file, or not a calibration.
        """
        remedy = "give the calibration.json of `depthlm evaluate`"
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"can't read a calibration from {path}: {error}; {remedy}") from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise ConfigError(f"{path} is no calibration of the format {_FORMAT!r}; {remedy}")
        try:
            kind = None if content["kind"] is None else Kind(**content.pop("kind"))
            said, right = (tuple(map(float, content.pop(name))) for name in ("said", "right"))
            return cls(said, right, **{**content, "kind": kind})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} lacks or misnames a part of a calibration: {error}; {remedy}") from error


@dataclass(frozen=True)
class Reliability:
    """How confidence and truth go together, over groups of equal size from the least to the most confident.

    Attributes:
        confidence: (G,) mean in each group.
        right: (G,) share that was right.
        count: (G,) depths in each.
    """

    confidence: tuple[float, ...]
    right: tuple[float, ...]
    count: tuple[int, ...]

    @property
    def error(self) -> float:
        """Expected calibration error: mean over all depths of |confidence - share that was right| of their group."""
        gaps = np.abs(np.array(self.confidence) - np.array(self.right))
        return float(np.average(gaps, weights=self.count))


def reliability(confidence: np.ndarray, right: np.ndarray, groups: int = GROUPS) -> Reliability:
    """Sorts depths by confidence into groups of equal size.

    Raises:
        DatasetError: no depth, or arrays of different lengths.
    """
    confidence, right = _pair(confidence, right)
    right = _shared_by_equals(confidence, right)
    members = _groups(confidence, min(groups, len(confidence)))
    return Reliability(
        tuple(float(confidence[g].mean()) for g in members),
        tuple(float(right[g].mean()) for g in members),
        tuple(len(g) for g in members),
    )


def calibrated_elsewhere(
    confidence: np.ndarray, right: np.ndarray, frames: np.ndarray, *, folds: int = 5, seed: int = 0
) -> np.ndarray | None:
    """(N,) confidences, each calibrated by a curve that was fitted to other frames.

    Args:
        confidence: (N,).
        right: (N,) bool.
        frames: (N,) label of the image each belongs to; an image is never part of what calibrates it.
        folds: parts that the images are dealt into.
        seed: of the dealing.

    Returns:
        None where there are fewer than two images.
    """
    confidence, right = _pair(confidence, right)
    labels, frame = np.unique(frames, return_inverse=True)
    if len(labels) < 2:
        return None
    folds = min(folds, len(labels))
    fold = np.random.default_rng(seed).permutation(len(labels))[frame] % folds
    out = np.empty(len(confidence), np.float32)
    for one in range(folds):
        held = fold == one
        out[held] = Calibration.fit(confidence[~held], right[~held]).apply(confidence[held])
    return out


def _isotonic(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The rising values nearest to `values` in weighted squares (pool adjacent violators)."""
    blocks: list[list[float]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, wa, na), (b, wb, nb) = blocks[-2:]
            blocks[-2:] = [[(a * wa + b * wb) / (wa + wb), wa + wb, na + nb]]
    return np.concatenate([np.full(int(count), value) for value, _, count in blocks])


def _groups(confidence: np.ndarray, count: int) -> list[np.ndarray]:
    return np.array_split(np.argsort(confidence, kind="stable"), count)


def _shared_by_equals(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(N,) share that is right among points of the very same confidence, so that their order can't matter."""
    _, which, count = np.unique(confidence, return_inverse=True, return_counts=True)
    return (np.bincount(which, right) / count)[which]


def _pair(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    confidence, right = np.asarray(confidence, float).reshape(-1), np.asarray(right, bool).reshape(-1)
    if len(confidence) != len(right) or not len(right):
        raise DatasetError(
            f"{len(confidence)} confidences and {len(right)} verdicts; give one of each for every answered depth, and "
            "at least one"
        )
    return confidence, right


def _rising(values: np.ndarray) -> bool:
    return bool((np.diff(values) >= 0).all())


def _shares(values: np.ndarray) -> bool:
    return bool(((values >= 0) & (values <= 1)).all())
