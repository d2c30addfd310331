"""Reads photographs from files as 8-bit RGB, whatever they hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from depthlm_ros.errors import ImageError

# What Pillow raises on files that aren't whole pictures; a damaged PNG's chunks are a SyntaxError to it.
UNREADABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError)
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


def read_photograph(path: str | Path, *, upright: bool = False) -> np.ndarray:
    """Reads a picture file.

    Samples of 16 bits keep their high byte, as in `encodings.decode_image`; Pillow's own conversion would clip grey
    ones at 255, which makes the picture white. Alpha is dropped.

    Args:
        path: a png, a jpeg, or what else Pillow reads.
        upright: turn the picture as its EXIF says, as viewers do. Intrinsics of a data set belong to the stored
            rows and columns, so those stay as they are by default.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ImageError: no such file, not a picture, truncated, or samples without a known range (32 bits, float).
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened) if upright else opened
            # Pillow opens a grey png of 16 bits as I;16, before Pillow 11 as I.
            if picture.mode in _SIXTEEN_BITS or (picture.mode == "I" and opened.format == "PNG"):
                picture = Image.fromarray((np.asarray(picture).astype(np.int32) >> 8).astype(np.uint8))
            if picture.mode in ("I", "F"):
                raise ImageError(
                    f"image {path} holds {'32-bit' if picture.mode == 'I' else 'floating point'} samples, whose "
                    "brightness has no known range; save it with 8 or 16 bits a channel"
                )
            return np.array(picture.convert("RGB"))
    except FileNotFoundError as error:
        raise ImageError(f"image {path} does not exist; give the path of a png or jpeg") from error
    except UNREADABLE as error:
        raise ImageError(f"image {path} can't be read ({error}); give a whole png or jpeg") from error
