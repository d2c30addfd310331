"""Micro-batches of questions and answers: which rows, what is asked about them, how it lies in rows of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path

import numpy as np

from depthlm_ros.engines.checkpoint import open_checkpoint
from depthlm_training.asking import Asked, Asking, ask
from depthlm_training.data import Mixture
from depthlm_training.dialogues import DialogueProcessor
from depthlm_training.packing import IGNORED, PADDING, Batch, Packed, collate, pack
from depthlm_training.sources import Example

# Sets what is asked apart from other random choices of the same seed.
_ASKING = 17


@lru_cache(maxsize=2)
def dialogue_processor(folder: Path, system_text: str | None) -> DialogueProcessor:
    """The processor of a checkpoint, made once in each process, since it can't be sent to another."""
    return DialogueProcessor(open_checkpoint(folder), system_text)


@dataclass(frozen=True)
class Way:
    """One way to ask, and how often it is taken beside others."""

    asking: Asking
    share: float


@dataclass(frozen=True)
class TextBatches:
    """Makes micro-batch k: which rows, what is asked about them, and how that lies in rows of tokens.

    Attributes:
        mixture: of sources.
        ways: how the rows of each source are asked about.
        folder: of the checkpoint.
        system_text: of its card.
        images: in a micro-batch.
        tokens_per_row: longest row; a micro-batch that has more tokens becomes several rows.
        supervise: as `pack` takes it.
        seed: of what is asked.
    """

    mixture: Mixture
    ways: tuple[tuple[Way, ...], ...]
    folder: Path
    system_text: str | None
    images: int
    tokens_per_row: int
    supervise: str
    seed: int

    def __call__(self, k: int) -> Batch:
        """Micro-batch k, the same in every process.

        Raises:
            DatasetError: too many rows are bad.
            ConfigError: an image with one question doesn't fit into a row.
        """
        packed = [self._packed(k * self.images + i) for i in range(self.images)]
        return collate(packed, self.tokens_per_row)

    def asked(self, k: int) -> Asked:
        """What is asked about the row of draw k, or about another where nothing can be."""
        return self.mixture.made(k, partial(self._asked, k))

    def _packed(self, k: int) -> Packed:
        processor = dialogue_processor(self.folder, self.system_text)
        return self.mixture.made(
            k, lambda source, example: pack(processor, self._asked(k, source, example), self.supervise)
        )

    def _asked(self, k: int, source: int, example: Example) -> Asked:
        rng, ways = np.random.default_rng([self.seed, _ASKING, k]), self.ways[source]
        shares = np.array([way.share for way in ways])
        return ask(example, ways[rng.choice(len(ways), p=shares / shares.sum())].asking, rng)


def marked_text(processor: DialogueProcessor, batch: Batch, row: int = 0) -> str:
    """A row as text, a paragraph for each prefix and each pair: «supervised», image tokens counted, not written."""
    ids, labels, sequence, segment = (
        tensor[row].tolist() for tensor in (batch.ids, batch.labels, batch.sequence, batch.segment)
    )

    def written(place: int) -> tuple[int, int, str]:
        kind = "said" if labels[place] != IGNORED else "read"
        kind = "image" if ids[place] == processor.image_token_id else kind
        return sequence[place], segment[place], "padding" if sequence[place] == PADDING else kind

    parts, before = [], (0, 0)
    for (*of, kind), run in groupby(range(len(ids)), key=written):
        at = list(run)
        parts.append("\n\n" if tuple(of) != before else "")
        before = tuple(of)
        if kind in ("image", "padding"):
            parts.append(f"<{len(at)} {kind} tokens>")
        else:
            text = processor.tokenizer.decode([ids[i] for i in at])
            parts.append(f"«{text}»" if kind == "said" else text)
    return "".join(parts)
