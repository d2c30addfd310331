"""Which sizes of images a checkpoint's own processor keeps, and what it makes of the others.

No torch: who asks a server or another maker's runtime prepares images on machines that may have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Not through AutoImageProcessor: up to transformers 5.14 it can't be had without torchvision.
try:
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
except ModuleNotFoundError:
    # TensorRT-LLM's environment has transformers 4.57, where the same classes have other names.
    from transformers.models.pixtral.image_processing_pixtral import PixtralImageProcessor as PixtralImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil

from depthlm_ros.engines.base import ImageGrid
from depthlm_ros.engines.checkpoint import Checkpoint, load_part, read_json
from depthlm_ros.errors import ImageError

# A camera has one size, and a recording a few.
_REMEMBERED_SIZES = 16


class ImageSizes:
    """Image sizes of one checkpoint.

    Attributes:
        grid: sizes that aren't resampled.
        patch_px: side of one image token's square in pixels.
        vision_patch_px: side of one patch of the vision tower.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        pixtral = checkpoint.architecture == "llava"
        kind = PixtralImageProcessorPil if pixtral else Qwen2VLImageProcessorPil
        self._image_processor = load_part(kind, checkpoint.folder)
        self._shown_hw: dict[tuple[int, int], tuple[int, int]] = {}
        if pixtral:
            self._read_pixtral_sizes(checkpoint.folder, checkpoint.config)
        else:
            self._read_qwen_sizes(checkpoint.folder)

    def shown(self, image: np.ndarray) -> np.ndarray:
        """An (H, W, 3) uint8 RGB image in the size in which the model sees it: itself or resampled.

        For programs of others, whose own processors then find nothing to resample.

        Raises:
            ImageError: another shape or type, or a size that the checkpoint's processor refuses.
        """
        check_image(image)
        size = image.shape[:2]
        shown_hw = self._shown_hw.get(size)
        if shown_hw is None:
            if len(self._shown_hw) >= _REMEMBERED_SIZES:
                self._shown_hw.clear()
            _, (h, w) = self._prepared([image], "np")
            shown_hw = self._shown_hw[size] = h * self.patch_px, w * self.patch_px
        height, width = shown_hw
        if shown_hw == size:
            return image
        resized = Image.fromarray(image).resize((width, height), Image.Resampling(self._image_processor.resample))
        return np.asarray(resized)

    def _prepared(self, images: Sequence[np.ndarray], tensors: str) -> tuple[dict[str, Any], tuple[int, int]]:
        """What the checkpoint's own processor makes of images of one size, as "pt" or "np", and (h, w) image tokens."""
        try:
            made = self._image_processor(images=list(images), return_tensors=tensors, input_data_format="channels_last")
        except ValueError as error:
            raise ImageError(
                f"an image of {images[0].shape[1]}x{images[0].shape[0]} pixels can't be prepared: {error}"
            ) from error
        names = self._image_processor.model_input_names
        return {name: made[name] for name in names if name in made}, self._tokens_hw(made)

    def _read_qwen_sizes(self, folder: Path) -> None:
        processor = self._image_processor
        # Newer checkpoints have them in the file of the whole processor; transformers knows which counts.
        told, _ = type(processor).get_image_processor_dict(folder, local_files_only=True)
        edges = ("shortest_edge", "longest_edge")
        size = {edge: (told.get("size") or {}).get(edge) for edge in edges}
        as_told = size == {edge: processor.size[edge] for edge in edges}
        if not (as_told or None in size.values() or told.keys() & {"min_pixels", "max_pixels"}):
            # transformers 4.57 reads them and then takes Qwen2-VL's all the same, at most 1 MP.
            processor.size = size
            processor.min_pixels, processor.max_pixels = size["shortest_edge"], size["longest_edge"]
        merge = processor.merge_size
        self.patch_px = processor.patch_size * merge
        self.vision_patch_px, self._merge, self._times = processor.patch_size, merge, processor.temporal_patch_size
        self.grid = ImageGrid(self.patch_px, processor.size["shortest_edge"], processor.size["longest_edge"])
        self._tokens_hw: Callable = lambda made: tuple(int(n) // merge for n in made["image_grid_thw"][0][1:])

    def _read_pixtral_sizes(self, folder: Path, config: dict) -> None:
        settings = read_json(folder / "processor_config.json")
        merge = settings.get("spatial_merge_size", config.get("spatial_merge_size", 1))
        self.vision_patch_px, self._merge, self._times = config["vision_config"].get("patch_size", 16), 1, 1
        self.patch_px = self.vision_patch_px * merge
        self._image_processor.patch_size = {"height": self.patch_px, "width": self.patch_px}
        edge = self._image_processor.size["longest_edge"]
        self.grid = ImageGrid(self.patch_px, self.patch_px**2, edge**2, max_edge=edge)
        self._tokens_hw = lambda made: tuple(int(n) // self.patch_px for n in made["image_sizes"][0])


def check_image(image: np.ndarray) -> None:
    """Refuses what is no (H, W, 3) uint8 image.

    Raises:
        ImageError: names its type and shape.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ImageError(f"an image is {image.dtype} of shape {image.shape}; pass (H, W, 3) uint8 RGB")
