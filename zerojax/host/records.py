"""What a run writes beside checkpoints and figures: manifest, metrics, hashes."""

import csv
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Sequence
from typing import Any, Self

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from zerojax.host import objectstore
from zerojax.host.errors import UsageError

Record = dict[str, Any]

PACKAGES = (
    'zerojax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'ml-collections',
    'tensorflow-datasets', 'scikit-learn', 'numpy',
)  # fmt: skip


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that the file is at every moment either the old or the new one, whole."""
    text = json.dumps(value, indent=2, allow_nan=False) + '\n'
    if objectstore.in_store(path):
        path.write_text(text)
        return
    beside = path.with_name(path.name + '.tmp')
    with open(beside, 'w') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def read_json(path: pathlib.Path, fields: Sequence[str] = ()) -> Record:
    """Reads an object that has these fields.

    Raises:
        UsageError: it is damaged.
    """
    try:
        value = json.loads(path.read_text())
        missing = [name for name in fields if name not in value]
        if not isinstance(value, dict) or missing:
            raise ValueError(f'lacks {", ".join(missing)}')
    except (ValueError, TypeError) as error:
        raise UsageError(
            f'{path}: cannot be read ({error}); remove it, and the same command makes it anew'
        ) from error
    return value


def write_csv(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows of the same columns."""
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def environment() -> Record:
    """What a result depends on beyond its config: time, process, versions, git revision, devices,
    XLA flags."""
    return {
        'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'pid': os.getpid(),
        'host': platform.node(),
        'platform': platform.platform(),
        'python': platform.python_version(),
        'versions': {name: importlib.metadata.version(name) for name in PACKAGES},
        'git': _git_revision(),
        'device_kind': jax.devices()[0].device_kind,
        'device_count': jax.device_count(),
        'backend': jax.default_backend(),
        'cpu_count': os.cpu_count(),
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
    }


def add_start(path: pathlib.Path, step: int, facts: Record) -> Record:
    """Appends this start, or resume, at `step` to the manifest, and returns the manifest.

    `facts` are what the caller knows: compiler options, execution mode, dataset; the environment is
    added. The manifest's top level repeats the newest start; `starts` has them all.

    Raises:
        UsageError: the manifest is damaged, or the run was started on other data.
    """
    try:
        manifest = json.loads(path.read_text()) if path.exists() else {'starts': []}
        starts = manifest['starts']
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f'--workdir={path.parent}: its manifest.json cannot be read ({error}); '
            'remove that file, or name another folder'
        ) from error
    if starts and starts[0]['dataset'] != facts['dataset']:
        raise UsageError(
            f'--workdir={path.parent}: its run was started on other data, see the hashes in '
            'manifest.json; name another folder'
        )
    start = {'step': step, **environment(), **facts}
    audit = {'audit': manifest['audit']} if 'audit' in manifest else {}
    manifest = {**start, **audit, 'starts': [*starts, start]}
    write_json(path, manifest)
    return manifest


def add_audit(path: pathlib.Path, manifest: Record, audit: Record) -> None:
    """Adds the audit of a run's machine, made once and kept by all later starts."""
    write_json(path, {**manifest, 'audit': audit})


def _git_revision() -> str | None:
    """Revision of the checkout that this code runs from, '+' behind it if changed; else None."""
    here = pathlib.Path(__file__)
    git = ['git', '-C', str(here.parent)]
    output = ''
    for command in (
        [*git, 'ls-files', '--error-unmatch', here.name],
        [*git, 'describe', '--always', '--abbrev=40', '--dirty=+'],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:
            return None  # installed, not a checkout
        output = done.stdout.strip()
    return output


class EventFile:
    """A TensorBoard event file of scalars, written without a thread of its own.

    So a full disk is an error where it is met, which would end tensorboardX's thread unseen.
    """

    def __init__(self, folder: pathlib.Path, step: int) -> None:
        """A new file beside those of earlier starts, whose events beyond `step` are void."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f'events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}'
        self._writer = RecordWriter(str(folder / name))
        self._write(file_version='brain.Event:2')
        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **fields: Any) -> None:
        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds one number."""
        self._write(step=step, summary=scalar(name, value))

    def flush(self) -> None:
        """Writes what is still buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Writes the rest and closes the file."""
        self._writer.close()


class Metrics:
    """`metrics.jsonl`, mirrored in TensorBoard event files.

    A line depends on config and step alone, never on the clock, so a run that was stopped and
    resumed leaves the same bytes as one that was not.
    """

    def __init__(self, workdir: pathlib.Path, step: int, *, writes: bool = True) -> None:
        """Opens the file to go on after `step`; what was written beyond it will be run again.

        -1 starts anew, even if a process was killed before it saved its first checkpoint. Without
        `writes` the lines are kept in memory, and the file, which another process writes, is read.

        Raises:
            UsageError: a line other than the last is damaged.
        """
        self._path = workdir / 'metrics.jsonl'
        self.lines = self._read_until(step)
        self._writes = writes
        if not writes:
            return
        self._mirror = objectstore.Mirror(workdir)
        file = self._mirror.folder / 'metrics.jsonl'
        beside = file.with_name('metrics.jsonl.tmp')
        beside.write_text(''.join(json.dumps(record) + '\n' for record in self.lines))
        os.replace(beside, file)
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


def params_sha256(params: Any) -> str:
    """SHA-256 over the parameters' bytes, parameters in the order of their '/'-joined paths.

    An array counts as its C-ordered, little-endian bytes; names and shapes do not enter.
    """
    digest = hashlib.sha256()
    for _, x in sorted(flatten_dict(params, sep='/').items()):
        array = np.ascontiguousarray(x)
        digest.update(array.astype(array.dtype.newbyteorder('<')).tobytes())
    return digest.hexdigest()


def read_metrics(file: pathlib.Path) -> list[Record]:
    """The whole lines of a `metrics.jsonl`; the last one may be half written.

    Raises:
        ValueError: a line is damaged.
    """
    whole, _, _ = file.read_text().rpartition('\n')
    lines = []
    for number, text in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(text)
            line['step'], line['kind']
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{file.name}, line {number}: damaged') from error
        lines.append(line)
    return lines
