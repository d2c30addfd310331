"""The error classes of the package: one for each kind of failure a user can cause and mend.

Every message names the value that was seen and says what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_choice(kind: str, seen: str, known: Iterable[str]) -> str:
    """The message for a name that isn't known: what was seen, the nearest valid name, and all of them."""
    known = [str(name) for name in known]
    nearest = difflib.get_close_matches(str(seen), known, n=1, cutoff=0.0)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"unknown {kind} {str(seen)!r}; {hint}known: {', '.join(known) or 'none'}"


class DepthLMError(Exception):
    """Base of all errors that this package raises on purpose."""


class CameraError(DepthLMError):
    """Intrinsics that can't be used: uncalibrated, non-finite, of another size than the image."""


class DistortionModelError(CameraError):
    """A distortion model that the package doesn't know, or with a wrong number of coefficients."""


class ImageError(DepthLMError):
    """An image that can't be decoded: unknown encoding, truncated data, wrong step."""


class CloudError(DepthLMError):
    """A point cloud that can't be built or read: arrays, fields, steps that don't fit together."""


class PixelError(DepthLMError):
    """Pixels that can't be asked: wrong shape, non-finite, outside the image."""


class ConfigError(DepthLMError):
    """An unknown key or a value out of range in a parameter, a card or a command line."""


class ModelError(DepthLMError):
    """A model that can't be loaded: missing weights, unknown architecture, unsafe format."""


class DialectError(ModelError):
    """A dialect that the model doesn't speak, or a task that it wasn't trained for."""


class LicenceError(ModelError):
    """A use that the licence of a model forbids."""


class EngineError(DepthLMError):
    """An engine that failed while answering."""


class ParityError(EngineError):
    """An engine that answers otherwise than the model that it was made from."""


class TransformError(DepthLMError):
    """Frames that aren't connected, or a transform that isn't known at its time."""


class BagError(DepthLMError):
    """A recording that can't be read or written, or lacks a topic."""


class DatasetError(DepthLMError):
    """A labels file or one of its rows that can't be used."""


class TrainingError(DepthLMError):
    """A training that can't go on; the message names the last good checkpoint."""


class MissingDependencyError(DepthLMError):
    """An optional package that isn't installed; the message holds the line that installs it."""
