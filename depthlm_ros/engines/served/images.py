"""Images as data URLs, each encoded once a frame."""

from __future__ import annotations

import base64
import threading
from collections.abc import Sequence

import cv2
import numpy as np

from depthlm_ros.errors import ImageError

# Edge-LLM refuses more than 32 MiB; what our processors show is far below.
MOST_PIXELS = 16 << 20
MOST_BYTES = 24 << 20
JPEG_QUALITY = 95


class Picture:
    """An image that is encoded when its URL is first asked for, by whichever thread that is.

    Args:
        image: (H, W, 3) uint8 RGB.
        kind: "png" or "jpeg".
    """

    def __init__(self, image: np.ndarray, kind: str) -> None:
        self._image = image
        self._kind = kind
        self._url: bytes | None = None
        self._uses = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> bytes:
        """A data URL.

        Raises:
            ImageError: too many pixels or bytes.
        """
        with self._lock:
            if self._url is None:
                self._url = f"data:image/{self._kind};base64,".encode() + base64.b64encode(self._encode())
            return self._url

    def use(self) -> None:
        """A question will be put about it."""
        self._uses += 1

    def release(self) -> None:
        """A question about it has been answered; after the last one the URL is given up."""
        self._uses -= 1
        if self._uses == 0:
            self._url = None

    def _encode(self) -> bytes:
        height, width = self._image.shape[:2]
        if height * width > MOST_PIXELS:
            raise ImageError(f"an image of {width}x{height} pixels is too large for a server; most are {MOST_PIXELS}")
        if self._kind == "jpeg":
            flags = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
            if hasattr(cv2, "IMWRITE_JPEG_SAMPLING_FACTOR_444"):
                # Colours in full: markers are a few pixels wide. OpenCV 4.5 can't.
                flags += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        else:
            # The server is in the same house: a quick pass beats a small file.
            flags = [cv2.IMWRITE_PNG_COMPRESSION, 1]
        done, encoded = cv2.imencode(".jpg" if self._kind == "jpeg" else ".png", self._image[..., ::-1], flags)
        if not done or encoded.nbytes > MOST_BYTES:
            raise ImageError(
                f"an image of {width}x{height} pixels takes {encoded.nbytes} bytes as {self._kind}; a server takes at "
                f"most {MOST_BYTES}: set server_image to jpeg, or ask about smaller images"
            )
        return encoded.tobytes()


def pictures_of(shown: Sequence[tuple[np.ndarray, ...]], kind: str) -> list[tuple[Picture, ...]]:
    """A picture for each image; the very same array is the very same picture.

    The arrays have to live as long as the list of them does: they are known by where they are.
    """
    known: dict[int, Picture] = {}
    for image in (image for images in shown for image in images):
        if id(image) not in known:
            known[id(image)] = Picture(image, kind)
        known[id(image)].use()
    return [tuple(known[id(image)] for image in images) for images in shown]
