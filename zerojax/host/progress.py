"""What is shown while runs are trained."""

import contextlib
import importlib
import io
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any, Self

from zerojax.host import distributed, terminal

COLUMNS = 100  # of a line


def _import_tqdm() -> Any:
    """tqdm, which reads its variables TQDM_* when it is imported: without them if it cannot."""
    try:
        importlib.import_module('tqdm.asyncio')
    except ValueError:
        unread = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith('TQDM_')}
        try:
            importlib.import_module('tqdm.asyncio')
        finally:
            os.environ.update(unread)
    return sys.modules['tqdm']


_tqdm = _import_tqdm()
with warnings.catch_warnings():
    warnings.simplefilter('ignore', _tqdm.TqdmWarning)  # a notebook without ipywidgets has no bar
    from tqdm.auto import tqdm as Bar  # noqa: N812

IN_NOTEBOOK = Bar is not _tqdm.asyncio.tqdm_asyncio


def _text(value: float | str, form: str) -> str:
    return value if isinstance(value, str) else format(value, form)


class Progress:
    """One progress bar for all runs on a terminal or in a notebook; elsewhere lines alone.

    Of several processes only the first shows anything. A bar that cannot be shown is left out.
    """

    def __init__(self, num_steps: int) -> None:
        """`num_steps` are those of all runs together."""
        self._num_steps = num_steps
        self._silent = not distributed.is_first()
        self._bar = Bar(disable=True, file=io.StringIO())  # stderr may be no stream at all
        if not self._silent and (IN_NOTEBOOK or terminal.is_terminal(sys.stderr)):
            with self._showing():
                self._bar = Bar(total=num_steps, unit='step')
        self._done = 0
        self.start_clock()

    def start_clock(self) -> None:
        """Measures speed and time left from here on, so that compilation does not count."""
        self._start_done, self._start = self._done, time.monotonic()
        with self._showing():
            self._bar.unpause()

    @contextlib.contextmanager
    def _showing(self) -> Iterator[None]:
        """No fault of a terminal or a notebook ends what is shown there."""
        try:
            yield
        except Exception:
            self._bar.disable = True

    def skip(self, steps: int) -> None:
        """Counts steps that were done before, or never will be, and so tell nothing of speed."""
        self.advance(steps)
        self._start_done += steps

    def advance(self, steps: int) -> None:
        """Counts steps that were done now."""
        self._done += steps
        with self._showing():
            self._bar.update(steps)

    def show(self, **values: float | str) -> None:
        """Shows the values beside the bar."""
        with self._showing():
            self._bar.set_postfix(
                {name: _text(value, '.3g') for name, value in values.items()}, refresh=False
            )

    def say(self, message: str) -> None:
        """Prints a line without disturbing the bar."""
        if self._silent:
            return
        with self._showing():
            self._bar.clear()
        terminal.say(message)
        with self._showing():
            self._bar.refresh()

    def evaluated(self, where: str, **values: float | str) -> None:
        """Shows an evaluation `where` it was made; time left and speed as far as they fit."""
        line = '  '.join([where, *(f'{name} {_text(x, ".4g")}' for name, x in values.items())])
        if self._done > self._start_done:
            per_step = (time.monotonic() - self._start) / (self._done - self._start_done)
            left = (self._num_steps - self._done) * per_step
            for more in (f'  {left:.0f} s left', f'  {1 / per_step:.1f} steps/s'):
                line += more if len(line + more) <= COLUMNS else ''
        self.say(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._showing():
            self._bar.close()
