"""metrics.jsonl: what a run measured, a line at a time."""

import hashlib
import json
import os
import pathlib
from typing import Any, Self

from flax.traverse_util import flatten_dict

from zerojax.host import objectstore
from zerojax.host.errors import UsageError
from zerojax.host.event_file import EventFile
from zerojax.host.records import Record, replace_file


class MetricsLog:
    """`metrics.jsonl`, mirrored in TensorBoard event files.

    A line depends on config and step alone, never on the clock, so a run that was stopped and
    resumed leaves the same bytes as one that was not.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        step: int,
        presumed: str | None = None,
        *,
        writes: bool = True,
    ) -> None:
        """Opens the file to go on after `step`; what was written beyond it will be run again.

        `presumed` is the `sha256` that the lines up to there must have; None: any.

        -1 starts anew, even if a process was killed before it saved its first checkpoint. Without
        `writes` the lines are kept in memory, and the file, which another process writes, is read.

        Raises:
            UsageError: a line other than the last is damaged, or the lines are not those presumed.
        """
        self._path = workdir / 'metrics.jsonl'
        self.lines = self._read_until(step)
        if presumed not in (None, self.sha256()):
            raise UsageError(
                f'--workdir={workdir}: metrics.jsonl is not the one that the checkpoint of step '
                f'{step} was saved with, lines are missing or others; put it back, or name another '
                'folder'
            )
        self._writes = writes
        if not writes:
            return
        self._mirror = objectstore.Mirror(workdir)
        file = self._mirror.folder / 'metrics.jsonl'
        replace_file(file, ''.join(json.dumps(each) + '\n' for each in self.lines).encode())
        self._file = open(file, 'a')
        self._events = EventFile(self._mirror.folder / 'tensorboard', step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            self._file.close()
            self._events.close()
            self._mirror.close()

    def _read_until(self, step: int) -> list[Record]:
        if not self._path.exists():
            return []
        kept = []
        lines = self._path.read_text().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                if number == len(lines):
                    break  # half written by a process that was killed
                raise UsageError(
                    f'--workdir={self._path.parent}: line {number} of metrics.jsonl is damaged; '
                    'name another folder'
                ) from error
            if record['step'] <= step:
                kept.append(record)
        return kept

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Appends one line; numbers also go to TensorBoard as KIND/NAME; None stands for none.

        Raises:
            ValueError: the step is not beyond the last one of this kind, or a number is not finite.
        """
        last = self.last(kind)
        if last is not None and step <= last['step']:
            raise ValueError(f'{kind} at step {step} after step {last["step"]}')
        record = {'step': step, 'kind': kind, **values}
        line = json.dumps(record, allow_nan=False)
        self.lines.append(record)
        if not self._writes:
            return
        self._file.write(line + '\n')
        self._file.flush()
        for name, value in flatten_dict(values, sep='.').items():
            if value is not None:
                self._events.scalar(f'{kind}/{name}', value, step)

    def sha256(self) -> str:
        """Hash of all lines, as they are in the file."""
        digest = hashlib.sha256()
        for record in self.lines:
            digest.update((json.dumps(record) + '\n').encode())
        return digest.hexdigest()

    def last(self, kind: str) -> Record | None:
        """The last line of a kind; None if there is none."""
        return next((line for line in reversed(self.lines) if line['kind'] == kind), None)

    def of_kind(self, kind: str) -> list[Record]:
        """All lines of a kind, in the order of their steps."""
        return [line for line in self.lines if line['kind'] == kind]

    def flush(self) -> None:
        """Returns when all lines are on disk; called before a checkpoint that presumes them.

        Raises:
            RunError: another process has taken the run over.
        """
        if self._writes:
            os.fsync(self._file.fileno())
            self._events.flush()
            self._mirror.upload()
