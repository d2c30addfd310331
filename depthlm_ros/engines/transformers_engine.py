"""Runs Qwen3-VL, Qwen2.5-VL and Pixtral checkpoints with plain transformers, on a CPU or a GPU.

A frame costs one `prefill` (vision tower, chat header, image tokens, what all questions share) and
one `decode` for each batch of questions. The dense dialect is a `prefill` of the image alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from depthlm_ros.engines.answers import AnswerReader
from depthlm_ros.engines.base import Answer, EngineInfo, ImageGrid
from depthlm_ros.engines.batches import Batch, Prefix, shared_length
from depthlm_ros.engines.checkpoint import Checkpoint, open_checkpoint
from depthlm_ros.engines.dense_head import MLPDepthHead, head_features, load_head, unsupported_head
from depthlm_ros.engines.devices import choose_placement
from depthlm_ros.engines.dpt_head import DPTDepthHead
from depthlm_ros.engines.loading import load_model
from depthlm_ros.engines.processor import ImageInputs, PromptProcessor
from depthlm_ros.errors import DialectError, EngineError, ModelError


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
        batch_size: int = 64,
    ) -> None:
        self.model = model
        self.processor = processor
        self.info = info
        self.grid: ImageGrid = processor.grid
        self._head = head
        self._head_mode = head_mode
        self._no_head = no_head
        self._batch_size = batch_size
        self._device = next(model.parameters()).device
        self._reader = AnswerReader(processor.tokenizer)
        self._stop_ids = _stop_ids(model, processor)
        self._window = model.config.get_text_config().to_dict().get("sliding_window")
        self._penalty = float(model.generation_config.repetition_penalty or 1.0)

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
        batch_size: int = 64,
    ) -> TransformersEngine:
        """Loads a folder or hub id; arguments and errors as in `load_engine`."""
        checkpoint = open_checkpoint(source, revision)
        placement = choose_placement(device, dtype, checkpoint.parameters)
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
        return cls(model, processor, info, head=head, head_mode=mode, no_head=no_head, batch_size=batch_size)

    def answer_shared(self, image: np.ndarray, questions: Sequence[str], max_new_tokens: int) -> list[Answer]:
        """Answers many questions about one image; `answer_about` with a single image."""
        return self.answer_about([image], questions, max_new_tokens)

    @torch.inference_mode()
    def answer_about(self, images: Sequence[np.ndarray], questions: Sequence[str], max_new_tokens: int) -> list[Answer]:
        """Answers many questions about the same images, which are encoded and prefilled once.

        Args:
            images: one or more (H, W, 3) uint8 RGB of any sizes, shown in this order before the text;
                resampled only where a size isn't of `grid`.
            questions: texts; what they share at their beginning is prefilled once too.
            max_new_tokens: longest answer in tokens.

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
        with _clear_errors(self.info, self._batch_size):
            inputs = [self.processor.images([image]) for image in images]
            prompts = self.processor.prompts(questions, *(image.grid_hw for image in inputs))
            shared = shared_length(prompts)
            prefix = self.prefill(prompts[0][:shared], *inputs)
            suffixes = [ids[shared:] for ids in prompts]
            # Rows of one length need no padding, so equal lengths are decoded together.
            order = sorted(range(len(suffixes)), key=lambda row: len(suffixes[row]))
            answers: dict[int, Answer] = {}
            for start in range(0, len(order), self._batch_size):
                rows = order[start : start + self._batch_size]
                answers.update(zip(rows, self.decode(prefix, [suffixes[r] for r in rows], max_new_tokens), strict=True))
            return [answers[row] for row in range(len(suffixes))]

    @torch.inference_mode()
    def answer_each(self, images: Sequence[np.ndarray], questions: Sequence[str], max_new_tokens: int) -> list[Answer]:
        """Answers question i about image i; images of one size are prefilled together.

        Raises:
            ImageError: not an RGB image.
            EngineError: out of memory, or as many images as questions weren't given.
        """
        if len(images) != len(questions):
            raise EngineError(f"{len(images)} images and {len(questions)} questions; give one image a question")
        answers: dict[int, Answer] = {}
        with _clear_errors(self.info, self._batch_size):
            for rows in self._same_size_batches(images):
                inputs = self.processor.images([images[row] for row in rows])
                prompts = self.processor.prompts([questions[row] for row in rows], inputs.grid_hw)
                shared = shared_length(prompts)
                prefix = self.prefill(prompts[0][:shared], inputs)
                decoded = self.decode(prefix, [ids[shared:] for ids in prompts], max_new_tokens)
                answers.update(zip(rows, decoded, strict=True))
        return [answers[row] for row in range(len(questions))]

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
            inputs = self.processor.images([image])
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
        hidden, deepstack, _ = self._forward_images(ids, (inputs,), None)
        at = torch.tensor(ids, device=self._device) == self.processor.image_token_id
        maps = [features.view(inputs.count, -1, features.shape[-1]) for features in deepstack]
        return head_features(self._head_mode, maps, hidden[:, at])

    def prefill(self, ids: Sequence[int], *inputs: ImageInputs) -> Prefix:
        """Runs the vision tower and the language model over what all questions share.

        Args:
            ids: chat header, image tokens and the beginning of the questions, the same for each row.
            inputs: the first image of each row, the second image of each row, ...; one row for all questions, or
                one for each that `decode` will get.
        """
        cache = DynamicCache()
        _, _, next_position = self._forward_images(ids, inputs, cache)
        return Prefix(cache, tuple(ids), next_position)

    def decode(self, prefix: Prefix, suffixes: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
        """Answers one batch greedily; rows leave when they have ended.

        Args:
            prefix: of one image, or of one image for each suffix.
            suffixes: the rest of each prompt, at least one token.
            max_new_tokens: longest answer in tokens.
        """
        length = len(prefix.token_ids) + max(map(len, suffixes)) + max_new_tokens
        if self._window is not None and length > self._window:
            raise EngineError(
                f"{length} tokens don't fit the model's sliding window of {self._window}; ask for a smaller image"
            )
        batch = Batch(prefix, suffixes, self._device)
        seen = self._seen_tokens(prefix, suffixes)
        tokens: list[list[int]] = [[] for _ in suffixes]
        chances: list[list[float]] = [[] for _ in suffixes]
        for _ in range(max_new_tokens):
            logits = self.next_logits(batch)
            if seen is not None:
                penalised = torch.where(logits < 0, logits * self._penalty, logits / self._penalty)
                logits = torch.where(seen[batch.rows], penalised, logits)
            chosen = logits.argmax(-1)
            chance = torch.exp(logits.gather(-1, chosen[:, None])[:, 0] - logits.logsumexp(-1))
            if seen is not None:
                seen[batch.rows, chosen] = True
            ids = chosen.tolist()
            for row, token, probability in zip(batch.rows.tolist(), ids, chance.tolist(), strict=True):
                if not (tokens[row] and tokens[row][-1] in self._stop_ids):
                    tokens[row].append(token)
                    chances[row].append(probability)
            running = [at for at, row in enumerate(batch.rows.tolist()) if tokens[row][-1] not in self._stop_ids]
            if not running:
                break
            batch.advance(chosen, running)
        return [self._reader.answer(ids, chance) for ids, chance in zip(tokens, chances, strict=True)]

    def warm_up(self, width: int, height: int) -> None:
        """Runs once at this size, so that the first frame doesn't pay for what is set up lazily."""
        image = np.zeros((height, width, 3), np.uint8)
        if self._head is not None:
            self.depth_map(image)
        self.answer_shared(image, [""], 2)

    def close(self) -> None:
        """Frees the model's memory; the engine can't be used afterwards."""
        del self.model, self._head
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _forward_images(
        self, ids: Sequence[int], inputs: Sequence[ImageInputs], cache: DynamicCache | None
    ) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        """Last states (B, L, C), DeepStack maps (B * N, C), and the position that follows."""
        rows = inputs[0].count
        input_ids = torch.tensor(ids, device=self._device).expand(rows, -1)
        is_image = input_ids == self.processor.image_token_id
        encoded = [self._encode(images) for images in inputs]
        tokens = _by_row([image_tokens for image_tokens, _ in encoded], rows)
        deepstack = [_by_row(maps, rows) for maps in zip(*(maps for _, maps in encoded), strict=True)]
        embeds = self.model.get_input_embeddings()(input_ids)
        embeds = embeds.masked_scatter(is_image[..., None], tokens.to(embeds.dtype))
        options = {}
        position_ids = None
        next_position = len(ids)
        if self.info.architecture != "llava":
            grids = torch.stack([images.tensors["image_grid_thw"] for images in inputs], dim=1)
            position_ids, _ = self.model.model.get_rope_index(
                input_ids,
                mm_token_type_ids=is_image.int(),
                image_grid_thw=grids.flatten(0, 1).to(self._device),
            )
            next_position = int(position_ids.max()) + 1
        if deepstack:
            options = {"visual_pos_masks": is_image, "deepstack_visual_embeds": deepstack}
        output = self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            **options,
        )
        return output.last_hidden_state, deepstack, next_position

    def _encode(self, inputs: ImageInputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Image tokens (B * N, C) and DeepStack maps of the same shape."""
        tensors = {name: value.to(self._device) for name, value in inputs.tensors.items()}
        if self.info.architecture == "llava":
            # Pixtral's tower attends over all images at once with a dense mask, so they go one by one.
            one_by_one = [
                self.model.model.get_image_features(**{name: value[i : i + 1] for name, value in tensors.items()})
                for i in range(inputs.count)
            ]
            return torch.cat([torch.cat(list(out.pooler_output)) for out in one_by_one]), []
        out = self.model.model.get_image_features(**tensors)
        maps = out.deepstack_features if self.info.architecture == "qwen3_vl" else []
        # transformers 5.14 gives whole tensors, 5.23 one for each image.
        return torch.cat(list(out.pooler_output)), [
            m if isinstance(m, torch.Tensor) else torch.cat(list(m)) for m in maps
        ]

    def next_logits(self, batch: Batch) -> torch.Tensor:
        """(rows, vocabulary) float32 scores of the token that follows each row; grows the batch's cache."""
        positions = batch.positions
        if self.info.architecture != "llava":
            positions = positions.expand(3, -1, -1)
        output = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(batch.input_ids),
            position_ids=positions,
            attention_mask=batch.mask,
            past_key_values=batch.cache,
            use_cache=True,
        )
        return self.model.lm_head(output.last_hidden_state[:, -1]).float()

    def _seen_tokens(self, prefix: Prefix, suffixes: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """(rows, vocabulary) bool, what a repetition penalty of the checkpoint's own looks at."""
        if self._penalty == 1.0:
            return None
        seen = torch.zeros(len(suffixes), self.model.lm_head.out_features, dtype=torch.bool, device=self._device)
        for row, suffix in enumerate(suffixes):
            seen[row, list({*prefix.token_ids, *suffix})] = True
        return seen

    def _same_size_batches(self, images: Sequence[np.ndarray]) -> Iterator[list[int]]:
        by_size: dict[tuple[int, ...], list[int]] = {}
        for row, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(row)
        for rows in by_size.values():
            for start in range(0, len(rows), self._batch_size):
                yield rows[start : start + self._batch_size]


def _by_row(features: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
    """Features (rows * N_k, C) of the k-th images to (rows * sum of N_k, C): each row's images after one another."""
    if len(features) == 1:
        return features[0]
    return torch.cat([f.view(rows, -1, f.shape[-1]) for f in features], dim=1).flatten(0, 1)


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
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise EngineError(
            f"{info.device} ran out of memory with {info.model} in {info.dtype} and {batch_size} questions a batch; "
            "lower batch_size, ask for smaller images, or use device 'cpu'"
        ) from error
