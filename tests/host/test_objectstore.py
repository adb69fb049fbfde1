"""Runs in gs://BUCKET/RUN, on the store of object_store.py, which all three clients reach."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import object_store
import pytest

from zerojax.host.errors import UsageError
from zerojax.run import cli

ROOT = pathlib.Path(__file__).parents[2]
# 24 checkpoints, so that a signal does not come too late.
TOY = [
    f'--config={ROOT}/configs/digits.py', '--config.num_steps=120', '--config.model.name=mlp',
    '--config.model.width=32', '--config.model.convolution=direct', '--config.log_every_steps=10',
    '--config.eval_every_steps=40', '--config.checkpoint_every_steps=5',
]  # fmt: skip


@pytest.fixture
def store():
    with object_store.Store('bucket') as store:
        yield store


def start(store, *arguments, **extra):
    return subprocess.Popen(
        [sys.executable, '-m', 'zerojax.main', *map(str, arguments)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | store.environment | extra,
    )  # fmt: skip


def run(store, *arguments, status=0, **extra):
    process = start(store, *arguments, **extra)
    output, errors = process.communicate(timeout=150)
    assert process.returncode == status, errors
    # TensorStore says in C++ that it found no credentials, which this store does not ask for.
    errors = re.sub(r'^E\d+ .*google_auth_provider.*\n\n?', '', errors, flags=re.M)
    return output if status == 0 else errors


def wait_for_checkpoint(store, step, *processes):
    deadline = time.monotonic() + 120
    while not store.names('bucket', f'run/checkpoints/{step}/commit_success.txt'):
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def read(store, name):
    return store.read('bucket', f'run/{name}')


def checkpoints(store):
    names = store.names('bucket', 'run/checkpoints/')
    return {int(name.split('/')[2]) for name in names}


@pytest.fixture(scope='module')
def local(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('local')
    with object_store.Store() as none:
        run(none, *TOY, f'--workdir={workdir}')
    return workdir


def check_same(store, workdir):
    theirs = json.loads((workdir / 'summary.json').read_text())
    ours = json.loads(read(store, 'summary.json'))
    assert {**ours, 'seconds': 0} == {**theirs, 'seconds': 0}
    assert ours['params_sha256']
    assert read(store, 'metrics.jsonl') == (workdir / 'metrics.jsonl').read_bytes()


@pytest.fixture(scope='module')
def finished():
    with object_store.Store('bucket') as store:
        output = run(store, *TOY, '--workdir=gs://bucket/run')
        assert 'starting at step 0 of 120 in gs://bucket/run' in output
        return dict(store.objects['bucket'])


@pytest.mark.slow
def test_a_run_is_the_same_there(store, local, finished):
    store.objects['bucket'] |= finished
    check_same(store, local)
    assert checkpoints(store) == {110, 115, 120}, 'the newest three'
    assert read(store, 'config.json') == (local / 'config.json').read_bytes()
    assert json.loads(read(store, 'manifest.json'))['starts'][0]['step'] == 0
    assert read(store, 'figures/run.png').startswith(b'\x89PNG')
    (events,) = store.names('bucket', 'run/tensorboard/events.out.tfevents.')
    (theirs,) = (local / 'tensorboard').iterdir()
    assert len(store.read('bucket', events)) > 1000
    assert theirs.stat().st_size == len(store.read('bucket', events))

    # A finished run stays as it is, and no other config may use its workdir.
    assert 'RESUMING at step 120 of 120' in run(store, *TOY, '--workdir=gs://bucket/run')
    check_same(store, local)
    errors = run(store, *TOY, '--config.seed=5', '--workdir=gs://bucket/run', status=2)
    assert re.fullmatch(
        r'error: --workdir=gs://bucket/run: .*seed is 0 there and 5 here.*\n', errors
    )
    assert not (ROOT / 'gs:').exists()


@pytest.mark.slow
def test_a_run_goes_on_in_a_folder_and_in_the_store_where_it_was_copied_to(
    store, local, finished, tmp_path
):
    """As `gcloud storage rsync` copies."""
    store.objects['bucket'] |= {
        f'run/{file.relative_to(local)}': (1, file.read_bytes())
        for file in local.rglob('*')
        if file.is_file() and not {'120', 'summary.json'} & {*file.relative_to(local).parts}
    }
    for name in store.names('bucket', 'run/'):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(store.read('bucket', name))
    for workdir in ('gs://bucket/run', tmp_path / 'run'):
        assert 'RESUMING at step 115 of 120' in run(store, *TOY, f'--workdir={workdir}')
    check_same(store, local)
    check_same(store, tmp_path / 'run')


def test_other_commands_refuse_it():
    with pytest.raises(UsageError, match=r'^--workdir=gs://bucket/run: .* only zerojax\.main'):
        cli.parse_flags(['sweep', *TOY, '--workdir=gs://bucket/run'])


@pytest.mark.slow
def test_killed_again_and_again_it_ends_the_same(store, local):
    for step in (5, 30):
        process = start(store, *TOY, '--workdir=gs://bucket/run')
        wait_for_checkpoint(store, step, process)
        process.kill()
        process.communicate()
    assert re.search(r'RESUMING at step \d+ of 120', run(store, *TOY, '--workdir=gs://bucket/run'))
    check_same(store, local)
    assert len(json.loads(read(store, 'manifest.json'))['starts']) == 3


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_resumes(store, local):
    process = start(store, *TOY, '--workdir=gs://bucket/run')
    wait_for_checkpoint(store, 10, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    stopped_at = int(re.search(r'stopped and saved at step (\d+)', errors)[1])
    assert max(checkpoints(store)) == stopped_at
    assert not store.names('bucket', 'run/summary.json')
    output = run(store, *TOY, '--workdir=gs://bucket/run')
    assert f'RESUMING at step {stopped_at} of 120' in output
    check_same(store, local)


@pytest.mark.slow
def test_a_checkpoint_that_is_damaged_is_set_aside_and_one_that_is_not_complete_removed(
    store, local, finished
):
    store.objects['bucket'] |= finished
    for name in store.names('bucket', 'run/checkpoints/120/'):
        store.objects['bucket'][name] = (1000, b'')
    for name in store.names('bucket', 'run/checkpoints/115/commit_success.txt'):
        del store.objects['bucket'][name]
    output = run(store, *TOY, '--workdir=gs://bucket/run')
    assert 'checkpoint 120 is damaged' in output or '/120 is damaged' in output
    assert 'moved to gs://bucket/run/damaged_checkpoints/120' in output
    assert 'RESUMING at step 110 of 120' in output
    assert store.names('bucket', 'run/damaged_checkpoints/120/')
    assert checkpoints(store) == {110, 115, 120}
    check_same(store, local)


@pytest.mark.slow
def test_the_process_that_comes_later_takes_the_run_over(store, local):
    first = start(store, *TOY, '--workdir=gs://bucket/run')
    wait_for_checkpoint(store, 10, first)
    first.send_signal(signal.SIGSTOP)  # so that it does not finish meanwhile
    run(store, *TOY, '--workdir=gs://bucket/run')
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 1, errors
    assert re.search(
        r'^error: gs://bucket/run: taken over by process \d+ on \S+, which .*\n\Z', errors, re.M
    )
    check_same(store, local)


@pytest.mark.slow
def test_a_store_that_refuses_in_the_middle_ends_the_run_with_one_line(store, local):
    process = start(store, *TOY, '--workdir=gs://bucket/run')
    wait_for_checkpoint(store, 10, process)
    store.forbidden.add('bucket')
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r'^error: gs://bucket/run.*the same command goes on', errors, re.M), errors
    assert 'Traceback' not in errors
    store.forbidden.clear()
    run(store, *TOY, '--workdir=gs://bucket/run')
    check_same(store, local)


def closed_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return f'http://127.0.0.1:{listener.getsockname()[1]}'


@pytest.mark.slow
@pytest.mark.parametrize(
    'workdir,change,message',
    [
        ('gs://other/run', {}, r'the bucket cannot be opened \(404 .*other'),
        ('gs://bucket', {}, r'must be a folder or gs://BUCKET/RUN'),
        ('s3://bucket/run', {}, r'must be a folder or gs://BUCKET/RUN'),
        (
            'gs://bucket/run',
            {'STORAGE_EMULATOR_HOST': 'closed'},
            r'the bucket cannot be opened \(.*refused',
        ),
        (
            'gs://bucket/run',
            {'STORAGE_EMULATOR_HOST': '', 'HOME': '/nowhere'},
            r'the bucket cannot be opened \(.*credentials',
        ),
        ('gs://bucket/run', {'PYTHONPATH': 'without'}, r"needs gcsfs; pip install -e '\.\[gcs\]'"),
        ('gs://readonly/run', {}, r'cannot be written \(Forbidden'),
    ],
)
def test_a_store_that_cannot_be_had_is_one_line_before_anything_is_trained(
    store, tmp_path, workdir, change, message
):
    (tmp_path / 'gcsfs.py').write_text('raise ImportError(name="gcsfs")')
    store.objects['readonly'] = {}
    store.forbidden.add('readonly')
    change = {
        name: {'closed': closed_port(), 'without': str(tmp_path)}.get(value, value)
        for name, value in change.items()
    }
    began = time.monotonic()
    errors = run(store, *TOY, f'--workdir={workdir}', status=2, **change)
    assert re.fullmatch(f'error: --workdir={workdir}: .*{message}.*\n', errors), errors
    assert time.monotonic() - began < 30
    assert store.objects['bucket'] == {}


@pytest.mark.slow
def test_two_processes_killed_resume_to_the_same_weights_and_records(store, tmp_path):
    def start_two(*flags):
        with socket.socket() as listener:
            listener.bind(('127.0.0.1', 0))
            address = f'127.0.0.1:{listener.getsockname()[1]}'
        return [
            start(
                store, *TOY, '--config.mesh.data=2', *flags,
                f'--distributed={address},2,{i}', '--distributed_timeout=60',
            )
            for i in range(2)
        ]  # fmt: skip

    def finish(processes):
        outputs = [process.communicate(timeout=150) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        return outputs[0][0]

    finish(start_two(f'--workdir={tmp_path}'))
    processes = start_two('--workdir=gs://bucket/run')
    wait_for_checkpoint(store, 10, *processes)
    for process in processes:
        process.kill()
        process.communicate()
    assert re.search(r'RESUMING at step \d+', finish(start_two('--workdir=gs://bucket/run')))
    check_same(store, tmp_path)
