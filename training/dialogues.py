"""A question with its answer as token ids, in the words of the checkpoint's own chat template."""

from __future__ import annotations

from collections.abc import Sequence

from depthlm_ros.engines.checkpoint import Checkpoint
from depthlm_ros.engines.processor import PROBE, PromptProcessor
from depthlm_ros.errors import ModelError

_ANSWER = "a probe of 7.25 metres"


class DialogueProcessor(PromptProcessor):
    """A `PromptProcessor` that also writes what a model is to answer.

    Attributes:
        stop_id: the token that ends an answer.
        mrope: whether positions have three axes.
    """

    def __init__(self, checkpoint: Checkpoint, system_text: str | None = None) -> None:
        super().__init__(checkpoint, system_text)
        self.mrope = checkpoint.architecture != "llava"
        _, found, ending = self._dialogue_text(PROBE, _ANSWER, 1, header=False).rpartition(_ANSWER)
        ids = self.tokenizer(ending, add_special_tokens=False)["input_ids"]
        if not found or not ids or ids[0] not in self.tokenizer.all_special_ids:
            raise ModelError(
                f"{checkpoint.name}: the chat template must write an answer and a special token that ends it, and "
                f"writes {ending!r} after it; take the template of an instruct model"
            )
        self.stop_id: int = ids[0]

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each answer, its end included."""
        encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [[*ids, self.stop_id] for ids in encoded]

    def published_dialogue(self, question: str, answer: str, *grids_hw: tuple[int, int]) -> list[int]:
        """Token ids of a whole dialogue as DepthLM's collator makes them, an empty assistant's header at its end."""
        text = self._dialogue_text(question, answer, len(grids_hw), header=True)
        bos = self.tokenizer.bos_token
        ids = self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]
        return self._expand(ids, [self._placeholders(grid_hw) for grid_hw in grids_hw])

    def _dialogue_text(self, question: str, answer: str, images: int, header: bool) -> str:
        text = {"type": "text", "text": question, "content": question}
        messages = [
            {"role": "user", "content": [{"type": "image"}] * images + [text]},
            {"role": "assistant", "content": answer},
        ]
        if self._system_content is not None:
            messages.insert(0, {"role": "system", "content": self._system_content})
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=header
        )
