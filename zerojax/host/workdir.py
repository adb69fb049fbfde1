"""The folder of one run: made, locked, and never shared with a run of another config."""

import json
import os
import pathlib
from typing import Any, Self

import filelock
from flax.traverse_util import flatten_dict

from zerojax.host import objectstore
from zerojax.host.errors import UsageError
from zerojax.host.manifest import read_starts
from zerojax.host.records import Record, write_json


class InUse(UsageError):
    """Another process is training in the folder."""


def lock(path: pathlib.Path) -> filelock.FileLock:
    """Makes the folder if need be; its lock, which ends with the process however that ends.

    A process that this one forks does not share it.

    Raises:
        InUse: another process has it.
        UsageError: it cannot be written.
    """
    file = path / '.lock'
    # A lock that is not the operating system's own would outlive a process that is killed.
    held = filelock.FileLock(file, blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        path.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except filelock.Timeout:
        if not file.exists():  # where no file can be made, filelock waits for one to be
            raise UsageError(f'--workdir={path}: cannot be written; name another folder') from None
        raise InUse(
            f'--workdir={path}: another process is training in it; wait for it or name another '
            'folder'
        ) from None
    except OSError as error:
        raise UsageError(
            f'--workdir={path}: cannot be written ({error.strerror}); name another folder'
        ) from error
    return held


def _content(field: str, value: Any) -> Any:
    """What of a field's value makes runs different ones.

    Where data lie does not: the manifest has their hash. Nor does how a path is spelled, or of how
    many epochs the steps are.
    """
    if field in ('dataset.data_dir', 'num_epochs'):
        return None
    return os.path.realpath(value) if field == 'pruning.source' and value else value


class Workdir:
    """A folder that holds one run, locked while this object is open.

    On object storage there is no lock; see `zerojax.host.objectstore.Mirror`.
    """

    def __init__(self, path: pathlib.Path, config: Record) -> None:
        """Locks the folder and makes sure that it is new or holds a run of the same config.

        Raises:
            InUse: another process is training in it.
            UsageError: it cannot be written, or holds a run of another config.
        """
        self.path = path
        self._lock = None if objectstore.in_store(path) else lock(path)
        try:
            self._claim(config)
        except OSError as error:
            self._unlock()
            reason = error.strerror or objectstore.one_line(error)
            raise UsageError(f'--workdir={path}: cannot be written ({reason})') from error
        except BaseException:
            self._unlock()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _version(self) -> str:
        """That by which the run was started, as far as its manifest tells."""
        starts = read_starts(self.path / 'manifest.json')
        return f'zerojax {starts[0]["versions"]["zerojax"]}' if starts else 'another version'

    def _claim(self, config: Record) -> None:
        file = self.path / 'config.json'
        if not file.exists():
            remains = [
                name
                for name in ('checkpoints', 'metrics.jsonl', 'manifest.json', 'summary.json')
                if (self.path / name).exists()
            ]
            if remains:
                raise UsageError(
                    f'--workdir={self.path}: holds {", ".join(remains)} but no config.json; '
                    'name another folder'
                )
            write_json(file, config)
            return
        try:
            theirs = flatten_dict(json.loads(file.read_text()), sep='.')
        except (ValueError, AttributeError, AssertionError, OSError) as error:
            raise UsageError(
                f'--workdir={self.path}: its config.json cannot be read ({error}); '
                'name another folder'
            ) from error
        ours = flatten_dict(config, sep='.')
        unknown = ', '.join(sorted(theirs.keys() ^ ours.keys()))
        if unknown:
            raise UsageError(
                f'--workdir={self.path}: holds a run of {self._version()}, whose config has other '
                f"fields than this version's ({unknown}); finish it with that version, or name "
                'another folder'
            )
        differing = [
            f'{field} is {json.dumps(theirs[field])} there and {json.dumps(ours[field])} here'
            for field in sorted(ours)
            if _content(field, theirs[field]) != _content(field, ours[field])
        ]
        if differing:
            raise UsageError(
                f'--workdir={self.path}: holds a run of another config ({"; ".join(differing)}); '
                'name another folder'
            )
