"""Runs Qwen3-VL, Qwen2.5-VL and Pixtral checkpoints with plain transformers, on a CPU or a GPU.

A frame costs one `prefill` (vision tower, chat header, image tokens, what all questions share) and
one `decode` for each batch of questions. The dense dialect is a `prefill` of the image alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from depthlm_ros.engines.answering import Answering, Work
from depthlm_ros.engines.answers import AnswerReader
from depthlm_ros.engines.base import Answer, EngineInfo, ImageGrid
from depthlm_ros.engines.batches import Batch, PlainPrefix, shared_length
from depthlm_ros.engines.cascade import Measured
from depthlm_ros.engines.checkpoint import Checkpoint, open_checkpoint
from depthlm_ros.engines.decoder import Decoder
from depthlm_ros.engines.dense import DensePass
from depthlm_ros.engines.dense_head import MLPDepthHead, head_features, load_head, unsupported_head
from depthlm_ros.engines.devices import choose_placement, keep_freed_memory
from depthlm_ros.engines.dpt_head import DPTDepthHead
from depthlm_ros.engines.fast import FastPath
from depthlm_ros.engines.images import Composed, ImageReader
from depthlm_ros.engines.keys import Prefix
from depthlm_ros.engines.loading import load_model
from depthlm_ros.engines.marked import Block, MarkedImages, MarkedInputs
from depthlm_ros.engines.plain import PlainPath
from depthlm_ros.engines.planner import LARGEST_GROUP, Planner, attempt, out_of_memory
from depthlm_ros.engines.processor import ImageInputs, PromptProcessor
from depthlm_ros.engines.vision import TOLERANCE
from depthlm_ros.errors import DialectError, EngineError, ModelError

# Questions that the plain path answers together, and the most images on a GPU, where nobody says otherwise.
PLAIN_BATCH = 64
# Images that go through the vision tower together on a CPU; more don't fit its caches.
CPU_IMAGES = 8


class TransformersEngine:
    """Answers questions about images and runs the dense head. Not re-entrant: one caller at a time.

    Attributes:
        info: what was loaded and why so.
        grid: image sizes that the processor leaves alone.
        model: the transformers model, in evaluation mode.
        processor: images and questions to tensors.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: PromptProcessor,
        info: EngineInfo,
        *,
        head: MLPDepthHead | DPTDepthHead | None = None,
        head_mode: str = "llm_last",
        no_head: str = "",
        batch_size: int = 0,
        plain: bool = False,
    ) -> None:
        self.model = model
        self.processor = processor
        self.info = info
        self.grid: ImageGrid = processor.grid
        self.complaints: tuple[str, ...] = ()
        self.deadline: float | None = None
        self._head = head
        self._head_mode = head_mode
        self._no_head = no_head
        self._batch_size = batch_size or PLAIN_BATCH
        self._device = next(model.parameters()).device
        self._reader = AnswerReader(processor.tokenizer)
        self._stop_ids = _stop_ids(model, processor)
        self._dtype = model.get_input_embeddings().weight.dtype
        # Of images that go through the model together, all channels; less once memory has run out.
        self._most_values = sys.maxsize
        penalty = float(model.generation_config.repetition_penalty or 1.0)
        self._plain = PlainPath(model, info.architecture, self._stop_ids, penalty)
        self._decoder: Decoder | None = None
        self._answering: Answering | None = None
        self._fast: FastPath | None = None
        self._dense: DensePass | None = None
        self._images = ImageReader(model, processor, info.architecture, lean=not plain)
        if not plain:
            try:
                self._decoder = Decoder(model, info.architecture, Measured(self._device), Measured(self._device))
            except EngineError as error:
                self._tell(f"answers by transformers' own forward, which is slow: {error}")
        if self._decoder is not None:
            planner = _planner(self._decoder, self._device, batch_size)
            self._answering = Answering(self._decoder, planner, self._stop_ids, penalty)
            self._fast = FastPath(self._answering, processor.tokenizer, self._tell)
            if head is not None:
                self._dense = DensePass(self._decoder, head, head_mode)

    @property
    def plain(self) -> bool:
        """Whether questions take the plain path."""
        return self._answering is None

    @property
    def work(self) -> Work:
        """What the last questions took."""
        return Work() if self._answering is None else self._answering.work

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        system_text: str | None = None,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        attn: str | None = None,
        batch_size: int = 0,
        plain: bool = False,
    ) -> TransformersEngine:
        """Loads a folder or hub id; arguments and errors as in `load_engine`."""
        checkpoint = open_checkpoint(source, revision)
        placement = choose_placement(device, dtype, checkpoint.parameters)
        if placement.device.type == "cpu":
            keep_freed_memory()
        processor = PromptProcessor(checkpoint, system_text)
        model = load_model(checkpoint, placement, attn or "sdpa")
        head, mode, no_head = None, "llm_last", f"{checkpoint.name} has no depth head"
        if checkpoint.has_dense_head:
            no_head = unsupported_head(checkpoint) or ""
            if not no_head:
                width = model.config.get_text_config().hidden_size
                head, mode = load_head(checkpoint, width, _deepstack_maps(checkpoint), processor.patch_px)
                head.to(placement.device)
        info = EngineInfo(
            engine="transformers",
            model=checkpoint.name,
            architecture=checkpoint.architecture,
            device=str(placement.device),
            dtype=placement.dtype_name,
            reasons=placement.reasons,
            parameters=checkpoint.parameters,
            dense=head is not None,
        )
        engine = cls(model, processor, info, head=head, head_mode=mode, no_head=no_head, batch_size=batch_size,
                     plain=plain)  # fmt: skip
        if not plain:
            engine.prove()
        return engine

    def answer_shared(
        self,
        image: np.ndarray,
        questions: Sequence[str],
        max_new_tokens: int,
        *,
        expects: str | None = None,
        distribution: bool = False,
        guesses: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Answers many questions about one image; `answer_about` with a single image."""
        return self.answer_about(
            [image], questions, max_new_tokens, expects=expects, distribution=distribution, guesses=guesses
        )

    @torch.inference_mode()
    def answer_about(
        self,
        images: Sequence[np.ndarray],
        questions: Sequence[str],
        max_new_tokens: int,
        *,
        expects: str | None = None,
        distribution: bool = False,
        guesses: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Answers many questions about the same images, which are encoded and prefilled once.

        Args:
            images: one or more (H, W, 3) uint8 RGB of any sizes, shown in this order before the text;
                resampled only where a size isn't of `grid`.
            questions: texts; what they share at their beginning is prefilled once too.
            max_new_tokens: longest answer in tokens.
            expects: the sentence that the model was trained to answer with, "{number}" where each number stands and
                "{same}" where the one before is repeated. It only saves time: what the model says is what counts.
                One that the tokenizer doesn't keep apart from its number is left out, and `info.reasons` says so.
            distribution: also give the distribution of each answer's number.
            guesses: the number that each answer probably holds, "" for none; checked like `expects`, which it needs.

        Returns:
            Greedy answers in the order of the questions, the same tokens as `model.generate` gives
            for each question alone.

        Raises:
            ImageError: not an RGB image.
            EngineError: no image, or out of memory.
        """
        if not questions:
            return []
        if not images:
            raise EngineError("0 images for the questions; give at least one")
        self._start_work()
        with _clear_errors(self.info, self._batch_size):
            inputs = [self._images.prepare(image) for image in images]
            prompts = self.processor.prompts(questions, *(image.grid_hw for image in inputs))
            return self._answer(inputs, prompts, max_new_tokens, expects, distribution, guesses)

    @torch.inference_mode()
    def answer_each(
        self,
        images: Sequence[np.ndarray],
        questions: Sequence[str],
        max_new_tokens: int,
        *,
        expects: str | None = None,
        distribution: bool = False,
    ) -> list[Answer]:
        """Answers question i about image i; images of one size are prefilled together.

        Arguments as in `answer_about`.

        Raises:
            ImageError: not an RGB image.
            EngineError: out of memory, or as many images as questions weren't given.
        """
        if len(images) != len(questions):
            raise EngineError(f"{len(images)} images and {len(questions)} questions; give one image a question")
        answers: dict[int, Answer] = {}
        self._start_work()
        with _clear_errors(self.info, self._batch_size):
            for same_size in self._by_size(images):

                def answer(part: slice, same_size: list[int] = same_size) -> list[Answer]:
                    rows = same_size[part]
                    inputs = self.processor.images([images[row] for row in rows])
                    prompts = self.processor.prompts([questions[row] for row in rows], inputs.grid_hw)
                    return self._answer([inputs], prompts, max_new_tokens, expects, distribution)

                some = self._in_parts(len(same_size), self._batch_size, images[same_size[0]], answer)
                answers.update(zip(same_size, some, strict=True))
        return [answers[row] for row in range(len(questions))]

    @torch.inference_mode()
    def answer_marked(
        self,
        image: np.ndarray,
        blocks: Sequence[Block],
        questions: Sequence[str],
        max_new_tokens: int,
        *,
        expects: str | None = None,
        distribution: bool = False,
    ) -> list[Answer]:
        """Answers question i about the image with block i in it: `answer_each`, sharing what the images share.

        Args:
            image: (H, W, 3) uint8 RGB.
            blocks: (top, left, (h, w, 3) uint8 pixels) of each, inside of the image.
            questions: as many.
            max_new_tokens: longest answer in tokens.
            expects: as in `answer_about`.
            distribution: as in `answer_about`.

        Raises:
            ImageError: not an RGB image, or a block that isn't inside of it.
            EngineError: out of memory, or as many blocks as questions weren't given.
        """
        if len(blocks) != len(questions):
            raise EngineError(f"{len(blocks)} marked images and {len(questions)} questions; give one block a question")
        self._start_work()
        with _clear_errors(self.info, self._batch_size):
            marked = MarkedImages(self.processor, image, blocks)

            def answer(part: slice) -> list[Answer]:
                inputs = marked.part(part.start, part.stop)
                prompts = self.processor.prompts(questions[part], inputs.grid_hw)
                return self._answer([inputs], prompts, max_new_tokens, expects, distribution)

            return self._in_parts(len(blocks), self._images_at_once(image), image, answer)

    @torch.inference_mode()
    def depth_map(self, image: np.ndarray, question: str = "") -> np.ndarray:
        """The dense head's map, from one pass over chat header and image tokens.

        The language model is causal and the question follows the image, so it can't change the map
        (DepthVLM's own pass carries it all the same); neither LM head nor cache is needed.

        Args:
            image: (H, W, 3) uint8 RGB.
            question: ignored, see above.

        Returns:
            (H', W') float32 metres; H', W' = the processor's final size.

        Raises:
            DialectError: the checkpoint has no head that we can run.
        """
        if self._head is None:
            raise DialectError(f"{self._no_head}: it does not speak the dense dialect; use a text dialect")
        with _clear_errors(self.info, 1):
            inputs = self._images.prepare(image)
            return self.depth_of(self.processor.prompts([question], inputs.grid_hw)[0], inputs)

    @torch.inference_mode()
    def depth_of(self, ids: Sequence[int], inputs: ImageInputs) -> np.ndarray:
        """The dense head's map for a prompt that is prepared already.

        Args:
            ids: the whole prompt or its beginning; what follows the image isn't read.
            inputs: one image.

        Returns:
            (H', W') float32 metres, computed in float32 whatever the format of the model's weights.
        """
        last = len(ids) - ids[::-1].index(self.processor.image_token_id)
        if self._dense is not None:
            return self._dense(self._images.compose(ids[:last], (inputs,)), inputs.grid_hw).cpu().numpy()
        features = self.image_features(ids[:last], inputs)
        return self._head(features[0].float(), inputs.grid_hw).cpu().numpy()

    def image_features(self, ids: Sequence[int], inputs: ImageInputs) -> torch.Tensor:
        """What the dense head reads, as its feature mode says.

        Args:
            ids: chat header and image tokens; more may follow.
            inputs: the images.

        Returns:
            (B, N, C) features at the image tokens, row-major over the token grid; (B, 4, N, C) for a DPT head.
        """
        frame = self._images.compose(ids, (inputs,))
        if self._decoder is None:
            hidden = self._plain.forward(frame.embeds, frame.position_ids, frame.deepstack, frame.is_image, None)
        else:
            _, hidden = self._prefill(frame, hidden=True)
        return head_features(self._head_mode, frame.deepstack, hidden[:, frame.image_places])

    def prefill(self, ids: Sequence[int], *inputs: ImageInputs | MarkedInputs) -> Prefix:
        """Runs the vision tower and the language model over what all questions share.

        Args:
            ids: chat header, image tokens and the beginning of the questions, the same for each row.
            inputs: the first image of each row, the second image of each row, ...; one row for all questions, or
                one for each.
        """
        return self._prefill(self._images.compose(ids, inputs))[0]

    def plain_prefill(self, ids: Sequence[int], *inputs: ImageInputs | MarkedInputs) -> PlainPrefix:
        """`prefill` by the plain path."""
        frame, cache = self._images.compose(ids, inputs), DynamicCache()
        self._plain.forward(frame.embeds, frame.position_ids, frame.deepstack, frame.is_image, cache)
        return PlainPrefix(cache, tuple(ids), frame.next_position)

    @torch.inference_mode()
    def next_logits(self, ids: Sequence[int], split: int, *inputs: ImageInputs | MarkedInputs) -> torch.Tensor:
        """(R, V) float32 scores of the token that follows whole prompts, for comparing paths with one another.

        Args:
            ids: the whole prompt, the same for each row.
            split: how much of it is prefilled; the rest is a question's own.
            inputs: as in `prefill`.
        """
        rest = [ids[split:]] * inputs[0].count
        if self._answering is None:
            prefix = self.plain_prefill(ids[:split], *inputs)
            return self._plain.next_logits(Batch(prefix, rest, self._device))
        own = self._answering.room(len(rest), len(rest[0]))
        prefix = self.prefill(ids[:split], *inputs)
        hidden = self._decoder.extend(torch.tensor(rest, device=self._device), prefix, own, slice(0, len(rest)))
        return self._answering.scored(hidden)[:, -1]

    @torch.inference_mode()
    def prove(self) -> None:
        """Compares the fast path with transformers' own on a small image, and leaves it where they differ.

        What was found is added to `info.reasons`.
        """
        if self._answering is None:
            return
        side = 4 * self.processor.patch_px
        image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        inputs = self.processor.images([image])
        ids = self.processor.prompts(["How far is (17, 1948)?"], inputs.grid_hw)[0]
        self._images.tower.prove(inputs.tensors)
        fast = self.next_logits(ids, len(ids) - 6, inputs)
        answering, self._answering = self._answering, None
        plain = self.next_logits(ids, len(ids) - 6, inputs)
        difference = float((fast - plain).abs().max() / plain.abs().max())
        if difference <= TOLERANCE[self._dtype]:
            self._answering = answering
            told = f"answers by the lean decoder, its scores within {difference:.0e} of transformers' own"
        else:
            self._decoder = self._dense = None
            told = (
                f"answers by transformers' own forward, which is slow: the lean decoder's scores differ by "
                f"{difference:.1e}"
            )
        self.info = replace(self.info, reasons=(*self.info.reasons, self._images.tower.reason, told))

    def warm_up(self, width: int, height: int) -> None:
        """Runs once at this size, so that the first frame doesn't pay for what is set up lazily.

        Which attention is the fastest is measured on the way, see `attention`.
        """
        image = np.zeros((height, width, 3), np.uint8)
        if self._head is not None:
            self.depth_map(image)
        self.answer_shared(image, ["", "How far?"], 2)
        self._images.forget()

    @property
    def attention(self) -> str:
        """Which attention was found to be the fastest at the shapes that came so far, in words."""
        if self._decoder is None:
            return "attention: transformers' own"
        prefix, own = self._decoder.prefix_attention, self._decoder.own_attention
        return f"to the prefix: {prefix.told()}. To itself: {own.told()}"

    def encode_ahead(self, image: np.ndarray) -> bool:
        """Encodes the next frame beside what runs now, on a GPU; may be called from another thread.

        Returns:
            Whether it was begun.
        """
        return self._images.encode_ahead(image)

    def forget(self) -> None:
        """Drops what is remembered of the last images; a benchmark does so before each round."""
        self._images.forget()

    def close(self) -> None:
        """Frees the model's memory; the engine can't be used afterwards."""
        del self.model, self._head, self._plain, self._decoder, self._answering, self._fast
        del self._dense, self._images
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _start_work(self) -> None:
        if self._answering is not None:
            self._answering.work = Work()

    def _answer(
        self,
        inputs: Sequence[ImageInputs | MarkedInputs],
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        expects: str | None,
        distribution: bool,
        guesses: Sequence[str] | None = None,
    ) -> list[Answer]:
        shared = shared_length(prompts)
        suffixes = [ids[shared:] for ids in prompts]
        if self._answering is None:
            if distribution:
                raise EngineError(
                    "the plain path gives no distribution of numbers; ask without it, or load the model without "
                    "plain=True (the engine's reasons say whether it was left for another one)"
                )
            return self._answer_plainly(self.plain_prefill(prompts[0][:shared], *inputs), suffixes, max_new_tokens)
        prefix = self.prefill(prompts[0][:shared], *inputs)
        rows = self._fast.answer(prefix, suffixes, max_new_tokens, expects, distribution, guesses)
        return [replace(self._reader.answer(row.said, row.chances), numbers=numbers) for row, numbers in rows]

    def _answer_plainly(
        self, prefix: PlainPrefix, suffixes: Sequence[Sequence[int]], max_new_tokens: int
    ) -> list[Answer]:
        # Rows of one length need no padding, so equal lengths are decoded together.
        order = sorted(range(len(suffixes)), key=lambda row: len(suffixes[row]))
        size = len(order) if len(prefix.cache.layers[0].keys) > 1 else self._batch_size
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), size):
            rows = order[start : start + size] if size < len(order) else list(range(len(suffixes)))
            said = self._plain.decode(prefix, [suffixes[row] for row in rows], max_new_tokens)
            answers.update({row: self._reader.answer(*one) for row, one in zip(rows, said, strict=True)})
        return [answers[row] for row in range(len(suffixes))]

    def _tell(self, reason: str) -> None:
        """Notes and logs what costs speed and no answer."""
        logging.getLogger(__name__).warning("%s: %s", self.info.model, reason)
        self.info = replace(self.info, reasons=(*self.info.reasons, reason))

    def _images_at_once(self, image: np.ndarray) -> int:
        """Images that go through the vision tower together."""
        if self._device.type == "cpu":
            return CPU_IMAGES
        tokens = image.shape[0] * image.shape[1] // self.processor.patch_px**2
        return max(1, min(self._batch_size, self._answering.planner.group(8 * tokens) if self._answering else 8))

    def _prefill(self, frame: Composed, *, hidden: bool = False) -> tuple[Prefix, torch.Tensor | None]:
        return self._decoder.prefill(
            frame.embeds, frame.positions, frame.token_ids, frame.deepstack, frame.image_places, frame.next_position,
            hidden=hidden,
        )  # fmt: skip

    def _in_parts(
        self, count: int, size: int, image: np.ndarray, answer: Callable[[slice], list[Answer]]
    ) -> list[Answer]:
        """Answers questions with an image each, `size` at a time, and fewer from then on where memory runs out.

        Args:
            count: number of questions.
            size: most images at once.
            image: one of them; all are of its size.
            answer: the questions of a slice.
        """
        values = max(1, image.size)
        answers: list[Answer] = []
        while len(answers) < count:
            some = max(1, min(size, count - len(answers), self._most_values // values))

            def halve(some: int = some) -> bool:
                if some > 1:
                    self._most_values = some // 2 * values
                return some > 1

            part = slice(len(answers), len(answers) + some)
            answers += attempt(lambda part=part: answer(part), halve) or []
        return answers

    @staticmethod
    def _by_size(images: Sequence[np.ndarray]) -> list[list[int]]:
        by_size: dict[tuple[int, ...], list[int]] = {}
        for row, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(row)
        return list(by_size.values())


def _planner(decoder: Decoder, device: torch.device, batch_size: int) -> Planner:
    item = decoder.dtype.itemsize
    turned = (decoder.heads + 2 * decoder.groups) * decoder.head_size
    # The stream, its normed copy and the attention's output; query, key and value turned and not; gate and up.
    wide = 4 * decoder.width + 3 * turned + 4 * decoder.mlp_width
    return Planner(
        device,
        token_bytes=2 * len(decoder.layers) * decoder.groups * decoder.head_size * item,
        activation_bytes=wide * item,
        score_bytes=3 * 4 * len(decoder.lm_head.weight),
        largest=batch_size or LARGEST_GROUP,
    )


def _stop_ids(model: PreTrainedModel, processor: PromptProcessor) -> frozenset[int]:
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = processor.tokenizer.eos_token_id
    if ids is None:
        raise ModelError("the checkpoint names no end-of-sequence token; add eos_token_id to generation_config.json")
    return frozenset(ids if isinstance(ids, list) else [ids])


def _deepstack_maps(checkpoint: Checkpoint) -> int:
    return len(checkpoint.config["vision_config"].get("deepstack_visual_indexes", ()))


@contextmanager
def _clear_errors(info: EngineInfo, batch_size: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        raise EngineError(
            f"{info.device} ran out of memory with {info.model} in {info.dtype} and {batch_size} questions a batch; "
            "lower batch_size, ask for smaller images, or use device 'cpu'"
        ) from error
