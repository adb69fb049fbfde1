"""Workdirs on Google Cloud Storage, gs://BUCKET/RUN.

A store replaces an object whole and at once, so a reader sees the old or the new one. It has no
locks, no appending and no renaming: what is appended to is kept in a local folder and copied whole,
and of two processes in one workdir the later one takes it over, see `Mirror`.
"""

import contextlib
import logging
import os
import pathlib
import platform
import tempfile
import uuid
from collections.abc import Iterator

from zerojax.host.errors import RunError, UsageError

SCHEME = 'gs://'
TIMEOUT = 20  # seconds for the first request, which is not tried again
# Packages whose exceptions mean that the store cannot be had, not that this program is wrong.
CLIENTS = ('aiohttp', 'fsspec', 'gcsfs', 'google', 'requests')


def in_store(path: pathlib.PurePath) -> bool:
    """Whether the path was opened by `open_workdir`."""
    return str(path).startswith(SCHEME)


def open_workdir(where: str) -> pathlib.Path:
    """gs://BUCKET/RUN as a path with the methods of `pathlib.Path`, as far as a run needs them.

    Raises:
        UsageError: it is no such address, the clients are missing, or the bucket cannot be had.
    """
    bucket, _, run = where.removeprefix(SCHEME).partition('/')
    if not (where.startswith(SCHEME) and bucket and run.strip('/')):
        raise UsageError(f'--workdir={where}: must be a folder or {SCHEME}BUCKET/RUN')
    # One way to the store, whatever else is installed and of whatever kind the bucket is.
    os.environ['EPATH_USE_TF'] = 'false'
    os.environ['GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT'] = 'false'
    try:
        import fsspec
        import gcsfs  # noqa: F401  # etils finds it through fsspec
        from etils import epath
        from google.cloud import storage  # which Orbax asks about the bucket
    except ImportError as error:
        raise UsageError(
            f"--workdir={where}: needs {error.name}; pip install -e '.[gcs]'"
        ) from error
    for name in ('gcsfs', 'google'):  # they log, with stack traces, what they raise as well
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Other processes and TensorStore write there too, so what was listed before may be old.
    fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
    try:
        with storage.Client() as client:
            client.get_bucket(bucket, timeout=TIMEOUT, retry=None)
    except Exception as error:  # of Google's clients, credentials and network, of many kinds
        raise UsageError(
            f'--workdir={where}: the bucket cannot be opened ({one_line(error)})'
        ) from error
    return epath.Path(where)


def one_line(error: Exception) -> str:
    """What an exception says, or else what it is."""
    return ' '.join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def failures(workdir: pathlib.Path) -> Iterator[None]:
    """Makes a RunError of what the clients raise when they cannot reach the store."""
    try:
        yield
    except Exception as error:
        ours = isinstance(error, OSError) or type(error).__module__.split('.')[0] in CLIENTS
        if not (in_store(workdir) and ours):
            raise
        raise RunError(
            f'{workdir}: {one_line(error)}; mend that, and the same command goes on'
        ) from error


def move(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies all objects of a folder to `target`, instead of what is there, then removes them."""
    import fsspec

    store = fsspec.filesystem('gcs')
    if target.exists():
        store.rm(str(target), recursive=True)
    store.mv(str(source), str(target), recursive=True)


class Mirror:
    """A local folder of the files that are appended to; `upload` brings them into the workdir.

    A workdir that is not in a store is that folder itself.

    There is no lock. Who opened a mirror last owns the run; another process finds out before its
    next upload, and so before its next checkpoint, and ends. Between its look and its upload it
    may still write once.
    """

    def __init__(self, workdir: pathlib.Path) -> None:
        """Makes this process the owner of a run in a store."""
        self._workdir = workdir
        self._temporary = None
        self.folder = workdir
        if in_store(workdir):
            self._temporary = tempfile.TemporaryDirectory(prefix='zerojax_')
            self.folder = pathlib.Path(self._temporary.name)
            self._owner = f'process {os.getpid()} on {platform.node()}\n{uuid.uuid4().hex}\n'
            self._uploaded: dict[pathlib.Path, int] = {}  # sizes; files only grow
            (workdir / 'owner').write_text(self._owner)

    def upload(self) -> None:
        """Returns when all files of the folder are in the workdir.

        Raises:
            RunError: another process has taken the run over.
        """
        if self._temporary is None:
            return
        owner = (self._workdir / 'owner').read_text()
        if owner != self._owner:
            name = owner.partition('\n')[0]
            raise RunError(f'{self._workdir}: taken over by {name}, which trains in it now')
        for file in self.folder.rglob('*'):
            if file.is_file() and file.stat().st_size != self._uploaded.get(file):
                content = file.read_bytes()
                (self._workdir / file.relative_to(self.folder)).write_bytes(content)
                self._uploaded[file] = len(content)

    def close(self) -> None:
        """Uploads the rest and removes the local folder."""
        if self._temporary is None:
            return
        try:
            self.upload()
        finally:
            self._temporary.cleanup()
