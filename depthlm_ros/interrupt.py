"""Ctrl-C in a process that has rclpy in it. No ROS in here."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from typing import Any

# A terminal and ros2 launch tell one Ctrl-C within this time; so many of them end the process wherever it is.
_ONE_CTRL_C_S = 1.0
_CTRL_CS_TO_END = 3


class Interrupt:
    """Ctrl-C as one KeyboardInterrupt, and none once the node is being closed.

    rclpy's own handler ends the context at once, and Python raises KeyboardInterrupt for the same signal a little
    later: in the handling of what the ended context led to, or in the clean-up. A terminal and `ros2 launch` may both
    send the signal, too: what comes within a second is one Ctrl-C.

    A KeyboardInterrupt in a finaliser or in a callback of another library is swallowed there. So a second Ctrl-C
    raises again, and a third one ends the process.
    """

    def __init__(self) -> None:
        self._muted = False
        self._count = 0
        self._last_s = -math.inf
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            # Before rclpy.init: its handler calls the one that it finds.
            self._before = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._muted or now - self._last_s < _ONE_CTRL_C_S:
            return
        self._last_s = now
        self._count += 1
        if self._count == _CTRL_CS_TO_END:
            os.write(2, b"depth_node: ended by the third Ctrl-C\n")
            os._exit(128 + number)
        raise KeyboardInterrupt

    def ignore(self) -> None:
        """From here on the signal does nothing."""
        self._muted = True

    def restore(self) -> None:
        """Puts back the handler that was there; after rclpy has removed its own."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
