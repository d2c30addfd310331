"""Camera pose between two images: VLM3's fourth task (arXiv 2605.30561), four questions about one pair.

The convention, held to the numbers of VLM3's sample data: the second camera's axes come from the first camera's (x
right, y down, z forward) by turning about its own axes in the order yaw, pitch, roll, each right-handed: yaw about
down, positive turns right; pitch about right, positive looks up; roll about forward, positive banks right, right side
down. (The published question adds that the image content then rotates clockwise; in truth it rotates against the
camera. The sample's rotation angle of 89.6547 degrees only comes out with roll as here.) The translation is the second
camera's place in the first camera's frame.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from depthlm_ros.errors import PixelError
from depthlm_ros.tasks import SIGNED, finite, first_number, or_nan, strip_thinking

# VLM3's sample data, by its question ids; two spaces before "Conventions" and "Give" as published.
QUESTIONS: Mapping[str, str] = {
    "rotation_angle": (
        "Given these two images captured from different viewpoints, what is the relative rotation angle (in degrees) "
        "between the two camera poses?"
    ),
    "euler_natural": (
        "Treating the first image as the reference viewpoint, describe the camera's reorientation needed to reach the "
        "second image's viewpoint as yaw, pitch and roll about the first camera's local axes, applied intrinsically in "
        "the order yaw -> pitch -> roll.  Conventions: yaw is rotation about the vertical (down) axis, positive = turn "
        "right; pitch is about the lateral (right) axis after yaw, positive = look up; roll is about the optical "
        "(forward) axis after yaw and pitch, positive = bank to the right (image content rotates clockwise from the "
        "operator's POV)."
    ),
    "translation_direction": (
        "Where did the camera move, expressed in the first camera's local frame (X right, Y down, Z forward)?  Give a "
        "qualitative direction and the precise unit direction vector (x, y, z)."
    ),
    "translation_distance": "Estimate the magnitude of the camera translation between the two viewpoints.",
}

_ANGLE = re.compile(rf"({SIGNED})\s*(?:degrees|deg|°)", re.IGNORECASE)
_EULER = {name: re.compile(rf"{name}\s*(?:[=:]\s*)?({SIGNED})", re.IGNORECASE) for name in ("yaw", "pitch", "roll")}
_VECTOR = re.compile(rf"\(\s*({SIGNED})\s*,\s*({SIGNED})\s*,\s*({SIGNED})\s*\)")
_DISTANCE = re.compile(rf"({SIGNED})\s*(?:meters?|metres?|m)\b", re.IGNORECASE)


def parse_angle_deg(text: str) -> float | None:
    """The first angle with a unit in an answer; None where there is none."""
    return first_number(_ANGLE, text)


def parse_euler_deg(text: str) -> tuple[float | None, float | None, float | None]:
    """Yaw, pitch and roll in degrees, each None where it isn't told."""
    yaw, pitch, roll = (first_number(pattern, text) for pattern in _EULER.values())
    return yaw, pitch, roll


def parse_direction(text: str) -> np.ndarray | None:
    """The first vector of three numbers in an answer as a (3,) float64 unit vector.

    None where there is none or its length is zero.
    """
    found = _VECTOR.search(strip_thinking(text))
    values = finite(*found.groups()) if found else None
    if values is None:
        return None
    # Scaled first, so that no square overflows.
    largest = max(map(abs, values))
    if largest == 0:
        return None
    vector = np.array(values) / largest
    return vector / np.linalg.norm(vector)


def parse_distance_m(text: str) -> float | None:
    """The first distance in metres in an answer; None where there is none or it is negative."""
    distance = first_number(_DISTANCE, text)
    return distance if distance is not None and distance >= 0 else None


def euler_matrix(yaw_deg: float, pitch_deg: float, roll_deg: float) -> np.ndarray:
    """(3, 3) rotation; its columns are the turned camera's right, down and forward axes in the first camera's frame."""
    (cy, sy), (cp, sp), (cr, sr) = (
        (math.cos(a), math.sin(a)) for a in map(math.radians, (yaw_deg, pitch_deg, roll_deg))
    )
    yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    pitch = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    roll = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    # Intrinsic turns multiply from the right.
    return yaw @ pitch @ roll


def euler_angles(rotation: np.ndarray) -> tuple[float, float, float]:
    """Yaw in (-180, 180], pitch in [-90, 90] and roll in (-180, 180] degrees of a (3, 3) rotation.

    Looking straight up or down, where only yaw and roll together are known, roll is 0.
    """
    rotation = np.asarray(rotation, np.float64)
    level = math.hypot(rotation[0, 2], rotation[2, 2])
    pitch = math.atan2(-rotation[1, 2], level)
    if level < 1e-9:
        return math.degrees(math.atan2(-rotation[2, 0], rotation[0, 0])), math.degrees(pitch), 0.0
    yaw = math.atan2(rotation[0, 2], rotation[2, 2])
    roll = math.atan2(rotation[1, 0], rotation[1, 1])
    return math.degrees(yaw), math.degrees(pitch), math.degrees(roll)


def rotation_angle_deg(rotation: np.ndarray) -> float:
    """The angle in [0, 180] degrees that a (3, 3) rotation turns by; NaN for a rotation with NaN."""
    rotation = np.asarray(rotation, np.float64)
    # Sine and cosine together keep small angles and those near 180 degrees exact.
    antisymmetric = rotation - rotation.T
    sine = math.sqrt(antisymmetric[2, 1] ** 2 + antisymmetric[0, 2] ** 2 + antisymmetric[1, 0] ** 2)
    return math.degrees(math.atan2(sine, float(np.trace(rotation)) - 1))


@dataclass(frozen=True, eq=False)
class RelativePose:
    """The second camera as seen from the first; NaN where nothing was said.

    Attributes:
        rotation_deg: the angle between the two orientations as it was told, a question of its own.
        yaw_deg: first turn, about the down axis; positive turns right.
        pitch_deg: second turn, about the right axis; positive looks up.
        roll_deg: third turn, about the forward axis; positive banks right.
        direction: (3,) float64 unit vector to the second camera, in the first camera's frame.
        distance_m: metres between the two cameras.
        texts: the model's answers by question id; empty for a pose that wasn't said.
    """

    rotation_deg: float
    yaw_deg: float
    pitch_deg: float
    roll_deg: float
    direction: np.ndarray
    distance_m: float
    texts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_matrix(cls, rotation: np.ndarray, translation_m: np.ndarray) -> RelativePose:
        """The pose with this (3, 3) rotation and (3,) translation; the direction is NaN where the camera stayed."""
        translation = np.asarray(translation_m, np.float64)
        distance = float(np.linalg.norm(translation))
        direction = translation / distance if distance > 0 else np.full(3, np.nan)
        return cls(rotation_angle_deg(rotation), *euler_angles(rotation), direction, distance)

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> RelativePose:
        """Reads answers by question id; never raises for what a model wrote."""
        direction = parse_direction(texts["translation_direction"])
        return cls(
            or_nan(parse_angle_deg(texts["rotation_angle"])),
            *map(or_nan, parse_euler_deg(texts["euler_natural"])),
            np.full(3, np.nan) if direction is None else direction,
            or_nan(parse_distance_m(texts["translation_distance"])),
            dict(texts),
        )

    def rotation_matrix(self) -> np.ndarray:
        """(3, 3) float64: takes directions of the second camera's frame to the first's; NaN if an angle is."""
        return euler_matrix(self.yaw_deg, self.pitch_deg, self.roll_deg)

    def quaternion_xyzw(self) -> np.ndarray:
        """(4,) float64, the same rotation as geometry_msgs/Quaternion has it; NaN if an angle is."""
        (cy, sy), (cp, sp), (cr, sr) = (
            (math.cos(a / 2), math.sin(a / 2)) for a in map(math.radians, (self.yaw_deg, self.pitch_deg, self.roll_deg))
        )
        return np.array([
            cy * sp * cr + sy * cp * sr, sy * cp * cr - cy * sp * sr, cy * cp * sr - sy * sp * cr,
            cy * cp * cr + sy * sp * sr,
        ])  # fmt: skip

    def translation_m(self) -> np.ndarray:
        """(3,) float64 metres: where the second camera is in the first one's frame; NaN if direction or distance is."""
        return self.direction * self.distance_m


@dataclass(frozen=True)
class PoseErrors:
    """Differences between a pose and the true one; NaN where something wasn't said.

    Attributes:
        angle_deg: of the rotation angle as it was told.
        yaw_deg: of yaw, in [0, 180]; likewise `pitch_deg` and `roll_deg`.
        rotation_deg: angle between the two orientations, from yaw, pitch and roll.
        direction_deg: angle between the two directions, in [0, 180]; opposite is 180.
        distance_m: absolute.
        distance_rel: relative to the true distance.
    """

    angle_deg: float
    yaw_deg: float
    pitch_deg: float
    roll_deg: float
    rotation_deg: float
    direction_deg: float
    distance_m: float
    distance_rel: float


def pose_errors(said: RelativePose, true: RelativePose) -> PoseErrors:
    """Compares two poses as VLM3 does (|difference| of angles, here the short way around), and as a whole."""
    turned = said.rotation_matrix().T @ true.rotation_matrix()
    distance = abs(said.distance_m - true.distance_m)
    return PoseErrors(
        angle_deg=abs(said.rotation_deg - true.rotation_deg),
        yaw_deg=_short_way(said.yaw_deg - true.yaw_deg),
        pitch_deg=_short_way(said.pitch_deg - true.pitch_deg),
        roll_deg=_short_way(said.roll_deg - true.roll_deg),
        rotation_deg=rotation_angle_deg(turned),
        direction_deg=angle_between_deg(said.direction, true.direction),
        distance_m=distance,
        distance_rel=distance / true.distance_m if true.distance_m > 0 else math.nan,
    )


def angle_between_deg(a: np.ndarray, b: np.ndarray) -> float:
    """Angle in [0, 180] degrees between two (3,) vectors; NaN if one has NaN or no length."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not (np.linalg.norm(a) > 0 and np.linalg.norm(b) > 0):
        return math.nan
    return math.degrees(math.atan2(float(np.linalg.norm(np.cross(a, b))), float(a @ b)))


def auc(rotation_deg: np.ndarray, direction_deg: np.ndarray, threshold_deg: int = 30, bins: bool = True) -> float:
    """Area under the curve of accuracy over error threshold, in [0, 1]; "AUC@30" for 30.

    A pair's error is the larger of its rotation and its direction error; NaN is an error beyond every threshold.

    How VLM3 defines its AUC@30 isn't known. `bins` is the definition of the pose benchmarks that it compares itself
    with (VGGT, Depth Anything 3): the mean over the whole degrees 1 to 30 of the share of pairs with an error below.
    Without it, the exact area under the curve. Both here tell a direction from its opposite; VGGT's code doesn't, so
    fold the direction errors (min(e, 180 - e)) to compare with it.

    Args:
        rotation_deg: (N,) `PoseErrors.rotation_deg`.
        direction_deg: (N,) `PoseErrors.direction_deg`.
        threshold_deg: where the curve ends, whole degrees.
        bins: see above.

    Returns:
        NaN without pairs.

    Raises:
        PixelError: not as many directions as rotations.
    """
    rotation, direction = np.asarray(rotation_deg, np.float64), np.asarray(direction_deg, np.float64)
    if rotation.shape != direction.shape:
        raise PixelError(f"{rotation.size} rotation and {direction.size} direction errors; pass as many of both")
    if not rotation.size:
        return math.nan
    error = np.nan_to_num(np.maximum(rotation, direction), nan=math.inf)
    if not bins:
        return float(np.clip(1 - error / threshold_deg, 0, 1).mean())
    return float(np.mean([(error < degrees).mean() for degrees in range(1, threshold_deg + 1)]))


def _short_way(degrees: float) -> float:
    return abs((degrees + 180) % 360 - 180)
