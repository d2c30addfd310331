"""Antialiased resampling with torch's kernel for bytes: Pillow's bicubic filter in a seventh of Pillow's time.

Where torch isn't installed, as on a robot that runs an exported graph, Pillow itself does it.
"""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

try:
    import torch
except ImportError:
    torch = None

# A product within this much of a whole number of pixels is that number.
_SIZE_TOLERANCE = 1e-5


def resize_bicubic(image: np.ndarray, scale: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    """Resamples an image by exact factors, from its upper left corner.

    The filter is that of Pillow's BICUBIC (a = -0.5, widened when shrinking), with weights of 16 bits where Pillow's
    have 22: of natural images three values in a thousand come out one level apart.

    Args:
        image: (H, W, 3) uint8.
        scale: result pixels per source pixel, across and down.
        size: (width, height) of the result. Where it reaches over the image's edge, the last column and row repeat.

    Returns:
        (height, width, 3) uint8.
    """
    (factor_x, missing_x), (factor_y, missing_y) = (
        _fit(have, s, n) for have, s, n in zip(image.shape[1::-1], scale, size, strict=True)
    )
    if missing_x or missing_y:
        image = cv2.copyMakeBorder(image, 0, missing_y, 0, missing_x, cv2.BORDER_REPLICATE)
    elif not image.flags.writeable:
        # Torch warns of arrays that it could write into and nobody else may.
        image = image.copy()
    if torch is None:
        box = (0, 0, *(min(n / s, have) for n, s, have in zip(size, scale, image.shape[1::-1], strict=True)))
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, box=box))
    tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    made = torch.nn.functional.interpolate(tensor, scale_factor=(factor_y, factor_x), mode="bicubic", antialias=True)
    return np.ascontiguousarray(made[0, :, : size[1], : size[0]].permute(1, 2, 0).numpy())


def _fit(have: int, scale: float, size: int) -> tuple[float, int]:
    """The factor and the pixels to add for which torch, which makes floor(pixels * factor), makes enough."""
    if abs(have * scale - size) < _SIZE_TOLERANCE:
        return (size + _SIZE_TOLERANCE / 10) / have, 0
    missing = 0
    while int((have + missing) * scale) < size:
        missing += 1
    return scale, missing
