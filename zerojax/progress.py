"""What a run shows while it runs."""

import sys
import time
from typing import Self

import tqdm


class Progress:
    """A progress bar on a terminal; a plain line for each evaluation elsewhere."""

    def __init__(self, step: int, num_steps: int) -> None:
        self._num_steps = num_steps
        self._bar = tqdm.tqdm(
            initial=step, total=num_steps, unit='step', disable=not sys.stderr.isatty()
        )
        self._start_step, self._start = step, time.monotonic()

    def start_clock(self, step: int) -> None:
        """Measures speed and time left from here on, so that compilation does not count."""
        self._start_step, self._start = step, time.monotonic()
        self._bar.unpause()

    def update(self, step: int, **values: float) -> None:
        """Moves to `step` and shows the values."""
        self._bar.set_postfix(
            {name: f'{value:.3g}' for name, value in values.items()}, refresh=False
        )
        self._bar.update(step - self._bar.n)

    def say(self, message: str) -> None:
        """Prints a line without disturbing the bar."""
        if self._bar.disable:
            print(message, flush=True)
        else:
            self._bar.write(message)

    def evaluated(self, step: int, **values: float) -> None:
        """Shows an evaluation; in a plain line also the speed and the time left."""
        shown = '  '.join(f'{name} {value:.4g}' for name, value in values.items())
        speed = ''
        if step > self._start_step:
            per_step = (time.monotonic() - self._start) / (step - self._start_step)
            left = (self._num_steps - step) * per_step
            speed = f'  {1 / per_step:.1f} steps/s  {left:.0f} s left'
        self.say(f'step {step}/{self._num_steps}  {shown}{speed}')

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
