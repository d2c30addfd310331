"""Lens distortion: from ideal image coordinates to real ones and back.

Coordinates here are normalised, `x = X / Z`, `y = Y / Z`: no focal length, no pixels.
Models carry the names of sensor_msgs/distortion_models.hpp; formulas and the order of coefficients are
those of OpenCV's "Camera Calibration and 3D Reconstruction" and, for `equidistant`, of its fisheye module
(Kannala and Brandt, PAMI 2006).
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.polynomial import Polynomial

from depthlm_ros.errors import DistortionModelError

COEFFICIENT_COUNTS = {"none": (0,), "plumb_bob": (4, 5), "rational_polynomial": (8,), "equidistant": (4,)}

# What other tools call the same models.
_OTHER_NAMES = {
    "radtan": "plumb_bob", "brown_conrady": "plumb_bob", "fisheye": "equidistant", "kannala_brandt": "equidistant",
    "kannala_brandt4": "equidistant", "pinhole": "none",
}  # fmt: skip

# A ray with z = 1 exists only in front of the camera; the last 0.06 degrees before 90 are numerically useless.
_MAX_ANGLE_RAD = math.pi / 2 - 1e-3
_MAX_STEPS = 30
# Newton doubles the digits: after a step this small the error is at the end of float64.
_STEP_TOLERANCE = 1e-8
# At the very edge of the field the slope is zero or infinite.
_FIELD_SHARE = 1 - 1e-4
# 1e-7 of normalised coordinate is 1e-4 px at a focal length of 1000 px.
_RESIDUAL_TOLERANCE = 1e-7


@dataclass(frozen=True)
class Distortion:
    """How a lens departs from the pinhole.

    Attributes:
        model: "none", "plumb_bob" (k1, k2, p1, p2 and optionally k3), "rational_polynomial"
            (k1, k2, p1, p2, k3, k4, k5, k6) or "equidistant" (k1, k2, k3, k4; a fisheye even if all are zero).
        coefficients: as many finite numbers as the model has.

    Raises:
        DistortionModelError: unknown model, wrong number of coefficients, or a non-finite one.
    """

    model: str = "none"
    coefficients: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "coefficients", tuple(float(c) for c in self.coefficients))
        if self.model not in COEFFICIENT_COUNTS:
            near = _OTHER_NAMES.get(self.model.lower()) or next(
                iter(difflib.get_close_matches(self.model, COEFFICIENT_COUNTS, n=1)), None
            )
            hint = f"did you mean {near!r}? " if near else ""
            raise DistortionModelError(
                f"unknown distortion model {self.model!r}; {hint}known are {', '.join(COEFFICIENT_COUNTS)}. "
                "Rectify the image (image_proc) and pass it as rectified otherwise"
            )
        counts = COEFFICIENT_COUNTS[self.model]
        if len(self.coefficients) not in counts:
            raise DistortionModelError(
                f"distortion model {self.model!r} has {' or '.join(map(str, counts))} coefficients, "
                f"got {len(self.coefficients)}: {self.coefficients}; correct the camera's calibration file"
            )
        if not all(map(math.isfinite, self.coefficients)):
            raise DistortionModelError(
                f"distortion coefficients {self.coefficients} are not all finite; calibrate the camera again"
            )

    @property
    def is_identity(self) -> bool:
        """Whether the lens is a pinhole: no model, or a polynomial with zeros alone."""
        return self.model == "none" or (self.model != "equidistant" and not any(self.coefficients))

    def distort(self, xy: np.ndarray) -> np.ndarray:
        """Maps ideal coordinates (..., 2) to where the lens puts them; NaN beyond the model's field.

        Beyond the field a polynomial folds back on itself and would place two directions on one pixel.
        """
        xy = np.asarray(xy, np.float64)
        if self.is_identity:
            return xy.copy()
        x, y = xy[..., 0], xy[..., 1]
        if self.model == "equidistant":
            radius = np.hypot(x, y)
            angle = np.arctan(radius)
            bent = _bent_angle(self, angle)[0]
            factor = np.divide(bent, radius, out=np.ones_like(radius), where=radius > 0)
            inside = angle <= _field_limit(self)
            out = xy * factor[..., None]
        else:
            out = np.stack(_bent_xy(self, x, y)[:2], axis=-1)
            inside = x * x + y * y <= _field_limit(self)
        return np.where(inside[..., None], out, np.nan)

    def undistort(self, xy: np.ndarray) -> np.ndarray:
        """Inverse of `distort` by Newton's method in float64; NaN where no direction ends in this place."""
        xy = np.asarray(xy, np.float64)
        if self.is_identity:
            return xy.copy()
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            return _undistort_angle(self, xy) if self.model == "equidistant" else _undistort_xy(self, xy)


def _radial(distortion: Distortion) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Numerator and denominator in t = r² (ascending powers), p1, p2."""
    k1, k2, p1, p2, k3, k4, k5, k6 = (distortion.coefficients + (0.0,) * 8)[:8]
    return np.array([1.0, k1, k2, k3]), np.array([1.0, k4, k5, k6]), p1, p2


def _bent_xy(distortion: Distortion, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Distorted x, y and the Jacobian's (dx/dx, dx/dy = dy/dx, dy/dy)."""
    (_, k1, k2, k3), (_, k4, k5, k6), p1, p2 = _radial(distortion)
    t = x * x + y * y
    top, bottom = 1 + t * (k1 + t * (k2 + t * k3)), 1 + t * (k4 + t * (k5 + t * k6))
    d_top, d_bottom = k1 + t * (2 * k2 + t * 3 * k3), k4 + t * (2 * k5 + t * 3 * k6)
    gain = top / bottom
    slope = (d_top - gain * d_bottom) / bottom
    bent_x = x * gain + 2 * p1 * x * y + p2 * (t + 2 * x * x)
    bent_y = y * gain + p1 * (t + 2 * y * y) + 2 * p2 * x * y
    cross = 2 * x * y * slope + 2 * p1 * x + 2 * p2 * y
    return (
        bent_x,
        bent_y,
        gain + 2 * x * x * slope + 2 * p1 * y + 6 * p2 * x,
        cross,
        gain + 2 * y * y * slope + 6 * p1 * y + 2 * p2 * x,
    )


def _bent_angle(distortion: Distortion, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equidistant model: the distorted angle and its derivative."""
    k1, k2, k3, k4 = distortion.coefficients
    s = angle * angle
    value = angle * (1 + s * (k1 + s * (k2 + s * (k3 + s * k4))))
    slope = 1 + s * (3 * k1 + s * (5 * k2 + s * (7 * k3 + s * 9 * k4)))
    return value, slope


def _first_positive_root(polynomial: Polynomial) -> float:
    """The smallest positive root of a polynomial that is 1 at 0; infinity where it has none."""
    # Reversed it is monic, so that coefficients next to nothing don't blow up; its roots are the reciprocals.
    reciprocals = Polynomial(polynomial.coef[::-1]).roots()
    real = reciprocals.real[np.abs(reciprocals.imag) < 1e-9 * (1 + np.abs(reciprocals.real))]
    largest = float(real.max(initial=0.0))
    return 1 / largest if largest > 1e-12 else math.inf


@lru_cache(maxsize=32)
def _field_limit(distortion: Distortion) -> float:
    """Where the radial curve stops rising: r² for the polynomials, the angle in radians for equidistant."""
    if distortion.model == "equidistant":
        k1, k2, k3, k4 = distortion.coefficients
        return min(math.sqrt(_first_positive_root(Polynomial([1, 3 * k1, 5 * k2, 7 * k3, 9 * k4]))), _MAX_ANGLE_RAD)
    top, bottom = (Polynomial(c) for c in _radial(distortion)[:2])
    rising = top * bottom + Polynomial([0, 2]) * (top.deriv() * bottom - top * bottom.deriv())
    return min(_first_positive_root(rising), _first_positive_root(bottom))


@lru_cache(maxsize=32)
def _inverse_table(distortion: Distortion) -> tuple[np.ndarray, np.ndarray]:
    """Distorted radius and the angle in radians that it comes from, over the whole field.

    Newton's first guess: from the target itself it would step over poles and folds of strong lenses.
    """
    limit = _field_limit(distortion)
    end = limit if distortion.model == "equidistant" else min(math.atan(math.sqrt(limit)), _MAX_ANGLE_RAD)
    angle = np.linspace(0.0, end * _FIELD_SHARE, 1024)
    if distortion.model == "equidistant":
        return _bent_angle(distortion, angle)[0], angle
    top, bottom = (Polynomial(c) for c in _radial(distortion)[:2])
    radius = np.tan(angle)
    return radius * top(radius**2) / bottom(radius**2), angle


def _first_guess(distortion: Distortion, bent_radius: np.ndarray) -> np.ndarray:
    bent, angle = _inverse_table(distortion)
    return np.interp(bent_radius, bent, angle)


def _undistort_xy(distortion: Distortion, bent: np.ndarray) -> np.ndarray:
    edge = math.sqrt(_field_limit(distortion)) * _FIELD_SHARE
    target_x, target_y = bent[..., 0], bent[..., 1]
    target_radius = np.hypot(target_x, target_y)
    guess = np.tan(_first_guess(distortion, target_radius))
    factor = np.divide(guess, target_radius, out=np.ones_like(guess), where=target_radius > 0)
    x, y = target_x * factor, target_y * factor
    for _ in range(_MAX_STEPS):
        got_x, got_y, dxx, dxy, dyy = _bent_xy(distortion, x, y)
        error_x, error_y = got_x - target_x, got_y - target_y
        det = dxx * dyy - dxy * dxy
        step_x, step_y = (dyy * error_x - dxy * error_y) / det, (dxx * error_y - dxy * error_x) / det
        x, y = x - step_x, y - step_y
        # Over the fold Newton would find the wrong one of two answers.
        if math.isfinite(edge):
            shrink = np.minimum(1.0, edge / np.sqrt(np.maximum(x * x + y * y, 1e-300)))
            x, y = x * shrink, y * shrink
        if not np.any(np.hypot(step_x, step_y) > _STEP_TOLERANCE):
            break
    got_x, got_y = _bent_xy(distortion, x, y)[:2]
    solved = np.hypot(got_x - target_x, got_y - target_y) < _RESIDUAL_TOLERANCE
    return np.where(solved[..., None], np.stack([x, y], axis=-1), np.nan)


def _undistort_angle(distortion: Distortion, bent: np.ndarray) -> np.ndarray:
    limit = _field_limit(distortion)
    target = np.hypot(bent[..., 0], bent[..., 1])
    angle = _first_guess(distortion, target)
    for _ in range(_MAX_STEPS):
        value, slope = _bent_angle(distortion, angle)
        step = (value - target) / slope
        angle = np.clip(angle - step, 0.0, limit)
        if not np.any(np.abs(step) > _STEP_TOLERANCE):
            break
    solved = np.abs(_bent_angle(distortion, angle)[0] - target) < _RESIDUAL_TOLERANCE
    factor = np.divide(np.tan(angle), target, out=np.ones_like(target), where=target > 0)
    return np.where(solved[..., None], bent * factor[..., None], np.nan)
