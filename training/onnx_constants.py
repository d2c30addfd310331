"""What an exported graph knows before it sees an image: normalisation, prompt and angles, read off the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from depthlm_ros.engines.images import ImageReader
from depthlm_ros.errors import ModelError
from depthlm_ros.prompts import dense_question
from depthlm_training.onnx_graph import Constants

if TYPE_CHECKING:
    from depthlm_ros.engines.processor import PromptProcessor
    from depthlm_ros.engines.transformers_engine import TransformersEngine


def check_resampling(processor: PromptProcessor, view: tuple[int, int], size: tuple[int, int]) -> None:
    """Makes sure that a view of another size than the graph's is resampled as `GraphEngine` does it.

    Args:
        processor: of the checkpoint.
        view: (width, height) of what the estimator shows.
        size: (height, width) of the graph's image.

    Raises:
        ModelError: it isn't.
    """
    if view == size[::-1]:
        return
    noise = np.random.default_rng(0).integers(0, 256, (view[1], view[0], 3), dtype=np.uint8)
    ours = np.asarray(Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC))
    if not np.array_equal(ours, processor.shown(noise)):
        raise ModelError(
            f"the image processor resamples {view[0]}x{view[1]} to {size[1]}x{size[0]}, and not bicubically; use "
            "policy exact, which resamples nothing"
        )


def constants_of(engine: TransformersEngine, image: np.ndarray) -> Constants:
    """What the graph of one image size holds.

    Args:
        engine: the checkpoint.
        image: (H, W, 3) uint8 RGB of that size; its pixels don't matter.

    Raises:
        ModelError: the prompt or the processor isn't of the kind that a graph can hold.
    """
    processor, model = engine.processor, engine.model
    inputs = processor.images([image])
    ids = processor.prompts([dense_question()], inputs.grid_hw)[0]
    first = ids.index(processor.image_token_id)
    last = len(ids) - ids[::-1].index(processor.image_token_id)
    if ids[first:last] != [processor.image_token_id] * (inputs.grid_hw[0] * inputs.grid_hw[1]):
        raise ModelError("the image's tokens aren't one block of the prompt; use engine transformers")
    side = processor.vision_patch_px
    bytes_ = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None, None], (256, side, side, 3))
    affine = affine_of(processor.patch_values(bytes_).view(256, 3, -1)[..., 0].numpy())
    if affine is None:
        raise ModelError("the image processor's values aren't affine in the bytes; use engine transformers")
    with torch.no_grad():
        frame = ImageReader(model, processor, engine.info.architecture, lean=False).compose(ids[:last], (inputs,))
        cos, sin = model.model.language_model.rotary_emb(frame.embeds, frame.positions)
    half = cos.shape[-1] // 2
    scale, offset = (torch.tensor(values, dtype=torch.float32) for values in affine)
    return Constants(scale, offset, frame.embeds[0, :first].clone(), cos[0, :, :half].clone(), sin[0, :, :half].clone())


def affine_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(3,) scale and offset that give a processor's values of all bytes, (256, 3); None where it isn't affine."""
    values = values.astype(np.float64)
    scale, offset = (values[255] - values[0]) / 255, values[0]
    off = np.abs(np.arange(256)[:, None] * scale + offset - values).max()
    return (scale, offset) if off <= 1e-6 * np.abs(values).max() else None
