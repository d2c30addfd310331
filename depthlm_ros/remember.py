"""Results that hang on camera, size and pixels alone are computed for the first frame and remembered for all others."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])


def remember(results: int) -> Callable[[Function], Function]:
    """Makes a pure function of positional arguments keep its last results, for any number of threads.

    An array among the arguments is known again by being the same object, which is only safe where nobody can write
    into it: with a writeable array the function is called as if it remembered nothing. See `fixed`.

    Args:
        results: how many are kept; the least recently used gives way.

    Returns:
        A decorator. What the function returns when its arguments are remembered is shared, so arrays in it (alone or
        in a tuple) are made read-only.
    """

    def decorate(function: Function) -> Function:
        kept: OrderedDict[Hashable, Any] = OrderedDict()
        lock = threading.Lock()

        @functools.wraps(function)
        def remembering(*arguments: Any) -> Any:
            if not all(_is_fixed(argument) for argument in arguments):
                return function(*arguments)
            key = tuple(_Same(a) if isinstance(a, np.ndarray) else a for a in arguments)
            with lock:
                if key in kept:
                    kept.move_to_end(key)
                    return kept[key]
            result = function(*arguments)
            for part in result if isinstance(result, tuple) else (result,):
                if isinstance(part, np.ndarray):
                    part.flags.writeable = False
            with lock:
                kept[key] = result
                while len(kept) > results:
                    kept.popitem(last=False)
            return result

        return remembering

    return decorate


def fixed(array: np.ndarray) -> np.ndarray:
    """Makes an array read-only, so that what is computed from it can be remembered; returns it."""
    array.flags.writeable = False
    return array


class _Same:
    """Equal to itself and to what stands for the same array; keeps it alive, so that its place isn't used again."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __hash__(self) -> int:
        return id(self.array)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.array is other.array


def _is_fixed(argument: Any) -> bool:
    if not isinstance(argument, np.ndarray):
        return isinstance(argument, Hashable)
    # A read-only view changes with the array it looks at.
    while isinstance(argument, np.ndarray):
        if argument.flags.writeable:
            return False
        argument = argument.base
    return True
