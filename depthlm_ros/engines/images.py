"""Images as the language model reads them: encoded once, whoever asks about them, and placed among the text."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from depthlm_ros.engines.marked import MarkedInputs
from depthlm_ros.engines.processor import ImageInputs, PromptProcessor
from depthlm_ros.engines.vision import Encoded, VisionTower

# Images whose encoding is kept: the newest frame, that before it, and one that is encoded ahead.
KNOWN_IMAGES = 3


@dataclass(frozen=True)
class Composed:
    """What the language model reads first.

    Attributes:
        token_ids: the P ids.
        embeds: (R, P, C), image tokens in place.
        position_ids: (3, R, P) M-RoPE positions; None where there is no M-RoPE.
        next_position: rotary position of what follows.
        deepstack: (R, N, C) for each of the first layers.
        is_image: (R, P) bool.
        image_places: (N,) places of the image tokens.
    """

    token_ids: tuple[int, ...]
    embeds: torch.Tensor
    position_ids: torch.Tensor | None
    next_position: int
    deepstack: list[torch.Tensor]
    is_image: torch.Tensor
    image_places: torch.Tensor

    @property
    def positions(self) -> torch.Tensor:
        """`position_ids`, or (R, P) places one after another where there is no M-RoPE."""
        if self.position_ids is not None:
            return self.position_ids
        return torch.arange(len(self.token_ids), device=self.embeds.device).expand(len(self.embeds), -1)


@dataclass
class Known:
    """An image that was seen before.

    Attributes:
        inputs: its pixels as the tower reads them.
        encoded: its tokens, None until somebody has asked for them.
        ready: when they are, where another CUDA stream makes them.
    """

    inputs: ImageInputs
    encoded: Encoded | None = None
    ready: torch.cuda.Event | None = None


class ImageReader:
    """Prepares, encodes and places images.

    Args:
        model: the loaded model.
        processor: of its checkpoint.
        architecture: "qwen3_vl", "qwen2_5_vl" or "llava".
        lean: whether the tower's lean forward is used.
    """

    def __init__(self, model: PreTrainedModel, processor: PromptProcessor, architecture: str, lean: bool) -> None:
        self.tower = VisionTower(model, architecture, lean=lean)
        self._model = model
        self._processor = processor
        self._architecture = architecture
        self._embed = model.get_input_embeddings()
        self._device = self._embed.weight.device
        self._known: OrderedDict[bytes, Known] = OrderedDict()
        self._lock = threading.Lock()
        self._side: torch.cuda.Stream | None = None

    def prepare(self, image: np.ndarray) -> ImageInputs:
        """The tower's input; the same object for the same pixels as long as they are remembered."""
        key = _digest(image)
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
                return known.inputs
        inputs = self._processor.images([image])
        with self._lock:
            # Another thread may have prepared the same image meanwhile; then all go on with its tensors.
            known = self._known.setdefault(key, Known(inputs))
            while len(self._known) > KNOWN_IMAGES:
                self._known.popitem(last=False)
        return known.inputs

    @torch.inference_mode()
    def encode_ahead(self, image: np.ndarray) -> bool:
        """Encodes the next frame's image beside what runs now; callable from another thread.

        Returns:
            Whether it was begun: on a CPU it would only slow down what runs.
        """
        if self._device.type != "cuda":
            return False
        inputs = self.prepare(image)
        known = self._find(inputs)
        if known is None or known.encoded is not None:
            return known is not None
        if self._side is None:
            self._side = torch.cuda.Stream(self._device)
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            encoded = self.tower(inputs.tensors, inputs.count)
            ready = torch.cuda.Event()
            ready.record(self._side)
        known.ready, known.encoded = ready, encoded
        return True

    def encode(self, inputs: ImageInputs | MarkedInputs) -> Encoded:
        """Image tokens (B * N, C) and DeepStack maps of the same shape."""
        if isinstance(inputs, MarkedInputs):
            return self.tower.encode_marked(inputs)
        known = self._find(inputs)
        if known is None:
            return self.tower(inputs.tensors, inputs.count)
        if known.encoded is None:
            known.encoded = self.tower(inputs.tensors, inputs.count)
        elif known.ready is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(known.ready)
            # Otherwise the memory could be handed out again on the other stream while this one still reads it.
            for tensor in (known.encoded[0], *known.encoded[1]):
                tensor.record_stream(stream)
        return known.encoded

    def forget(self) -> None:
        """Drops what is remembered of images."""
        with self._lock:
            self._known.clear()

    def compose(self, ids: Sequence[int], inputs: Sequence[ImageInputs | MarkedInputs]) -> Composed:
        """Text and image tokens as the language model reads them.

        Args:
            ids: the same for every row.
            inputs: the first image of each row, the second image of each row, ...
        """
        rows = inputs[0].count
        is_token = [token == self._processor.image_token_id for token in ids]
        places = torch.tensor([at for at, image in enumerate(is_token) if image], device=self._device)
        row_ids, row_is_image = torch.tensor([list(ids)]), torch.tensor([is_token])
        encoded = [self.encode(images) for images in inputs]
        tokens = _by_row([image_tokens for image_tokens, _ in encoded], rows)
        deepstack = [_by_row(maps, rows) for maps in zip(*(maps for _, maps in encoded), strict=True)]
        embeds = self._embed(row_ids.to(self._device)).expand(rows, -1, -1)
        embeds = embeds.index_copy(1, places, tokens.to(embeds.dtype))
        position_ids, next_position = None, len(ids)
        if self._architecture != "llava":
            grids = torch.cat([_tensors(images)["image_grid_thw"][:1] for images in inputs])
            # On the host: sizes become Python numbers in there, and the device would be waited for.
            position_ids, _ = self._model.model.get_rope_index(
                row_ids, mm_token_type_ids=row_is_image.int(), image_grid_thw=grids.cpu()
            )
            next_position = int(position_ids.max()) + 1
            position_ids = position_ids.to(self._device).expand(-1, rows, -1)
        is_image = row_is_image.to(self._device).expand(rows, -1)
        return Composed(tuple(ids), embeds, position_ids, next_position, deepstack, is_image, places)

    def _find(self, inputs: ImageInputs) -> Known | None:
        with self._lock:
            return next((known for known in self._known.values() if known.inputs is inputs), None)


def _tensors(inputs: ImageInputs | MarkedInputs) -> dict[str, torch.Tensor]:
    return inputs.base.tensors if isinstance(inputs, MarkedInputs) else inputs.tensors


def _by_row(features: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
    """Features (rows * N_k, C) of the k-th images to (rows, sum of N_k, C): each row's images after one another."""
    parts = [f.view(rows, -1, f.shape[-1]) for f in features]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _digest(image: np.ndarray) -> bytes:
    digest = hashlib.blake2b(np.ascontiguousarray(image), digest_size=16)
    digest.update(repr((image.shape, image.dtype.str)).encode())
    return digest.digest()
