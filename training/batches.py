"""Micro-batches of questions and answers: which rows, what is asked about them, how it lies in rows of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from depthlm_ros.engines.checkpoint import open_checkpoint
from depthlm_ros.errors import CameraError, DatasetError, ImageError
from depthlm_training.asking import Asked, Asking, ask
from depthlm_training.data import Mixture
from depthlm_training.dialogues import DialogueProcessor
from depthlm_training.packing import Batch, collate, pack
from depthlm_training.rows import UNUSABLE_CAMERA, BadRow

# Rows tried for one place of a micro-batch; each is another draw of the mixture, far from those of the run.
_TRIES = 100
_FAR = 1 << 48
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
        processor = dialogue_processor(self.folder, self.system_text)
        asked = [self.asked(k * self.images + i) for i in range(self.images)]
        return collate([pack(processor, each, self.supervise) for each in asked], self.tokens_per_row)

    def asked(self, k: int) -> Asked:
        """What is asked about the row of draw k, or about another where nothing can be."""
        rng = np.random.default_rng([self.seed, _ASKING, k])
        for again in range(_TRIES):
            at = k + again * _FAR
            example, ways = self.mixture.example(at), self.ways[self.mixture.draw(at)[0]]
            shares = np.array([way.share for way in ways])
            how = ways[rng.choice(len(ways), p=shares / shares.sum())].asking
            try:
                return ask(example, how, rng)
            except BadRow as bad:
                self.mixture.bad_rows.add(bad.row, bad.cause)
            except (CameraError, ImageError):
                self.mixture.bad_rows.add(example.name, UNUSABLE_CAMERA)
        raise DatasetError(
            f"nothing can be asked about {_TRIES} rows in turn; compare `ask` with the data:\n"
            f"{self.mixture.bad_rows.report()}"
        )
