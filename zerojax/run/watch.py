"""What runs that others train have done so far, as far as their folders tell."""

import json
import pathlib
from collections.abc import Iterator, Sequence

from zerojax.host.progress import Progress
from zerojax.host.records import Record
from zerojax.run.recorder import shown


class WatchedRun:
    """One run: reads what is new in its metrics.jsonl."""

    def __init__(self, workdir: pathlib.Path, num_steps: int) -> None:
        self.name = workdir.name
        self.num_steps = num_steps
        self.step = 0  # the furthest that it came
        self._file = workdir / 'metrics.jsonl'
        self._read = 0  # bytes
        self._evaluation: Record = {}
        self._shown_step = -1

    def update(self) -> list[tuple[int, dict[str, float | str]]]:
        """Reads on; (step, what is shown of it) for each new evaluation.

        A run that goes on from a checkpoint writes the lines after it anew, the same as before.
        """
        evaluations = []
        for line in self._new_lines():
            self.step = max(self.step, line['step'])
            if line['kind'] == 'eval':
                self._evaluation = line
            elif line['kind'] == 'symmetry' and line['step'] > self._shown_step:
                if self._evaluation.get('step') == line['step']:
                    evaluations.append((line['step'], shown(self._evaluation, line)))
                self._shown_step = line['step']
        return evaluations

    def _new_lines(self) -> Iterator[Record]:
        try:
            size = self._file.stat().st_size
            if size == self._read:
                return
            if size < self._read:
                self._read = 0
            with open(self._file, 'rb') as file:
                file.seek(self._read)
                whole, newline, _ = file.read().rpartition(b'\n')
        except FileNotFoundError:
            return
        for text in whole.splitlines():
            try:
                yield json.loads(text)
            except ValueError:  # the file has become another one meanwhile
                self._read = 0
                return
        self._read += len(whole + newline)


class Watch:
    """All runs of a sweep that are not finished, on one progress bar."""

    def __init__(self, runs: dict[int, WatchedRun], bar: Progress) -> None:
        """`runs` by their numbers; what they did before now tells nothing of speed."""
        self._runs = runs
        self._bar = bar
        self._started = False
        for run in runs.values():
            run.update()
            bar.skip(run.step)

    def steps(self, numbers: list[int]) -> int:
        """How many steps these runs have done together."""
        return sum(self._runs[i].step for i in numbers if i in self._runs)

    def update(self, numbers: Sequence[int] | None = None) -> None:
        """Shows what is new of these runs, or of all."""
        for i in self._runs if numbers is None else numbers:
            run = self._runs.get(i)
            if run is None:
                continue
            before = run.step
            evaluations = run.update()
            if run.step > before and not self._started:  # the first has waited and compiled
                self._started = True
                self._bar.skip(run.step - before)
                self._bar.start_clock()
            else:
                self._bar.advance(run.step - before)
            for step, values in evaluations:
                self._bar.evaluated(f'{run.name}  step {step}/{run.num_steps}', **values)

    def leave(self, number: int) -> None:
        """No longer watches a run, which is finished or has failed."""
        run = self._runs.pop(number)
        self._bar.skip(run.num_steps - run.step)
