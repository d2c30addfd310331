"""What the pipeline carries: a `Frame` goes in, a `DepthResult` comes out.

Pixels are always `(u, v)` = (column, row) of the *source* image, integer values at pixel centres.
Depth comes in two kinds that are two types, so that one is never taken for the other:
z-depth lies along the optical axis (REP 118), Euclidean distance lies along the ray.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from depthlm_ros.camera import Camera
from depthlm_ros.errors import PixelError


@dataclass(frozen=True)
class Frame:
    """One camera image with what is needed to measure in it.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        camera: intrinsics of exactly this image.
        stamp_ns: time of exposure in nanoseconds of the ROS clock.
        frame_id: the camera's optical frame (REP 103: x right, y down, z forward).
    """

    image: np.ndarray
    camera: Camera
    stamp_ns: int = 0
    frame_id: str = "camera_optical_frame"


@dataclass(frozen=True)
class ZDepth:
    """Metres along the optical axis; (N,) or (H, W) float32, NaN where unknown."""

    metres: np.ndarray

    def to_z(self, rays: np.ndarray) -> ZDepth:
        """Returns itself: it is z-depth already. `rays` keeps the two kinds interchangeable."""
        return self


@dataclass(frozen=True)
class EuclideanDistance:
    """Metres from the camera centre along the ray; (N,) or (H, W) float32, NaN where unknown."""

    metres: np.ndarray

    def to_z(self, rays: np.ndarray) -> ZDepth:
        """Converts to z-depth.

        Args:
            rays: (..., 3) directions with z = 1 through the same pixels (`Camera.rays`).
        """
        return ZDepth((self.metres / np.linalg.norm(rays, axis=-1)).astype(np.float32))


DEPTH_KINDS = {"z": ZDepth, "euclidean": EuclideanDistance}
# What a result holds where the distribution of the digits was asked for.
DISTRIBUTION = ("std_m", "sigma_log", "greedy_m", "median_m", "mean_m")


@dataclass(frozen=True)
class DepthResult:
    """Depth at the asked pixels of one image. Row i of every array belongs to pixel i.

    Attributes:
        pixels: (N, 2) float32 `(u, v)` in the source image.
        depth_m: (N,) float32 z-depth in metres, finite and positive, or NaN where there is no answer.
        confidence: (N,) float32 in [0, 1]; 0 where there is no answer.
        asked: (N,) bool, False where the dialect can't refer to the pixel (marker at the border,
            pixel outside the unified view); such rows have NaN depth, they are never dropped.
        dialect: the dialect that was spoken.
        answers: the model's raw texts, one for each pixel; empty for the dense dialect.
        timing_s: seconds spent by stage name.
        shifted: (N,) bool, True where the dialect can't refer to the pixel itself and the depth is that of the nearest
            pixel it can refer to; `pixels` keeps the asked one.
        std_m: (N,) float32 standard deviation of the depth that the model might have said, NaN where there is no
            answer; None, as the four below, where the distribution of the digits wasn't asked for.
        sigma_log: (N,) float32 standard deviation of its natural logarithm.
        greedy_m: (N,) float32 the depth that was said, likeliest digit after likeliest digit.
        median_m: (N,) float32 half of the probability lies on each side.
        mean_m: (N,) float32 expected depth.
    """

    pixels: np.ndarray
    depth_m: np.ndarray
    confidence: np.ndarray
    asked: np.ndarray
    dialect: str
    answers: tuple[str, ...] = ()
    timing_s: dict[str, float] = field(default_factory=dict)
    shifted: np.ndarray | None = None
    std_m: np.ndarray | None = None
    sigma_log: np.ndarray | None = None
    greedy_m: np.ndarray | None = None
    median_m: np.ndarray | None = None
    mean_m: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.pixels)
        if self.shifted is None:
            object.__setattr__(self, "shifted", np.zeros(n, bool))
        if self.pixels.shape != (n, 2):
            raise PixelError(f"pixels have shape {self.pixels.shape}; pass an (N, 2) array of (u, v)")
        optional = [name for name in DISTRIBUTION if getattr(self, name) is not None]
        for name in ("depth_m", "confidence", "asked", "shifted", *optional):
            if getattr(self, name).shape != (n,):
                raise PixelError(f"{name} has shape {getattr(self, name).shape} for {n} pixels; it must be ({n},)")

    @property
    def valid(self) -> np.ndarray:
        """(N,) bool: rows with a depth."""
        return np.isfinite(self.depth_m)

    def __len__(self) -> int:
        return len(self.pixels)
