"""Scores of every token of a text by transformers' own forward in one go, without any cache: what all paths equal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from depthlm_ros.engines.transformers_engine import TransformersEngine


def plain_scores(engine: TransformersEngine, images: Sequence[np.ndarray], ids: Sequence[int]) -> torch.Tensor:
    """(len(ids), V) float32 scores of the token after each of a text's tokens.

    Args:
        engine: only its `model` and its `processor` are used.
        images: (H, W, 3) uint8 RGB, in the order of their placeholders.
        ids: the text, placeholders and any answer included.
    """
    row = torch.tensor([list(ids)])
    options = _stock_inputs(engine, images)
    if engine.info.architecture != "llava":
        options["mm_token_type_ids"] = (row == engine.processor.image_token_id).int()
    with torch.inference_mode():
        output = engine.model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False, **options)
    return output.logits[0].float()


def _stock_inputs(engine: TransformersEngine, images: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """What a stock processor hands to the model for one row of images."""
    tensors = [engine.processor.images([image]).tensors for image in images]
    if engine.info.architecture != "llava":
        return {name: torch.cat([t[name] for t in tensors]) for name in tensors[0]}
    # PixtralProcessor pads a batch of images to the largest.
    height, width = (max(t["pixel_values"].shape[axis] for t in tensors) for axis in (2, 3))
    pixels = [t["pixel_values"] for t in tensors]
    padded = [torch.nn.functional.pad(p, (0, width - p.shape[3], 0, height - p.shape[2])) for p in pixels]
    return {"pixel_values": torch.cat(padded), "image_sizes": torch.cat([t["image_sizes"] for t in tensors])}
