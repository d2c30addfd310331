"""What runs the dense dialect's graph, whoever computes it: bytes of a view in, metres out, nothing in between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
from PIL import Image

from depthlm_ros.engines.base import Answer, EngineInfo, ImageGrid
from depthlm_ros.errors import DialectError, EngineError, ImageError, ModelError
from depthlm_ros.manifest import Manifest
from depthlm_ros.prompts import dense_question

GRAPH_FILE = "model.onnx"
INPUT, OUTPUT = "image", "depth"
"""Names of the graph's input, (H, W, 3) uint8 RGB, and output, (H, W) float32 metres."""


class Runner(Protocol):
    """Computes a graph."""

    def run(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB, contiguous, to (H, W) float32 metres.

        Raises:
            EngineError: it couldn't.
        """

    def close(self) -> None:
        """Gives back its memory."""


class GraphEngine:
    """An `Engine` that makes dense maps and answers nothing in words.

    Args:
        runner: of the graph.
        info: what was loaded; `dense` true, `words` and `distributions` false.
        manifest: of the export, for the sizes.

    Raises:
        ModelError: the manifest lacks a size.
    """

    def __init__(self, runner: Runner, info: EngineInfo, manifest: Manifest) -> None:
        self.info = info
        self.grid = grid_of(manifest)
        self.complaints: tuple[str, ...] = ()
        self.deadline: float | None = None
        self._runner: Runner | None = runner
        self._view = size_of(manifest, "width", "height")
        self._size = graph_size(manifest)

    def answer_shared(self, image: np.ndarray, questions: Sequence[str], max_new_tokens: int, **how) -> list[Answer]:
        """Answers nothing; as all `answer_*`.

        Raises:
            DialectError: always.
        """
        self._wordless()

    def answer_about(
        self, images: Sequence[np.ndarray], questions: Sequence[str], max_new_tokens: int, **how
    ) -> list[Answer]:
        """Answers nothing."""
        self._wordless()

    def answer_each(
        self, images: Sequence[np.ndarray], questions: Sequence[str], max_new_tokens: int, **how
    ) -> list[Answer]:
        """Answers nothing."""
        self._wordless()

    def answer_marked(
        self,
        image: np.ndarray,
        blocks: Sequence[tuple[int, int, np.ndarray]],
        questions: Sequence[str],
        max_new_tokens: int,
        **how,
    ) -> list[Answer]:
        """Answers nothing."""
        self._wordless()

    def encode_ahead(self, image: np.ndarray) -> bool:
        """Nothing is encoded apart from the rest."""
        return False

    def depth_map(self, image: np.ndarray, question: str) -> np.ndarray:
        """The graph's map.

        Args:
            image: (H, W, 3) uint8 RGB, of the size of the view that the graph was exported for.
            question: the dense dialect's, which the graph holds.

        Returns:
            (H', W') float32 metres.

        Raises:
            ImageError: an image of another size or type.
            DialectError: another question.
            EngineError: the graph failed, or depths aren't finite and positive.
        """
        if self._runner is None:
            raise EngineError(f"engine {self.info.engine} was closed; load the model again")
        if question != dense_question():
            raise DialectError(f"the graph holds one question and can't be asked {question!r}; use a text dialect")
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ImageError(f"an image is {image.dtype} of shape {image.shape}; pass (H, W, 3) uint8 RGB")
        if image.shape[1::-1] != self._view:
            raise ImageError(
                f"the view is {image.shape[1]}x{image.shape[0]} pixels, the engine was exported for "
                f"{self._view[0]}x{self._view[1]}; export it for this camera: depthlm export MODEL OUT --target onnx"
            )
        if self._view != self._size:
            # As the checkpoint's processor does; the exporter has made sure that it is the same.
            image = np.asarray(Image.fromarray(image).resize(self._size, Image.Resampling.BICUBIC))
        depth = self._runner.run(np.ascontiguousarray(image))
        if depth.shape != self._size[::-1] or depth.dtype != np.float32:
            raise EngineError(
                f"the graph gave {depth.dtype} of shape {depth.shape} instead of float32 of {self._size[::-1]}; export "
                "again"
            )
        wrong = depth.size - int(np.count_nonzero(np.isfinite(depth) & (depth > 0)))
        if wrong:
            raise EngineError(
                f"{wrong} of {depth.size} depths are not finite and positive; export or build in a precision of more "
                "range, float32 or bfloat16"
            )
        return depth

    def close(self) -> None:
        """Gives back the runner's memory."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _wordless(self) -> NoReturn:
        raise DialectError(
            f"engine {self.info.engine} makes dense maps and answers nothing in words; use dialect dense, or engine "
            "transformers"
        )


def grid_of(manifest: Manifest) -> ImageGrid:
    """The sizes that the checkpoint's processor leaves alone, so that views come out as it would have them."""
    return ImageGrid(*(_size(manifest, name) for name in ("multiple", "min_pixels", "max_pixels")))


def graph_size(manifest: Manifest) -> tuple[int, int]:
    """(width, height) of the graph's image and of its map."""
    return size_of(manifest, "map_width", "map_height")


def size_of(manifest: Manifest, width: str, height: str) -> tuple[int, int]:
    """Two of the manifest's sizes by name.

    Raises:
        ModelError: one is absent.
    """
    return _size(manifest, width), _size(manifest, height)


def graph_file(folder: Path, name: str = GRAPH_FILE) -> Path:
    """The graph's file.

    Raises:
        ModelError: it isn't there.
    """
    path = folder / name
    if not path.is_file():
        raise ModelError(f"{folder} has no {name}; copy the whole export again, or export again")
    return path


def graph_info(
    engine: str, folder: Path, manifest: Manifest, device: str, version: str, dtype: str, reasons: Sequence[str]
) -> EngineInfo:
    """What the diagnostics say of a graph."""
    return EngineInfo(
        engine=engine,
        model=str(folder),
        architecture=str(manifest.extra.get("architecture", "")),
        device=device,
        dtype=dtype,
        reasons=(f"exported from {manifest.source} with torch {manifest.versions.get('torch', '?')}", *reasons),
        parameters=int(manifest.extra.get("parameters", 0)),
        dense=True,
        words=False,
        distributions=False,
        version=version,
    )


def _size(manifest: Manifest, name: str) -> int:
    value = manifest.image.get(name)
    if not isinstance(value, int) or value <= 0:
        raise ModelError(f"engine.json has image.{name} {value!r}, a graph needs a positive number; export again")
    return value
