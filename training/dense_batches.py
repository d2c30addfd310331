"""Micro-batches of dense depth: images as the model is shown them, their labels on the head's map, and talk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from depthlm_ros.cards import ModelCard
from depthlm_ros.engines.base import ImageGrid
from depthlm_ros.engines.processor import ImageInputs
from depthlm_ros.errors import ConfigError
from depthlm_ros.prompts import dense_question
from depthlm_ros.unify import UnifiedView, unify
from depthlm_training.batches import TextBatches, dialogue_processor
from depthlm_training.data import Mixture
from depthlm_training.dense_model import Images
from depthlm_training.dialogues import DialogueProcessor
from depthlm_training.labels import Labels, place_labels
from depthlm_training.packing import IGNORED, Batch, Packed, collate, joined_images, rotary_positions
from depthlm_training.rows import NO_LABELS, UNUSABLE_CAMERA, BadRow
from depthlm_training.sources import Example

# What DepthVLM's stage 2 has the model say to whatever image.
PUBLISHED_REPLY = "OK, I will estimate the depth map of this image."
# Sets the choice of labels apart from other random choices of the same seed.
_LABELS = 23


@dataclass(frozen=True)
class Showing:
    """How images and labels reach the model.

    Attributes:
        card: focal length, whose way "published" is, what depth means.
        policy: how images are brought to the focal length, "published" or "exact".
        grid: sizes that the model's processor leaves alone.
        readout: how labels lie on the map, see `place_labels`.
        labels: most labels of an image, drawn anew each time; 0 for all.
        max_edge_px: longest side of what is shown, the rest is cut off around the centre; 0 for no limit. DepthVLM
            cuts Taskonomy's and HM3D's images to 1024.
    """

    card: ModelCard
    policy: str
    grid: ImageGrid
    readout: str = "exact"
    labels: int = 0
    max_edge_px: int = 0

    def __post_init__(self) -> None:
        if self.card.focal_px is None:
            raise ConfigError(f"the card of {self.card.name} has no focal_px, which depth needs; give a card with one")
        if self.readout == "published" and (self.policy != "published" or self.max_edge_px):
            raise ConfigError("readout 'published' needs policy 'published' and no max_edge_px; use readout 'exact'")

    def view(self, example: Example) -> UnifiedView:
        """What the model is shown of an example's first image.

        Raises:
            BadRow: no camera.
            ImageError, CameraError: as `unify`.
        """
        camera = example.cameras[0]
        if camera is None:
            raise BadRow(example.name, UNUSABLE_CAMERA, "no intrinsics, which depth needs")
        view = unify(example.images[0], camera, self.card.focal_px, self.policy, self.grid, self.card.system)
        return _cut(view, self.max_edge_px, self.grid.multiple) if self.max_edge_px else view

    def label(self, example: Example, view: UnifiedView, map_size: tuple[int, int], k: int, seed: int) -> Labels:
        """The example's labels on a map of (width, height); which of them, if not all, depends on seed and k alone.

        Raises:
            BadRow: none of them is on the view.
        """
        pixels, depth_m = example.pixels, example.depth_m
        if 0 < self.labels < len(depth_m):
            rng = np.random.default_rng([seed, _LABELS, k])
            chosen = np.sort(rng.permutation(len(depth_m))[: self.labels])
            pixels, depth_m = pixels[chosen], depth_m[chosen]
        kind, focal_px = self.card.depth_kind or "z", self.card.focal_px
        labels = place_labels(view, pixels, depth_m, map_size, depth_kind=kind, readout=self.readout, focal_px=focal_px)
        if len(labels) == 0:
            raise BadRow(example.name, NO_LABELS, f"none of {len(depth_m)} labels lies on the view")
        return labels


@dataclass
class DenseBatch:
    """A micro-batch.

    Attributes:
        images: whose depth is learnt.
        labels: of each image.
        talk: questions with answers about other images, or None.
    """

    images: Images
    labels: tuple[Labels, ...]
    talk: Batch | None = None


@dataclass(frozen=True)
class DenseBatches:
    """Makes micro-batch k, the same in every process.

    Attributes:
        mixture: of labelled images.
        showing: how they reach the model.
        folder: of the checkpoint.
        images: in a micro-batch.
        seed: of what is drawn.
        talk: makes the dialogues that are mixed in; None for none.
        reply: instead of those, DepthVLM's constant reply to each of the images.
        tokens_per_row: longest row of those replies.
    """

    mixture: Mixture
    showing: Showing
    folder: Path
    images: int
    seed: int
    talk: TextBatches | None = None
    reply: bool = False
    tokens_per_row: int = 8192

    def __call__(self, k: int) -> DenseBatch:
        """Micro-batch k.

        Raises:
            DatasetError: too many rows are bad.
        """
        processor = dialogue_processor(self.folder, self.showing.card.system_text)
        shown = [self.image(processor, k * self.images + i) for i in range(self.images)]
        inputs, labels = zip(*shown, strict=True)
        talk = None
        if self.reply:
            talk = collate([published_reply(processor, each) for each in inputs], self.tokens_per_row)
        elif self.talk is not None:
            talk = self.talk(k)
        return DenseBatch(stack_images(processor, inputs), labels, talk)

    def image(self, processor: DialogueProcessor, k: int) -> tuple[ImageInputs, Labels]:
        """The image of draw k with its labels, or another where it can't be trained on."""

        def made(_: int, example: Example) -> tuple[ImageInputs, Labels]:
            view = self.showing.view(example)
            inputs = processor.images([view.image])
            height, width = (side * processor.patch_px for side in inputs.grid_hw)
            return inputs, self.showing.label(example, view, (width, height), k, self.seed)

        return self.mixture.made(k, made)


def stack_images(processor: DialogueProcessor, inputs: Sequence[ImageInputs]) -> Images:
    """Rows of chat header and image tokens as the engine's dense pass reads them, the shorter ones padded behind."""
    prompts = [processor.prompts([""], each.grid_hw)[0] for each in inputs]
    ids = [ids[: len(ids) - ids[::-1].index(processor.image_token_id)] for ids in prompts]
    places = [
        rotary_positions(row, processor.image_token_id, [each.grid_hw], processor.mrope)[0]
        for row, each in zip(ids, inputs, strict=True)
    ]
    longest = max(map(len, ids))

    def padded(row: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(row, (0, longest - row.shape[-1]))

    rows = torch.stack([padded(torch.tensor(row)) for row in ids])
    return Images(
        ids=rows,
        positions=torch.stack([padded(row) for row in places], dim=-2),
        is_image=rows == processor.image_token_id,
        pixels=joined_images(list(inputs)),
        grids_hw=tuple(each.grid_hw for each in inputs),
    )


def published_reply(processor: DialogueProcessor, inputs: ImageInputs) -> Packed:
    """DepthVLM's question and its constant reply, supervised as its collator does.

    The collator means to leave out the prompt and counts its tokens before the image is written out, so that only the
    header and the first image tokens are left out; the question after the image is supervised like the reply.

    Raises:
        ConfigError: a chat template without Qwen's tokens.
    """
    start = processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    if start is None or start == processor.tokenizer.unk_token_id:
        raise ConfigError("the published reply is in Qwen's chat format, which this model hasn't; mix in dialogues")
    question, grid_hw = dense_question(), inputs.grid_hw
    whole = processor.published_dialogue(question, PUBLISHED_REPLY, grid_hw)
    # DepthVLM's collator doesn't add DepthLM's empty header at the end.
    ids = torch.tensor(whole[: len(whole) - 1 - whole[::-1].index(start)])
    prompt = processor.prompts([question], grid_hw)[0]
    unexpanded = len(prompt) - prompt.count(processor.image_token_id) + 1
    labels = ids.clone()
    labels[(ids == processor.image_token_id) | (ids == processor.tokenizer.pad_token_id)] = IGNORED
    labels[:unexpanded] = IGNORED
    positions, _ = rotary_positions(ids.tolist(), processor.image_token_id, [grid_hw], processor.mrope)
    segment = torch.zeros_like(ids)
    segment[torch.nonzero(ids == processor.image_token_id)[-1] + 1 :] = 1
    return Packed(ids, labels, positions, segment, (inputs,))


def _cut(view: UnifiedView, edge_px: int, multiple: int) -> UnifiedView:
    """The middle of a view, of sides that the processor leaves alone where the view's were."""
    camera = view.camera
    width, height = (
        side if side <= edge_px else max(edge_px // multiple, 1) * multiple for side in (camera.width, camera.height)
    )
    left, top = (camera.width - width) // 2, (camera.height - height) // 2
    image = np.ascontiguousarray(view.image[top : top + height, left : left + width])
    return replace(view, image=image, camera=camera.cropped(left, top, width, height))
