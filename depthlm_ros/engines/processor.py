"""Images and questions to tensors, with no torchvision: tokenizer, PIL image processor, placeholders.

The stock processors of these models import torchvision for videos that we never have. What is left
for images is small: the checkpoint's own chat template, its own image processor (PIL backend, the
same on every machine), and one placeholder token repeated for each image token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from transformers import AutoTokenizer

from depthlm_ros.engines.checkpoint import Checkpoint, load_part, read_json
from depthlm_ros.engines.image_sizes import ImageSizes, check_image
from depthlm_ros.errors import EngineError, ImageError, ModelError

PROBE = "how far is (17, 1948)?"
# Qwen's processors refuse longer strips; the checkpoint's own processor says so.
ASPECT = 200
MOST_EDGE = 1 << 20


@dataclass(frozen=True)
class ImageInputs:
    """Images of one size, ready for the vision tower.

    Attributes:
        tensors: keyword arguments of the model's `get_image_features`.
        grid_hw: (h, w) image tokens of each image.
        count: number of images.
    """

    tensors: dict[str, torch.Tensor]
    grid_hw: tuple[int, int]
    count: int


class PromptProcessor(ImageSizes):
    """Turns images and questions into what one architecture expects.

    Attributes:
        tokenizer: the checkpoint's own.
        image_token_id: the placeholder.
        shortcut: whether images of `grid` are prepared by our own pass, bit for bit as by the checkpoint's processor.
    """

    def __init__(self, checkpoint: Checkpoint, system_text: str | None = None) -> None:
        super().__init__(checkpoint)
        folder, config = checkpoint.folder, checkpoint.config
        self.tokenizer = load_part(AutoTokenizer, folder)
        self._template = _chat_template(folder) or self.tokenizer.chat_template
        self._set_system(system_text)
        if checkpoint.architecture == "llava":
            self._read_pixtral_tokens(folder)
        else:
            self.image_token_id = config["image_token_id"]
            self._placeholders: Callable = lambda grid_hw: [self.image_token_id] * (grid_hw[0] * grid_hw[1])
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        self._check_template(checkpoint.name)
        self.shortcut = False
        self._table = self._values_of_bytes()
        self.shortcut = self._table is not None

    def images(self, images: Sequence[np.ndarray], device: torch.device | None = None) -> ImageInputs:
        """Prepares (H, W, 3) uint8 RGB images of one size.

        Args:
            images: whatever their size; those that aren't of `grid` are resampled as the checkpoint's processor does.
            device: a CUDA device to prepare them on, from bytes in pinned memory; None prepares them on the host.

        Raises:
            ImageError: another shape or type, or images of several sizes.
        """
        for image in images:
            check_image(image)
        if len({image.shape for image in images}) != 1:
            raise ImageError(
                f"{len(images)} images of sizes {sorted({i.shape[:2] for i in images})}; pass images of one size"
            )
        height, width = images[0].shape[:2]
        if self.keeps(height, width):
            sides = (height // self.patch_px, width // self.patch_px)
            return ImageInputs(self._from_bytes(images, device), sides, len(images))
        return self._stock(images)

    def keeps(self, height: int, width: int) -> bool:
        """Whether images of this size are prepared without resampling, by our own pass."""
        grid = self.grid
        return (
            self.shortcut
            and height % grid.multiple == width % grid.multiple == 0
            and grid.min_pixels <= height * width <= grid.max_pixels
            and max(height, width) <= min(grid.max_edge or MOST_EDGE, ASPECT * min(height, width))
        )

    def patch_row(self, row: int, column: int, width: int) -> int:
        """Place of the vision tower's patch at this row and column among the patches of an image so wide."""
        merge, across = self._merge, width // self.vision_patch_px
        block = row // merge * (across // merge) + column // merge
        return block * merge * merge + row % merge * merge + column % merge

    def patch_values(self, squares: np.ndarray) -> torch.Tensor:
        """(T, side, side, 3) uint8 patches of the vision tower to (T, values of a patch), as in `images`."""
        planes = cv2.LUT(np.ascontiguousarray(squares).reshape(-1, squares.shape[1], 3), self._table.T[None].copy())
        values = torch.from_numpy(planes).view(squares.shape).permute(0, 3, 1, 2)
        return values[:, :, None].expand(-1, -1, self._times, -1, -1).flatten(1)

    def _stock(self, images: Sequence[np.ndarray]) -> ImageInputs:
        """What the checkpoint's own processor makes of them."""
        tensors, grid_hw = self._prepared(images, "pt")
        return ImageInputs(tensors, grid_hw, len(images))

    def _values_of_bytes(self) -> np.ndarray | None:
        """(3, 256) float32: what the checkpoint's processor makes of each byte of each channel.

        Read off its own output for a ramp, and proved on noise; None where it does more to an image than that.
        """
        multiple = self.grid.multiple
        side = max(2, -(-int(np.ceil(self.grid.min_pixels**0.5)) // multiple)) * multiple
        shape = (side, side + multiple, 3)
        ramp = (np.arange(np.prod(shape)) // 3 % 256).astype(np.uint8).reshape(shape)
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        shown = self._stock([ramp]).tensors["pixel_values"]
        # The ramp's bytes and their channels in the layout of the tensors say which value belongs to which.
        layout, places = self._blank(1, side, side + multiple, torch.uint8)
        channels, channel_places = self._blank(1, side, side + multiple, torch.uint8)
        if layout.shape != shown.shape:
            return None
        for channel in range(3):
            places[:, channel] = torch.from_numpy(ramp[..., channel].reshape(places.shape[3:]))
            channel_places[:, channel] = channel
        table = np.zeros((3, 256), np.float32)
        table[channels.numpy().ravel(), layout.numpy().ravel()] = shown.numpy().ravel()
        self._table = table
        ours, theirs = self._from_bytes([ramp, noise], None), self._stock([ramp, noise]).tensors
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        return table if same else None

    def _from_bytes(self, images: Sequence[np.ndarray], device: torch.device | None) -> dict[str, torch.Tensor]:
        height, width = images[0].shape[:2]
        if device is not None and device.type == "cuda":
            # A quarter of the bytes, or an eighth where they come twice, cross the bus.
            planes = torch.from_numpy(np.stack(images)).permute(3, 0, 1, 2).contiguous().pin_memory()
            planes = planes.to(device, non_blocking=True).int()
            table = torch.from_numpy(self._table).pin_memory().to(device, non_blocking=True)
            pixels, places = self._blank(len(images), height, width, table.dtype, device)
            for channel, plane in enumerate(planes):
                places[:, channel] = table[channel][plane].view(len(images), 1, *places.shape[3:])
        else:
            pixels, places = self._blank(len(images), height, width, torch.float32)
            for image, own in zip(images, places, strict=True):
                for plane, values, place in zip(cv2.split(image), self._table, own, strict=True):
                    place.copy_(torch.from_numpy(cv2.LUT(plane, values)).view(place.shape[1:]))
        side = self.vision_patch_px
        if self._times == 1:
            return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]] * len(images))}
        grids = torch.tensor([[1, height // side, width // side]] * len(images))
        return {"pixel_values": pixels, "image_grid_thw": grids}

    def _blank(
        self, count: int, height: int, width: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """An empty `pixel_values`, and its view (B, 3, times, h, merge, side, w, merge, side) for an image's planes."""
        side, merge, times = self.vision_patch_px, self._merge, self._times
        h, w = height // (side * merge), width // (side * merge)
        if times == 1:
            pixels = torch.empty(count, 3, height, width, dtype=dtype, device=device)
            return pixels, pixels.view(count, 3, 1, h, 1, side, w, 1, side)
        places = torch.empty(count, h, w, merge, merge, 3, times, side, side, dtype=dtype, device=device)
        pixels = places.view(count * h * w * merge * merge, -1)
        return pixels, places.permute(0, 5, 6, 1, 3, 7, 2, 4, 8)

    def prompts(self, questions: Sequence[str], *grids_hw: tuple[int, int]) -> list[list[int]]:
        """Token ids of the whole prompt for each question: header, image tokens, question, answer header.

        Args:
            questions: texts that follow the images.
            grids_hw: `ImageInputs.grid_hw` of each image, in their order.

        Raises:
            EngineError: the prompt hasn't one placeholder for each image.
        """
        texts = self._chat_texts(questions, len(grids_hw))
        bos = self.tokenizer.bos_token
        encoded = self.tokenizer(texts, add_special_tokens=not (bos and texts[0].startswith(bos)))["input_ids"]
        placeholders = [self._placeholders(grid_hw) for grid_hw in grids_hw]
        return [self._expand(ids, placeholders) for ids in encoded]

    def expanded_text(self, question: str, *grids_hw: tuple[int, int]) -> str:
        """The prompt as text with its placeholders written out, as the stock processors build it."""
        header, *parts = self._chat_text(question, len(grids_hw)).split(self.image_token)
        written = ["".join(self.tokenizer.convert_ids_to_tokens(self._placeholders(grid))) for grid in grids_hw]
        return header + "".join(tokens + part for tokens, part in zip(written, parts, strict=True))

    def prompt_texts(self, questions: Sequence[str], images: int = 1) -> list[str]:
        """Prompts as texts with one placeholder an image, for programs that write placeholders out themselves."""
        return self._chat_texts(questions, images)

    def _chat_texts(self, questions: Sequence[str], images: int) -> list[str]:
        """`_chat_text` of each question; the template is rendered for a few of them where it only frames a text."""
        if len(questions) < 4:
            return [self._chat_text(question, images) for question in questions]
        before, _, after = self._chat_text(PROBE, images).partition(PROBE)
        # Templates may strip a text or branch on it, which shows in those that are rendered.
        framed = all(self._chat_text(q, images) == before + q + after for q in (questions[0], questions[-1]))
        return [
            before + question + after if framed and question == question.strip() else self._chat_text(question, images)
            for question in questions
        ]

    def _chat_text(self, question: str, images: int = 1) -> str:
        # Pixtral's template reads a text item's `content`, the others read its `text`.
        text = {"type": "text", "text": question, "content": question}
        messages = [{"role": "user", "content": [{"type": "image"}] * images + [text]}]
        if self._system_content is not None:
            messages.insert(0, {"role": "system", "content": self._system_content})
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )

    def _expand(self, ids: list[int], placeholders: Sequence[list[int]]) -> list[int]:
        places = [at for at, token in enumerate(ids) if token == self.image_token_id]
        if len(places) != len(placeholders):
            raise EngineError(
                f"the prompt has {len(places)} placeholders {self.image_token} for {len(placeholders)} images; leave "
                "the text of the placeholder out of the question"
            )
        whole, start = [], 0
        for at, tokens in zip(places, placeholders, strict=True):
            whole += ids[start:at] + tokens
            start = at + 1
        return whole + ids[start:]

    def _set_system(self, text: str | None) -> None:
        """Writes the system message in the form that the template reads."""
        self._system_content = None
        if text is None or self._template is None:
            return
        self._system_content = [{"type": "text", "text": text, "content": text}]
        try:
            if text in self._chat_text(PROBE):
                return
        except TypeError:
            pass
        # The template of Pixtral 12B adds it to other text, so that it must be a text itself.
        self._system_content = text
        if text not in self._chat_text(PROBE):
            raise ModelError(f"the chat template leaves out the system text {text!r}; use a card with system_text null")

    def _check_template(self, name: str) -> None:
        if self._template is None:
            raise ModelError(f"{name} has no chat template; add chat_template.jinja to the folder")
        text = self._chat_text(PROBE)
        if PROBE not in text or text.count(self.image_token) != 1:
            raise ModelError(f"{name}: the chat template must write one {self.image_token} and the question: {text!r}")
        if text.index(self.image_token) > text.index(PROBE):
            raise ModelError(f"{name}: the chat template puts the question before the image: {text!r}")

    def _read_pixtral_tokens(self, folder: Path) -> None:
        settings = read_json(folder / "processor_config.json")
        written = [settings.get(key, default) for key, default in PIXTRAL_TOKENS.items()]
        image, line_break, end = self.tokenizer.convert_tokens_to_ids(written)
        self.image_token_id = image

        def placeholders(grid_hw: tuple[int, int]) -> list[int]:
            rows = ([image] * grid_hw[1] + [line_break]) * grid_hw[0]
            return rows[:-1] + [end]

        self._placeholders = placeholders


# Defaults of transformers' PixtralProcessor.
PIXTRAL_TOKENS = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}


def _chat_template(folder: Path) -> str | None:
    # Older processors keep their template apart from the tokenizer's; it is the one they were trained with.
    if (folder / "chat_template.jinja").is_file():
        return None
    return read_json(folder / "chat_template.json").get("chat_template")
