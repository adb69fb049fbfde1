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


def read_until(path: pathlib.Path, step: int) -> list[Record]:
    """The lines of a metrics.jsonl up to a step; none if there is no file.

    Raises:
        UsageError: a line is damaged, but for a last one that a process left half written.
    """
    if not path.exists():
        return []
    kept = []
    texts = path.read_bytes().splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            if line['step'] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(texts):
                break
            raise UsageError(
                f'--workdir={path.parent}: line {number} of metrics.jsonl is damaged; '
                'name another folder'
            ) from error
    return kept


def lines_sha256(lines: list[Record]) -> str:
    """Hash of lines, as they are in the file."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update((json.dumps(line) + '\n').encode())
    return digest.hexdigest()


class MetricsLog:
    """`metrics.jsonl`, mirrored in TensorBoard event files.

    A line depends on config and step alone, never on the clock, so a run that was stopped and
    resumed leaves the same bytes as one that was not.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        step: int,
        *,
        writes: bool = True,
    ) -> None:
        """Opens the file to go on after `step`; what was written beyond it will be run again.

        -1 starts anew, even if a process was killed before it saved its first checkpoint. Without
        `writes` the lines are kept in memory, and the file, which another process writes, is read.

        Raises:
            UsageError: a line other than the last is damaged.
        """
        self._path = workdir / 'metrics.jsonl'
        self.lines = read_until(self._path, step)
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
        """`lines_sha256` of all lines."""
        return lines_sha256(self.lines)

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
