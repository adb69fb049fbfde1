"""TensorBoard event files."""

import os
import pathlib
import platform
import time
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar


class EventFile:
    """A TensorBoard event file of scalars, written without a thread of its own.

    So a full disk is an error where it is met, which would end tensorboardX's thread unseen.
    """

    def __init__(self, folder: pathlib.Path, step: int) -> None:
        """A new file beside those of earlier starts, whose events beyond `step` are void."""
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads in the order of names, so a new file comes last whatever the clock says.
        times = [x.name.split('.')[3] for x in folder.glob('events.out.tfevents.*')]
        now = max([time.time_ns(), *(int(each) + 1 for each in times if each.isdecimal())])
        name = f'events.out.tfevents.{now}.{platform.node()}.{os.getpid()}'
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
