"""Rows of questions and answers in words: this package's own, and those of VLM3's sample files (arXiv 2605.30561)."""

from __future__ import annotations

import numpy as np

from depthlm_ros.camera import Camera
from depthlm_ros.correspondence import correspondence_question
from depthlm_ros.errors import CameraError


def image_files(row: dict) -> list[str]:
    """The images a row names, in the order in which they are shown.

    Raises:
        ValueError: there are none.
    """
    if "image_1" in row:
        return [row["image_1"], row["image_2"]]
    files = row["images"] if "images" in row else [row["image"]]
    if not files:
        raise ValueError("the list of images is empty")
    return files


def dialogue_of(row: dict) -> tuple[tuple[str, str], ...]:
    """(question, answer) pairs of a row.

    VLM3's files hold them as `correspondences` (pixels on [0, 1000] of each image), `qa_pairs` (pose), or `prompt` and
    `answer` (objects).
    """
    if "correspondences" in row:
        both = [(pair["img1_norm_1000"], pair["img2_norm_1000"]) for pair in row["correspondences"]]
        return tuple((correspondence_question(*a), f"The corresponding pixel is ({b[0]}, {b[1]})") for a, b in both)
    if "qa_pairs" in row:
        return tuple((str(pair["question"]), str(pair["answer"])) for pair in row["qa_pairs"])
    if "prompt" in row:
        return ((str(row["prompt"]), str(row["answer"])),)
    return tuple((str(question), str(answer)) for question, answer in row["dialogue"])


def cameras_of(row: dict, images: tuple[np.ndarray, ...]) -> tuple[Camera | None, ...]:
    """The camera of each image, None where the row has no `intrinsics`.

    Raises:
        CameraError: intrinsics that can't be used, or of another size than the image.
    """
    if row.get("intrinsics") is None:
        return (None,) * len(images)
    cameras = tuple(Camera(*values) for values in _each(row["intrinsics"]))
    sizes = [(camera.height, camera.width) for camera in cameras]
    if sizes != [image.shape[:2] for image in images]:
        raise CameraError(f"intrinsics are for (height, width) {sizes}, the images {[i.shape[:2] for i in images]}")
    return cameras


def has_zero_focal(row: dict) -> bool:
    """Whether a focal length is 0 in a row with intrinsics."""
    return any(0 in values[:2] for values in _each(row["intrinsics"]))


def _each(intrinsics: list) -> list:
    return intrinsics if isinstance(intrinsics[0], list) else [intrinsics]
