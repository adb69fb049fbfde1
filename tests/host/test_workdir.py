"""The lock of a workdir: one process at a time, and gone with it however it ends."""

import os
import pathlib
import subprocess
import sys

import pytest

from zerojax.host.errors import UsageError
from zerojax.host.workdir import Workdir, lock

HOLDER = """
import os, pathlib, sys, time
from zerojax.host.workdir import lock
held = lock(pathlib.Path(sys.argv[1]))
child = os.fork() if sys.argv[2] == 'forks' else 1
if child == 0:
    os.close(1); os.close(2)
print(child, flush=True)
time.sleep(100)
"""


def holder(folder, what='waits'):
    process = subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', HOLDER, str(folder), what],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return process, int(process.stdout.readline())


def refused(folder):
    with pytest.raises(UsageError, match='another process is training in it; wait for it or name'):
        lock(folder)


@pytest.mark.parametrize('end', ['terminate', 'kill'])
def test_a_lock_ends_with_its_process(tmp_path, end):
    process, _ = holder(tmp_path)
    refused(tmp_path)
    getattr(process, end)()
    process.communicate()
    lock(tmp_path).release()
    assert [x.name for x in tmp_path.iterdir()] == ['.lock']


def test_a_process_that_the_holder_forked_does_not_keep_it(tmp_path):
    """A pool of workers may outlive the process that a user kills."""
    process, child = holder(tmp_path, 'forks')
    try:
        refused(tmp_path)
        process.kill()
        process.communicate()
        lock(tmp_path).release()
    finally:
        os.kill(child, 9)


def test_two_in_one_process_exclude_each_other_in_any_thread(tmp_path):
    with Workdir(tmp_path, {}):
        refused(tmp_path)
    with Workdir(tmp_path, {}):
        pass
    assert sorted(x.name for x in tmp_path.iterdir()) == ['.lock', 'config.json']


@pytest.mark.parametrize('what', ['folder', 'link', 'pipe'])
def test_what_is_no_lock_file_is_a_mistake_and_stays(tmp_path, what):
    file = tmp_path / '.lock'
    make = {
        'folder': file.mkdir,
        'link': lambda: file.symlink_to(tmp_path / 'elsewhere'),
        'pipe': lambda: os.mkfifo(file),
    }[what]
    make()
    if what == 'pipe':
        lock(tmp_path).release()
    else:
        with pytest.raises(UsageError, match='cannot be written'):
            lock(tmp_path)
    assert [x.name for x in tmp_path.iterdir()] == ['.lock']


def test_where_no_file_can_be_made_nobody_is_said_to_train():
    with pytest.raises(UsageError, match=r'^--workdir=/proc: cannot be written; name another'):
        lock(pathlib.Path('/proc'))
