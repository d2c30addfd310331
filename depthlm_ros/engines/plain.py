"""The plain path: transformers' own forward and cache, token after token. The reference that every faster path equals.

It also runs what the lean decoder can't; `TransformersEngine` says why when it does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from depthlm_ros.engines.batches import Batch, PlainPrefix
from depthlm_ros.errors import EngineError


class PlainPath:
    """Answers batches of questions with a repeated and growing cache.

    Args:
        model: the loaded model.
        architecture: "qwen3_vl", "qwen2_5_vl" or "llava".
        stop_ids: tokens that end an answer.
        penalty: repetition penalty, 1 for none.
    """

    def __init__(self, model: PreTrainedModel, architecture: str, stop_ids: frozenset[int], penalty: float) -> None:
        self.model = model
        self._text_only = architecture == "llava"
        self._stop_ids = stop_ids
        self._penalty = penalty
        self._window = model.config.get_text_config().to_dict().get("sliding_window")

    def forward(
        self,
        embeds: torch.Tensor,
        position_ids: torch.Tensor | None,
        deepstack: Sequence[torch.Tensor],
        is_image: torch.Tensor,
        cache: DynamicCache | None,
    ) -> torch.Tensor:
        """(R, P, C) last states of a prefix.

        Args:
            embeds: (R, P, C), image tokens in place.
            position_ids: (3, R, P) M-RoPE positions; None for text positions.
            deepstack: (R, N, C) for each of the first layers.
            is_image: (R, P) bool.
            cache: filled where given.
        """
        options = {}
        if deepstack:
            options = {"visual_pos_masks": is_image, "deepstack_visual_embeds": [m.flatten(0, 1) for m in deepstack]}
        output = self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            **options,
        )
        return output.last_hidden_state

    def decode(
        self, prefix: PlainPrefix, suffixes: Sequence[Sequence[int]], max_new_tokens: int
    ) -> list[tuple[list[int], list[float]]]:
        """Answers one batch greedily; rows leave when they have ended.

        Args:
            prefix: of one image, or of one image for each suffix.
            suffixes: the rest of each prompt, at least one token.
            max_new_tokens: longest answer in tokens.

        Returns:
            Of each row the tokens and the probability that the model gave each.
        """
        length = len(prefix.token_ids) + max(map(len, suffixes)) + max_new_tokens
        if self._window is not None and length > self._window:
            raise EngineError(
                f"{length} tokens don't fit the model's sliding window of {self._window}; ask for a smaller image"
            )
        batch = Batch(prefix, suffixes, prefix.device)
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
        return list(zip(tokens, chances, strict=True))

    def next_logits(self, batch: Batch) -> torch.Tensor:
        """(rows, vocabulary) float32 scores of the token that follows each row; grows the batch's cache."""
        positions = batch.positions
        if not self._text_only:
            positions = positions.expand(3, -1, -1)
        output = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(batch.input_ids),
            position_ids=positions,
            attention_mask=batch.mask,
            past_key_values=batch.cache,
            use_cache=True,
        )
        return self.model.lm_head(output.last_hidden_state[:, -1]).float()

    def _seen_tokens(self, prefix: PlainPrefix, suffixes: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """(rows, vocabulary) bool, what a repetition penalty of the checkpoint's own looks at."""
        if self._penalty == 1.0:
            return None
        seen = torch.zeros(len(suffixes), self.model.lm_head.out_features, dtype=torch.bool, device=prefix.device)
        for row, suffix in enumerate(suffixes):
            seen[row, list({*prefix.token_ids, *suffix})] = True
        return seen
