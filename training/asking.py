"""Examples to questions and answers, and to the images they are about, as the model will be asked later."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Asked:
    """Questions about the same images.

    Attributes:
        images: (H, W, 3) uint8 RGB each, as the model's processor takes them: unified, cropped, marked.
        pairs: questions with their answers.
    """

    images: tuple[np.ndarray, ...]
    pairs: tuple[tuple[str, str], ...]
