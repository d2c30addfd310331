"""What follows the beginning of an answer, by plain transformers: the reference that trees of digits are grown with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache

from depthlm_ros.engines.transformers_engine import TransformersEngine


class PlainNumbers:
    """Next-token log-probabilities after the questions, the answer's beginning and any digits.

    Every question keeps a cache of its own; a path of digits is one more row that continues a copy of it.

    Args:
        engine: a loaded engine; only its `model` and its `processor` are used.
        image: (H, W, 3) uint8 RGB.
        questions: texts about it.
        beginning: how the answer begins, up to the number.
        batch: paths continued together.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        image: np.ndarray,
        questions: Sequence[str],
        beginning: str,
        batch: int = 256,
    ) -> None:
        self._model, self._batch = engine.model, batch
        tokenizer = engine.processor.tokenizer
        one_digit = tokenizer.encode(beginning + "1", add_special_tokens=False)
        inputs = engine.processor.images([image])
        prompts = [[*ids, *one_digit[:-1]] for ids in engine.processor.prompts(questions, inputs.grid_hw)]
        by_length: dict[int, list[int]] = {}
        for row, ids in enumerate(prompts):
            by_length.setdefault(len(ids), []).append(row)
        self._caches: list[tuple[DynamicCache, int, int]] = [None] * len(prompts)
        self.start = torch.empty(len(prompts), self._model.lm_head.out_features)
        for rows in by_length.values():
            ids = torch.tensor([prompts[row] for row in rows])
            cache, place, log_probs = self._prefill(ids, inputs, engine.processor.image_token_id)
            self.start[rows] = log_probs
            for at, row in enumerate(rows):
                self._caches[row] = (cache, at, place)

    @torch.inference_mode()
    def __call__(self, rows: Sequence[int], paths: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """(n, V) float32 log-probabilities of what follows path i of question `rows[i]`."""
        out = torch.empty(len(rows), self.start.shape[1])
        groups: dict[tuple[int, int], list[int]] = {}
        for at, (row, path) in enumerate(zip(rows, paths, strict=True)):
            groups.setdefault((id(self._caches[row][0]), len(path)), []).append(at)
        for members in groups.values():
            for first in range(0, len(members), self._batch):
                some = members[first : first + self._batch]
                cache, _, place = self._caches[rows[some[0]]]
                copied = [self._caches[rows[at]][1] for at in some]
                own = DynamicCache([(kv.keys[copied], kv.values[copied]) for kv in cache.layers])
                ids = torch.tensor([paths[at] for at in some])
                positions = torch.arange(place, place + ids.shape[1]).expand(3, len(some), -1)
                states = self._model.model.language_model(
                    inputs_embeds=self._model.get_input_embeddings()(ids), position_ids=positions, past_key_values=own
                ).last_hidden_state
                out[some] = self._model.lm_head(states[:, -1]).float().log_softmax(-1)
        return out

    @torch.inference_mode()
    def _prefill(self, ids: torch.Tensor, inputs, image_token: int) -> tuple[DynamicCache, int, torch.Tensor]:
        is_image = (ids == image_token).int()
        tensors = {name: value.repeat(len(ids), *[1] * (value.ndim - 1)) for name, value in inputs.tensors.items()}
        positions, _ = self._model.model.get_rope_index(
            ids, mm_token_type_ids=is_image, image_grid_thw=tensors["image_grid_thw"]
        )
        output = self._model(
            input_ids=ids,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            mm_token_type_ids=is_image,
            **tensors,
        )
        log_probs = output.logits[:, -1].float().log_softmax(-1)
        return output.past_key_values, int(positions.max()) + 1, log_probs
