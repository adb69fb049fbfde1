"""Several devices, in one process and in two."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from zerojax import sweep
from zerojax.host.errors import UsageError
from zerojax.run import building, train

ROOT = pathlib.Path(__file__).parents[2]
SHORT = [
    f'--config={ROOT}/configs/digits.py', '--config.num_steps=24', '--config.model.depth=7',
    '--config.log_every_steps=4', '--config.eval_every_steps=8',
    '--config.checkpoint_every_steps=4', '--config.steps_per_call=2',
]  # fmt: skip
# Nothing that amplifies rounding: the random control in float64, without noise.
CALM = ['--config.model.init=random', '--config.perturbation.kind=none', '--config.num_steps=8']


def environment(devices):
    # Without the cache of the tests: as by default, processes that share a run compile alike.
    kept = {name: x for name, x in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'}
    # Devices share the cores of one machine, and XLA ends a process when some of them wait for the
    # others longer than its 40 seconds: a machine that stood still is not a deadlock.
    flags = (
        f'--xla_force_host_platform_device_count={devices} '
        '--xla_cpu_collective_call_terminate_timeout_seconds=240'
    )
    return kept | {'XLA_FLAGS': flags}


def command(*arguments, module='main', program=None):
    return [sys.executable, *(program or ['-m', f'zerojax.{module}']), *map(str, arguments)]


def run(devices, *arguments, module='main'):
    done = subprocess.run(
        command(*arguments, module=module), env=environment(devices), cwd=ROOT, timeout=300,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def read(workdir, name='summary.json'):
    return json.loads((workdir / name).read_text())


@pytest.mark.slow
def test_eight_devices_share_a_batch_and_normalise_by_the_whole_of_it(tmp_path):
    losses = {}
    for devices, share in ((1, 1), (8, 8)):
        workdir = tmp_path / str(devices)
        flags = [*SHORT, *CALM, f'--config.mesh.data={share}', '--config.param_dtype=float64']
        run(devices, *flags, f'--workdir={workdir}')
        losses[devices] = read(workdir)['train_loss']
        mesh = read(workdir, 'manifest.json')['execution']['mesh']
        assert mesh == (None if share == 1 else {'run': 1, 'data': 8})
    assert losses[8] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.slow
def test_eight_devices_share_four_runs_and_their_batches(tmp_path):
    grid = ['--grid.perturbation.scale=0.0,1e-6,1e-5,1e-3', '--runs_at_once=4']
    flags = [*SHORT, *grid, '--config.mesh.data=2', f'--workdir={tmp_path}']
    run(8, *flags, module='sweep')
    summaries = [
        read(tmp_path / f'perturbation.scale={scale}') for scale in ('0.0', '1e-06', '0.001')
    ]
    assert summaries[0]['asymmetry'] == 0.0, 'to the bit, on eight devices too'
    assert summaries[0]['asymmetry'] < summaries[1]['asymmetry'] < summaries[2]['asymmetry']
    mesh = read(tmp_path / 'perturbation.scale=1e-06', 'manifest.json')['execution']['mesh']
    assert mesh == {'run': 4, 'data': 2}


def test_devices_that_do_not_fit_are_refused(tiny_config, tmp_path):
    assert jax.device_count() == 2
    tiny_config.mesh.data = 3
    with pytest.raises(UsageError, match=r'^mesh\.data=3: must be at most 2, the dev'):
        train.train(tiny_config, tmp_path / 'run')
    tiny_config.mesh.data = 2
    tiny_config.batch_size = 33
    with pytest.raises(UsageError, match=r'^mesh\.data=2: must divide batch_size=33 evenly'):
        train.train(tiny_config, tmp_path / 'run')
    assert list(tmp_path.iterdir()) == []


def test_runs_take_the_devices_that_a_batch_leaves(tiny_config):
    shapes = {}
    for share in (1, 2):
        tiny_config.mesh.data = share
        for runs in (None, 2, 3):
            mesh = building.build_mesh(tiny_config, runs)
            shapes[share, runs] = mesh and tuple(mesh.shape.values())
    assert shapes == {
        (1, None): None, (1, 2): (2, 1), (1, 3): None,
        (2, None): (1, 2), (2, 2): (1, 2), (2, 3): (1, 2),
    }  # fmt: skip


# Two processes.


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def start_two(workdir, *flags, module='main', program=None, share=2):
    address = f'127.0.0.1:{free_port()}'
    toy = [
        '--config.model.name=mlp', '--config.model.width=32', '--config.model.convolution=direct'
    ]  # fmt: skip
    shared = [*SHORT, *toy, f'--config.mesh.data={share}', f'--workdir={workdir}', *flags]
    return [
        subprocess.Popen(
            command(
                *shared, f'--distributed={address},2,{i}', '--distributed_timeout=60',
                module=module, program=program,
            ),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(1), cwd=ROOT,
        )
        for i in range(2)
    ]  # fmt: skip


def finish(processes):
    outputs = [process.communicate(timeout=150) for process in processes]
    errors = '\n'.join(error for _, error in outputs)
    assert [process.returncode for process in processes] == [0, 0], errors
    return [output for output, _ in outputs]


def wait_for_checkpoint(workdir, step, processes):
    deadline = time.monotonic() + 120
    while not (workdir / 'checkpoints' / str(step)).is_dir():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('undisturbed')
    first, second = finish(start_two(workdir))
    assert 'starting at step 0 of 24' in first
    assert 'step' not in second, 'only the first process says anything'
    return workdir


@pytest.mark.slow
def test_two_processes_train_one_run(undisturbed):
    execution = read(undisturbed, 'manifest.json')['execution']
    assert execution['processes'] == 2
    assert execution['mesh'] == {'run': 1, 'data': 2}
    assert len(read(undisturbed, 'manifest.json')['starts']) == 1
    assert read(undisturbed)['step'] == 24
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {
        '.lock', 'config.json', 'manifest.json', 'metrics.jsonl', 'summary.json', 'checkpoints',
        'tensorboard', 'figures',
    }  # fmt: skip


@pytest.mark.slow
def test_both_killed_they_resume_to_the_same_weights_and_records(undisturbed, tmp_path):
    processes = start_two(tmp_path)
    wait_for_checkpoint(tmp_path, 8, processes)
    for process in processes:
        process.kill()
        process.communicate()
    first, _ = finish(start_two(tmp_path))
    assert re.search(r'RESUMING at step \d+ of 24', first)
    assert read(tmp_path)['params_sha256'] == read(undisturbed)['params_sha256']
    metrics = 'metrics.jsonl'
    assert (tmp_path / metrics).read_bytes() == (undisturbed / metrics).read_bytes()


@pytest.mark.slow
def test_two_processes_share_the_runs_of_a_sweep(tmp_path):
    flags = ['--seeds=2', '--runs_at_once=2', '--config.num_steps=4']
    first, second = finish(start_two(tmp_path, *flags, module='sweep', share=1))
    assert 'sweep.csv: 2 of 2 runs' in first
    assert 'sweep.csv' not in second
    mesh = read(tmp_path / 'seed=1', 'manifest.json')['execution']['mesh']
    assert mesh == {'run': 2, 'data': 1}
    hashes = {read(tmp_path / f'seed={i}')['params_sha256'] for i in range(2)}
    assert len(hashes) == 2
    flags = ['--seeds=3', '--runs_at_once=2']
    processes = start_two(tmp_path / 'other', *flags, module='sweep', share=1)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert '--runs_at_once=2: must divide the number of unfinished runs' in errors[0]


# The first draws for 8 seconds; whoever waits at the exit may wait for 3.
SLOW_TO_DRAW = """
import sys, time
from zerojax import main
from zerojax.host import distributed, figures
distributed.END_TIMEOUT = 3
draw = figures.draw_run
figures.draw_run = lambda *arguments: (time.sleep(8), draw(*arguments))
sys.exit(main.main(['main', *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_the_others_wait_while_the_first_alone_still_writes(tmp_path):
    finish(start_two(tmp_path, '--config.num_steps=4', program=['-c', SLOW_TO_DRAW]))
    assert (tmp_path / 'figures' / 'run.png').exists()


@pytest.mark.slow
def test_a_signal_to_one_stops_both(tmp_path):
    processes = start_two(tmp_path, '--config.num_steps=100000')
    wait_for_checkpoint(tmp_path, 4, processes)
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143]
    steps = {re.search(r'SIGTERM: stopped and saved at step (\d+)', error)[1] for error in errors}
    assert len(steps) == 1
    assert (tmp_path / 'checkpoints' / steps.pop()).is_dir()


@pytest.mark.slow
def test_a_mistake_ends_both(undisturbed):
    processes = start_two(undisturbed, '--config.optimizer.learning_rate=0.5')
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert 'optimizer.learning_rate is 0.1 there and 0.5 here' in errors[0]
    assert 'another process of this run found a mistake' in errors[1]


@pytest.mark.slow
@pytest.mark.parametrize('process', [0, 1])
def test_a_process_that_never_comes_is_an_error_after_the_timeout(tmp_path, process):
    where = f'127.0.0.1:{free_port()},2,{process}'
    done = subprocess.run(
        command(
            *SHORT, f'--distributed={where}', '--distributed_timeout=3', f'--workdir={tmp_path}/run'
        ),
        capture_output=True, text=True, timeout=60, env=environment(1), cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f'error: --distributed={where}: not all processes came within 3 s'
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'where',
    ['host', 'host,2,0', 'host:1,2,2', 'host:x,2,0', ':1,2,0', 'host:²,2,0', 'host:65536,2,0',
     f'host:1,{"9" * 5000},0'],
    ids=lambda where: where[:20],
)  # fmt: skip
def test_a_wrong_address_is_a_mistake(where, capsys):
    assert sweep.main(['sweep', *SHORT, f'--distributed={where}']) == 2
    assert f"--distributed={where}: must be 'auto' or HOST:PORT,N,I" in capsys.readouterr().err


def test_an_error_of_jax_without_a_message_is_one_line(monkeypatch, capsys):
    def fail(**arguments):
        raise RuntimeError

    monkeypatch.setattr(jax.distributed, 'initialize', fail)
    assert sweep.main(['sweep', *SHORT, '--distributed=auto']) == 2
    assert capsys.readouterr().err == 'error: --distributed=auto: RuntimeError\n'
