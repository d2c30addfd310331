"""The vision tower, run lean: pixels of one or many images of one size to image tokens.

The weights are the loaded transformers model's. What doesn't depend on the pixels (learned positions, rotary angles,
windows) is made once for each image size; images are a batch without masks, splits or waiting for the device, so that
shapes are static and a CUDA graph can hold the pass. `MarkedImages` (`marked.py`) are images that differ in a few
pixels only: what they share is computed once.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from depthlm_ros.engines.graphs import Graphed, Recorder
from depthlm_ros.engines.marked import MarkedInputs, SharedStart
from depthlm_ros.engines.processor import ImageInputs
from depthlm_ros.engines.vision_readers import Grid, read_tower

GRIDS = 8  # image sizes that are remembered
# Largest difference from the module, as a share of its largest value, that rounding explains.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}

Encoded = tuple[torch.Tensor, list[torch.Tensor]]


class VisionTower:
    """Images to what the language model reads.

    Args:
        model: the loaded transformers model.
        architecture: "qwen3_vl", "qwen2_5_vl" or "llava".
        lean: False runs the transformers module.

    Attributes:
        lean: whether the lean forward is used.
        reason: how the tower runs and why, one sentence.
        record: what records the pass of a single image; None for CUDA graphs on a GPU and nothing elsewhere.
    """

    def __init__(self, model: PreTrainedModel, architecture: str, *, lean: bool = True) -> None:
        self._model = model
        self._architecture = architecture
        self._grids: dict[tuple[int, int], Grid] = {}
        self._lock = threading.Lock()
        self._shared: SharedStart | None = None
        self._graphs: Graphed | None = None
        self.lean = lean
        self.record: Recorder | None = None
        self.reason = "vision tower: lean" if lean else "vision tower: transformers' own because it was asked for"
        vision = model.config.vision_config
        self._patch_px = vision.patch_size
        self._device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        if lean:
            try:
                self._tower = read_tower(model, architecture)
            except (AttributeError, ValueError) as error:
                self._use_module(f"its parts aren't where they are expected ({error})")

    @torch.inference_mode()
    def __call__(self, tensors: Mapping[str, torch.Tensor], count: int) -> Encoded:
        """Encodes images of one size.

        Args:
            tensors: `ImageInputs.tensors`, on any device.
            count: number of images.

        Returns:
            (count * n, C') image tokens and the DeepStack maps, each of that shape.
        """
        if not self.lean:
            return self._module(tensors, count)
        grid = self._grid(tensors)
        if count > 1:  # enough work for the device to hide what starting it costs
            return self._run(self.embed(tensors, grid).flatten(0, 1), count, grid)
        with self._lock:
            self._graphs = self._graphs or Graphed(self._one, record=self.record)
        tokens, *maps = self._graphs(grid, tensors["pixel_values"].to(self._device, non_blocking=True))
        return tokens, maps

    def _one(self, grid: Grid, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens, maps = self._run(self.embed({"pixel_values": pixels}, grid)[0], 1, grid)
        return (tokens, *maps)

    @torch.inference_mode()
    def encode_marked(self, marked: MarkedInputs | ImageInputs) -> Encoded:
        """Encodes images that differ from one another in a few patches; the same as encoding each of them.

        Args:
            marked: a part of `MarkedImages`; parts of one image share what is the same in all of them.
        """
        if isinstance(marked, ImageInputs):
            return self(marked.tensors, marked.count)
        if not self.lean:
            images = marked.written_out()
            return self._module(images.tensors, images.count)
        if self._shared is None or self._shared.base is not marked.base:
            self._shared = SharedStart(self._tower, marked.base, self._grid(marked.base.tensors), self.embed)
        x, depth = self._shared.start(marked.to(self._device, self._dtype))
        return self._run(x, marked.count, self._shared.grid, depth)

    def embed(self, tensors: Mapping[str, torch.Tensor], grid: Grid) -> torch.Tensor:
        """(B, N, C) embedded patches, in the tower's order."""
        pixels = tensors["pixel_values"].to(self._device, non_blocking=True)
        x = self._tower.embed(self._tower.patches(pixels).to(self._dtype)).view(-1, grid.tokens, self._width)
        if grid.order is not None:
            x = x[:, grid.order]
        return x if grid.position is None else x + grid.position

    @torch.inference_mode()
    def agrees(self, tensors: Mapping[str, torch.Tensor], count: int = 1) -> float:
        """Largest difference between the lean forward and the transformers module, as a share of the largest value.

        Args:
            tensors: `ImageInputs.tensors` of images of one size.
            count: number of images.
        """
        ours, theirs = self(tensors, count), self._module(tensors, count)
        worst = 0.0
        for mine, expected in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
            difference = (mine.float() - expected.float()).abs().max() / expected.float().abs().max()
            worst = max(worst, float("inf") if difference.isnan() else difference.item())
        return worst

    def prove(self, tensors: Mapping[str, torch.Tensor], count: int = 1) -> bool:
        """Runs both ways once; from then on the module is used if they differ by more than rounding.

        Returns:
            Whether the lean forward stays in use; `reason` says why.
        """
        if not self.lean:
            return False
        tolerance = TOLERANCE[self._dtype]
        difference = self.agrees(tensors, count)
        if difference > tolerance:
            self._use_module(f"the lean one differs from it by {difference:.1e}, more than {tolerance:.0e}")
        else:
            self.reason = f"vision tower: lean, within {difference:.0e} of transformers' own"
        return self.lean

    def _run(self, x: torch.Tensor, batch: int, grid: Grid, depth: int = 0) -> Encoded:
        """The layers after the first `depth`, and the mergers: (B * N, C) in the tower's order."""
        maps = []
        for number, layer in enumerate(self._tower.layers, 1):
            if number > depth:
                x = layer(x, batch, grid.turns, grid.windows)
            # Of the layers that marked images share, only the last has an output for all of them: x itself.
            if number >= depth and number - 1 in self._tower.deepstack:
                maps.append(self._tower.deepstack[number - 1](x))
        tokens = self._tower.merge(x)
        if grid.back is not None:
            tokens = tokens.view(batch, -1, tokens.shape[-1])[:, grid.back].flatten(0, 1)
        return tokens, maps

    def _grid(self, tensors: Mapping[str, torch.Tensor]) -> Grid:
        if self._architecture == "llava":
            height, width = tensors["pixel_values"].shape[2:]
            hw = (height // self._patch_px, width // self._patch_px)
        else:
            # The processor's tensors lie in the host's memory, so this waits for nothing.
            hw = tuple(tensors["image_grid_thw"][0, 1:].tolist())
        with self._lock:
            grid = self._grids.pop(hw, None)
            if grid is None:
                if len(self._grids) == GRIDS:
                    del self._grids[next(iter(self._grids))]
                grid = self._tower.grid(hw)
            self._grids[hw] = grid  # the one that was used last is the last
            return grid

    @property
    def _width(self) -> int:
        return self._model.config.vision_config.hidden_size

    def _use_module(self, why: str) -> None:
        self.lean = False
        self.reason = f"vision tower: transformers' own because {why}"

    def _module(self, tensors: Mapping[str, torch.Tensor], count: int) -> Encoded:
        tensors = {name: value.to(self._device) for name, value in tensors.items()}
        features = self._model.model.get_image_features
        if self._architecture == "llava":
            # Pixtral's tower attends over all images at once with a dense mask, so they go one by one.
            one_by_one = [features(**{name: x[i : i + 1] for name, x in tensors.items()}) for i in range(count)]
            return torch.cat([torch.cat(list(out.pooler_output)) for out in one_by_one]), []
        out = features(**tensors)
        maps = out.deepstack_features if self._architecture == "qwen3_vl" else []
        # transformers 5.14 gives whole tensors, 5.23 one for each image.
        return torch.cat(list(out.pooler_output)), [m if isinstance(m, torch.Tensor) else torch.cat(m) for m in maps]
