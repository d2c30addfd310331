"""Pictures to be asked about. No torch in here."""

from __future__ import annotations

import numpy as np
from PIL import Image


def synthetic_image(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A picture of soft blobs and fine grain; (H, W, 3) uint8 RGB."""
    drawn = np.random.default_rng(seed)
    coarse = Image.fromarray(drawn.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return np.clip(soft + drawn.normal(0, 8, soft.shape), 0, 255).astype(np.uint8)
