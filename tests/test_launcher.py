"""A sweep on real workers that are killed: it ends with the bits of a sweep on one machine."""

import ast
import contextlib
import csv
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from shell import DIGITS, NOT_OF_A_USER, ROOT, files

pytestmark = pytest.mark.slow

FLAGS = [
    DIGITS, '--config.num_steps=200', '--config.model.name=mlp', '--config.model.width=8',
    '--config.model.convolution=direct', '--config.log_every_steps=5',
    '--config.eval_every_steps=50', '--config.checkpoint_every_steps=10', '--seeds=4',
]  # fmt: skip


@pytest.fixture(scope='module')
def environment():
    return {k: v for k, v in os.environ.items() if k not in NOT_OF_A_USER}


class Sweep(subprocess.Popen):
    """The command, by a process of its own, which prints into a file: workers may outlive it."""

    def __init__(self, environment, workdir, *flags):
        self.output = tempfile.TemporaryFile('w+')
        super().__init__(
            [sys.executable, '-m', 'zerojax.sweep', *FLAGS, f'--workdir={workdir}', *flags],
            stdout=self.output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
        )  # fmt: skip

    def end(self, status=0):
        """What it has printed, once it has ended."""
        self.wait(400)
        with self.output as file:
            file.seek(0)
            output = file.read()
        assert self.returncode == status, output
        return output


@pytest.fixture(scope='module')
def alone(environment, tmp_path_factory):
    """The sweep on this machine, which nobody disturbs."""
    workdir = tmp_path_factory.mktemp('alone')
    Sweep(environment, workdir).end()
    return workdir


def needs(library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f'needs {library}')


@pytest.fixture(scope='module')
def nodes(environment):
    """A cluster of Ray of two nodes: what to write to, and its address."""
    needs('ray')
    with (
        # Short, for names of sockets; what ends last may still write into it.
        tempfile.TemporaryDirectory(prefix='zr', ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            [sys.executable, ROOT / 'tests' / 'ray_nodes.py', folder], text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        ) as process,
    ):  # fmt: skip
        address = process.stdout.readline().strip()
        assert address, 'no cluster could be started'
        yield process, f'--launcher=ray:{address}'
        process.stdin.close()
        process.wait(120)


@pytest.fixture
def submitit(environment):
    """The environment in which jobs of Slurm are processes of this machine."""
    needs('submitit')
    return environment | {'ZEROJAX_SLURM': 'local'}


@pytest.fixture
def slurm(environment, tmp_path_factory):
    """The environment in which the commands of Slurm are those of slurm_commands.py."""
    needs('submitit')
    folder = tmp_path_factory.mktemp('slurm')
    text = (ROOT / 'tests' / 'slurm_commands.py').read_text()
    for name in ('sbatch', 'srun', 'sacct', 'scancel'):
        (folder / name).write_text(f'#!{sys.executable}\n{text}')
        (folder / name).chmod(0o755)
    return environment | {'PATH': f'{folder}:{environment["PATH"]}', 'FOLDER': str(folder)}


def manifest(folder):
    return json.loads((folder / 'manifest.json').read_text())


def in_the_middle(workdir, driver, but=()):
    """Folder of a run that is trained and has saved, as soon as there is one."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert driver.poll() is None, driver.end()
        for folder in workdir.glob('seed=*'):
            saved = [x.name for x in (folder / 'checkpoints').glob('*') if x.name.isdigit()]
            if (
                any(map(int, saved))
                and not (folder / 'summary.json').exists()
                and folder.name not in but
            ):
                return folder
        time.sleep(0.05)
    raise AssertionError('no run is trained')


def whole(workdir, alone, launcher):
    """All is there, and is what a sweep on one machine leaves."""
    tables = []
    for folder in (workdir, alone):
        with open(folder / 'sweep.csv') as file:
            tables.append([{**row, 'seconds': None} for row in csv.DictReader(file)])
    assert tables[0] == tables[1]
    assert len({row['params_sha256'] for row in tables[0]}) == 4
    for undisturbed in alone.glob('seed=*'):
        folder = workdir / undisturbed.name
        metrics = (undisturbed / 'metrics.jsonl').read_bytes()
        assert (folder / 'metrics.jsonl').read_bytes() == metrics
        assert files(folder) == files(undisturbed)
        assert {start['launcher'] for start in manifest(folder)['starts']} == {launcher}
        assert manifest(folder)['host'] == manifest(undisturbed)['host']


def starts(workdir):
    return {folder.name: len(manifest(folder)['starts']) for folder in workdir.glob('seed=*')}


def kill(folder):
    """Ends the worker that trains a run."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(manifest(folder)['pid'], signal.SIGKILL)


def test_runs_of_a_killed_worker_go_on_from_their_checkpoints(environment, alone, nodes, tmp_path):
    driver = Sweep(environment, tmp_path, nodes[1])
    folder = in_the_middle(tmp_path, driver)
    kill(folder)
    output = driver.end()
    whole(tmp_path, alone, 'ray')
    assert 'a worker was lost (' in output
    assert sum(starts(tmp_path).values()) == 5
    assert [start['step'] for start in manifest(folder)['starts']][1] > 0


@pytest.mark.parametrize(
    ('library', 'launcher', 'message'),
    [
        ('ray', 'ray:127.0.0.1:1', 'nobody answers at 127.0.0.1:1 ('),
        ('ray', 'ray:nonsense', 'no Ray cluster can be had ('),
        ('submitit', 'slurm', 'there is no sbatch here; start the sweep on a machine from which'),
    ],
)
def test_a_cluster_that_cannot_be_had_is_one_line(
    environment, tmp_path, library, launcher, message
):
    needs(library)
    workdir = tmp_path / 'sweep'
    output = Sweep(environment, workdir, f'--launcher={launcher}').end(status=2)
    assert output.startswith(f'error: --launcher={launcher}: {message}')
    assert output.count('\n') == 1
    assert not workdir.exists()


def test_workers_that_lack_zerojax_are_a_mistake(environment, nodes, tmp_path):
    """Here they lack a module that this process has."""
    (tmp_path / 'only_here.py').write_text('def train(): ...\n')
    code = f"""
import sys, time, ray
from zerojax.run import on_ray
with on_ray.connect({nodes[1].removeprefix('--launcher=ray:')!r}) as cluster:
    sys.path.append({str(tmp_path)!r})
    import only_here
    ticket = ray.remote(only_here.train).remote()
    while True:
        assert cluster.outcome(ticket) is None
        time.sleep(0.1)
"""
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=environment, cwd=ROOT,
        timeout=300,
    )  # fmt: skip
    assert (
        'UsageError: --launcher=ray: the workers cannot import zerojax (ModuleNotF' in done.stderr
    )


def test_a_driver_that_is_stopped_or_killed_goes_on(environment, alone, nodes, tmp_path):
    driver = Sweep(environment, tmp_path, nodes[1])
    first = in_the_middle(tmp_path, driver)
    driver.terminate()
    said = 'SIGTERM: stopped and saved by the workers; the same command resumes'
    assert said in driver.end(status=143)
    finished = [folder.parent for folder in tmp_path.glob('seed=*/summary.json')]
    assert first not in finished

    driver = Sweep(environment, tmp_path, nodes[1])
    in_the_middle(tmp_path, driver, but=[first.name])
    driver.kill()
    driver.end(status=-signal.SIGKILL)
    finished += [folder.parent for folder in tmp_path.glob('seed=*/summary.json')]

    before = starts(tmp_path)
    Sweep(environment, tmp_path, nodes[1]).end()
    whole(tmp_path, alone, 'ray')
    assert manifest(first)['starts'][1]['step'] > 0
    assert all(starts(tmp_path)[folder.name] == before[folder.name] for folder in finished)


def test_jobs_of_slurm_survive_their_driver_and_are_not_doubled(submitit, alone, tmp_path):
    driver = Sweep(submitit, tmp_path, '--launcher=slurm')
    in_the_middle(tmp_path, driver)
    driver.kill()
    driver.end(status=-signal.SIGKILL)
    output = Sweep(submitit, tmp_path, '--launcher=slurm').end()
    whole(tmp_path, alone, 'slurm')
    assert 'is trained by a worker of before; waiting for it' in output
    assert set(starts(tmp_path).values()) == {1}, 'no run was begun twice'


def test_the_runs_of_a_killed_job_are_submitted_again(submitit, alone, tmp_path):
    driver = Sweep(submitit, tmp_path, '--launcher=slurm')
    kill(in_the_middle(tmp_path, driver))
    assert 'a worker was lost (' in driver.end()
    whole(tmp_path, alone, 'slurm')
    assert sum(starts(tmp_path).values()) == 5


def test_tasks_are_an_array_of_slurm_which_is_cancelled_and_goes_on(slurm, alone, tmp_path):
    driver = Sweep(slurm, tmp_path, '--launcher=slurm')
    folder = in_the_middle(tmp_path, driver)
    driver.terminate()
    driver.end(status=143)
    assert not (folder / 'summary.json').exists()
    Sweep(slurm, tmp_path, '--launcher=slurm').end()
    whole(tmp_path, alone, 'slurm')
    assert manifest(folder)['starts'][1]['step'] > 0
    submitted = pathlib.Path(slurm['FOLDER'], 'submitted').read_text()
    arrays = [ast.literal_eval(line) for line in submitted.splitlines()]
    assert arrays[0]['array'] == '0-3%4', 'each run is a task of its own'
    for options in arrays:
        assert 'exclusive' in options, 'all cores of a node'
        assert options['time'] == '1440'


def test_a_killed_node_takes_no_run_with_it(environment, alone, nodes, tmp_path):
    """The last test, for afterwards the cluster has one node."""
    process, launcher = nodes
    driver = Sweep(environment, tmp_path, launcher)
    first = in_the_middle(tmp_path, driver)
    in_the_middle(tmp_path, driver, but=[first.name])  # both nodes have one
    process.stdin.write('kill\n')
    process.stdin.flush()
    assert process.stdout.readline() == 'killed\n'
    assert 'a worker was lost (' in driver.end()
    whole(tmp_path, alone, 'ray')
