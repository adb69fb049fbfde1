import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zerojax.host.event_file import EventFile


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_later_start_comes_last_whatever_the_clock_says(tmp_path, monkeypatch):
    """TensorBoard reads files in the order of their names and drops what a later start redoes."""
    (tmp_path / 'events.out.tfevents.4x.of.someone.else').touch()
    clock = iter([5_000, 4_000, 3_000])
    monkeypatch.setattr(time, 'time_ns', lambda: next(clock))
    for value in (1.0, 2.0, 3.0):
        events = EventFile(tmp_path, step=0)
        events.scalar('loss', value, 1)
        events.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(each.step, each.value) for each in found.Scalars('loss')] == [(1, 3.0)]
