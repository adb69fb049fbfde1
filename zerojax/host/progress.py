"""What is shown while runs are trained."""

import sys
import time
from typing import Self

import tqdm

from zerojax.host import distributed

COLUMNS = 100  # of a line


def _text(value: float | str, form: str) -> str:
    return value if isinstance(value, str) else format(value, form)


class Progress:
    """One progress bar for all runs on a terminal; a plain line for each evaluation elsewhere.

    Of several processes only the first shows anything.
    """

    def __init__(self, num_steps: int) -> None:
        """`num_steps` are those of all runs together."""
        self._num_steps = num_steps
        self._silent = not distributed.is_first()
        self._bar = tqdm.tqdm(
            total=num_steps, unit='step', disable=self._silent or not sys.stderr.isatty()
        )
        self._done = 0
        self.start_clock()

    def start_clock(self) -> None:
        """Measures speed and time left from here on, so that compilation does not count."""
        self._start_done, self._start = self._done, time.monotonic()
        self._bar.unpause()

    def skip(self, steps: int) -> None:
        """Counts steps that were done before, or never will be, and so tell nothing of speed."""
        self.advance(steps)
        self._start_done += steps

    def advance(self, steps: int) -> None:
        """Counts steps that were done now."""
        self._done += steps
        self._bar.update(steps)

    def show(self, **values: float | str) -> None:
        """Shows the values beside the bar."""
        self._bar.set_postfix(
            {name: _text(value, '.3g') for name, value in values.items()}, refresh=False
        )

    def say(self, message: str) -> None:
        """Prints a line without disturbing the bar."""
        if self._silent:
            return
        if self._bar.disable:
            print(message, flush=True)
        else:
            self._bar.write(message)

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
        self._bar.close()
