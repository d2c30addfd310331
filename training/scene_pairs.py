"""Two views of one rendered scene, with what VLM3's and DepthLM's questions about a pair are to be answered.

| task | questions | asked as (`asking`) |
|---|---|---|
| pose | VLM3's four about rotation and translation | pose |
| correspondence | VLM3's, where a pixel of the first image is in the second | correspondence |
| moved | DepthLM's, how far the camera moved | dialogue |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from depthlm_ros.camera import Camera
from depthlm_ros.correspondence import UNITS, correspondence_question
from depthlm_ros.errors import ConfigError, unknown_choice
from depthlm_ros.motion import METRES_MOVED
from depthlm_ros.pose import QUESTIONS, RelativePose
from depthlm_training.raycast import Pose, Scene, render
from depthlm_training.rows import NO_LABELS, BadRow
from depthlm_training.scenes import random_pose, random_scene
from depthlm_training.sources import SPLITS, Example

TASKS = ("pose", "correspondence", "moved")
# VLM3 trains on pairs of which more than a quarter is seen in both images.
LEAST_SHARED = 0.25
# Depths that differ by less are the same surface.
SAME_SURFACE = 0.02
# Second views tried for a first one.
_TRIES = 20
# Directions of at least this share of the way are named; VLM3's sample names -0.69 and +0.72 and leaves out +0.02.
_NAMED = 0.2
_AXES = (("left", "right"), ("up", "down"), ("backward", "forward"))


class ScenePairSource:
    """Pairs of views, the same for the same seed, split and index whoever renders them.

    Args:
        count: how many.
        task: one of `TASKS`.
        seed: of all scenes.
        split: "train" or "held_out".
        cameras: one of them takes both images of a pair.
        points: correspondences of a pair.
        supersample: rays a pixel side for colour.
    """

    def __init__(
        self,
        count: int,
        task: str,
        seed: int,
        split: str,
        cameras: Sequence[Camera],
        points: int = 50,
        supersample: int = 1,
    ) -> None:
        if task not in TASKS:
            raise ConfigError(unknown_choice("task", task, TASKS))
        if split not in SPLITS:
            raise ConfigError(unknown_choice("split", split, SPLITS))
        if count < 1 or points < 1 or not cameras:
            raise ConfigError(
                f"{count} pairs of {points} points with {len(cameras)} cameras; give at least one of each"
            )
        self.name = f"pairs of scenes of seed {seed}, {split}"
        self._key = (seed, SPLITS.index(split), 2)
        self._count, self._task, self._cameras = count, task, tuple(cameras)
        self._points, self._supersample = points, supersample

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        """Renders one pair.

        Raises:
            BadRow: no second view shows enough of what the first one shows.
        """
        if not 0 <= index < self._count:
            raise IndexError(index)
        name = f"{self.name}:{index + 1}"
        rng = np.random.default_rng([*self._key, index])
        scene = random_scene(rng)
        camera = self._cameras[rng.integers(len(self._cameras))]
        first = random_pose(rng, scene)
        image, depth = render(scene, camera, first, self._supersample)
        for _ in range(_TRIES):
            second = _moved(first, rng)
            pixels, places = _shared(scene, camera, (first, depth), second)
            if len(pixels) > LEAST_SHARED * depth.size:
                break
        else:
            raise BadRow(name, NO_LABELS, f"no second view of {_TRIES} shows a quarter of the first")
        other, _ = render(scene, camera, second, self._supersample)
        if self._task == "correspondence":
            rows = np.sort(rng.permutation(len(pixels))[: self._points])
            dialogue = correspondence_dialogue(pixels[rows], places[rows], camera.width, camera.height)
        else:
            relative = relative_pose(first, second)
            dialogue = pose_dialogue(relative) if self._task == "pose" else moved_dialogue(relative.distance_m)
        none = np.zeros((0, 2), np.float32), np.zeros(0, np.float32)
        return Example(name, (image, other), (camera, camera), *none, dialogue)


def relative_pose(first: Pose, second: Pose) -> RelativePose:
    """The second camera as seen from the first."""
    to_first = first.rotation().T
    moved_m = to_first @ (np.asarray(second.position, np.float64) - np.asarray(first.position, np.float64))
    return RelativePose.from_matrix(to_first @ second.rotation(), moved_m)


def pose_dialogue(pose: RelativePose) -> tuple[tuple[str, str], ...]:
    """VLM3's questions with answers worded as in its sample data; of a camera that stayed no direction is asked."""
    answers = {
        "rotation_angle": f"Rotation angle: {pose.rotation_deg:.1f} degrees",
        "euler_natural": f"Yaw={pose.yaw_deg:+.1f}°, Pitch={pose.pitch_deg:+.1f}°, Roll={pose.roll_deg:+.1f}°",
        "translation_distance": f"Translation distance: {pose.distance_m:.2f} meters",
    }
    if np.isfinite(pose.direction).all():
        named = [
            names[int(share > 0)] for share, names in zip(pose.direction, _AXES, strict=True) if abs(share) >= _NAMED
        ]
        vector = ", ".join(f"{share:+.2f}" for share in pose.direction)
        answers["translation_direction"] = f"The camera moves {', '.join(named)}, unit vector ({vector})."
    return tuple((question, answers[name]) for name, question in QUESTIONS.items() if name in answers)


def correspondence_dialogue(
    pixels_a: np.ndarray, pixels_b: np.ndarray, width: int, height: int
) -> tuple[tuple[str, str], ...]:
    """VLM3's question about each pixel (N, 2) of the first image, answered with that of the second, of one size."""
    units = [
        np.clip(np.rint(np.asarray(pixels) / (width, height) * UNITS), 0, UNITS).astype(int).tolist()
        for pixels in (pixels_a, pixels_b)
    ]
    return tuple(
        (correspondence_question(*a), f"The corresponding pixel is ({b[0]}, {b[1]})")
        for a, b in zip(*units, strict=True)
    )


def moved_dialogue(distance_m: float) -> tuple[tuple[str, str], ...]:
    """DepthLM's question; its answer isn't published and is worded like those that are."""
    return ((METRES_MOVED, f"The camera has moved around {distance_m:.2f} meters."),)


def _moved(pose: Pose, rng: np.random.Generator) -> Pose:
    """A place up to about two metres away and a look up to about forty degrees aside."""
    x, y, z = pose.position
    there = (x + rng.normal(0, 0.5), y + rng.normal(0, 0.5), max(z + rng.normal(0, 0.15), 0.3))
    return replace(
        pose, position=there, yaw=pose.yaw + rng.normal(0, 0.25), pitch=pose.pitch + rng.normal(0, 0.08),
        roll=pose.roll + rng.normal(0, 0.04),
    )  # fmt: skip


def _shared(
    scene: Scene, camera: Camera, first: tuple[Pose, np.ndarray], second: Pose
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 2) of the first view that the second shows as well, and their places (N, 2) in it."""
    pose, depth = first
    rows, columns = np.nonzero(np.isfinite(depth))
    pixels = np.stack([columns, rows], axis=1)
    world = camera.unproject(pixels, depth[rows, columns]) @ pose.rotation().T + np.asarray(pose.position)
    seen_from = (world - np.asarray(second.position)) @ second.rotation()
    places = camera.project(seen_from)
    inside = np.flatnonzero(camera.contains(places))
    pixels, places, z_m = pixels[inside], places[inside], seen_from[inside, 2]
    u, v = np.clip(np.rint(places).astype(int), 0, (camera.width - 1, camera.height - 1)).T
    _, other = render(scene, camera, second)
    same = np.abs(other[v, u] - z_m) < SAME_SURFACE * z_m
    return pixels[same], places[same]
