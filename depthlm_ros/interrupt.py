"""Ctrl-C in a process that has rclpy in it. No ROS in here."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from typing import Any

from depthlm_ros.engines.edge_llm_command import end_all
from depthlm_ros.middleware import release_shared_memory

# A terminal and ros2 launch tell one Ctrl-C within this time; so many of them end the process wherever it is.
_ONE_CTRL_C_S = 1.0
_CTRL_CS_TO_END = 3


class Interrupt:
    """Ctrl-C as one KeyboardInterrupt, and none once the node is being closed.

    rclpy's own handler ends the context at once, and Python raises KeyboardInterrupt for the same signal a little
    later: in the handling of what the ended context led to, or in the clean-up. A terminal and `ros2 launch` may both
    send the signal, too: what comes within a second is one Ctrl-C.

    A KeyboardInterrupt in a finaliser or in a callback of another library is swallowed there, and while a library
    computes there is none. So a second Ctrl-C raises again, and a third one ends the process, from a thread beside.
    """

    def __init__(self) -> None:
        self._muted = False
        self._count = 0
        self._told_s = self._raised_s = -math.inf
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            # Before rclpy.init: its handler calls the one that it finds.
            self._before = signal.signal(signal.SIGINT, self._handle)
            signals, self._told = os.pipe()
            os.set_blocking(self._told, False)
            self._told_before = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(signals,), name="Ctrl-C", daemon=True).start()

    def _handle(self, number: int, frame: object) -> None:
        """In the main thread, as soon as it is in Python code."""
        now = time.monotonic()
        if self._muted or now - self._raised_s < _ONE_CTRL_C_S:
            return
        self._raised_s = now
        raise KeyboardInterrupt

    def _watch(self, signals: int) -> None:
        """In a thread of its own: numbers of signals, as Python's C handler writes them, until the pipe is closed."""
        while numbers := os.read(signals, 64):
            if signal.SIGINT in numbers:
                self._count_one()
        os.close(signals)

    def _count_one(self) -> None:
        now = time.monotonic()
        if self._muted or now - self._told_s < _ONE_CTRL_C_S:
            return
        self._told_s = now
        self._count += 1
        if self._count == _CTRL_CS_TO_END:
            os.write(2, b"depth_node: ended by the third Ctrl-C\n")
            release_shared_memory()
            end_all()
            os._exit(128 + signal.SIGINT)

    def ignore(self) -> None:
        """From here on the signal does nothing."""
        self._muted = True

    def restore(self) -> None:
        """Puts back the handler that was there; after rclpy has removed its own."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            signal.set_wakeup_fd(self._told_before)
            os.close(self._told)
            self._before = None
