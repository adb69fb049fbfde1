"""Stopping a run by signal without losing anything."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Self


class Stopped(Exception):
    """What was asked to stop has saved checkpoints; `signal` is the signal's number."""

    def __init__(self, signal_number: int, saved: str) -> None:
        """`saved` says at which step, or by whom."""
        self.signal = signal_number
        name = signal.Signals(signal_number).name
        super().__init__(f'{name}: stopped and saved {saved}; the same command resumes')


def exit_on_signals() -> None:
    """Lets SIGTERM and SIGINT end the process at once with status 128 + their number.

    For the time in which there is nothing to save. Not by an exception: where it comes up in a
    callback, as of the garbage collector, Python ignores it, and the signal would be lost.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit_at_once)


def _exit_at_once(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)


def raise_on_signals() -> None:
    """Lets SIGTERM and SIGINT raise SystemExit(128 + their number).

    For a process that waits for others, which `subprocess.run` then ends.
    """

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


class StopRequest:
    """While open, remembers the first SIGTERM or SIGINT; a second one does what it did before.

    `signal` is the number of the signal that came, None before. In a thread other than the main
    one, where Python lets nobody take signals, it remembers none, nor one that is handled by a
    program around Python: they do what they did.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> Self:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not None:
                    self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        for each, handler in self._previous.items():
            # A handler of Python's waits until what is compiled or computed is done.
            at_once = handler is _exit_at_once
            signal.signal(each, signal.SIG_DFL if at_once else handler)
