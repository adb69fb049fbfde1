"""A sweep on a cluster: how it is cut into tasks, and what becomes of runs whose worker is lost."""

import importlib.util
import io
import json
import pathlib
import platform
import re
import signal
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerojax import config as config_lib
from zerojax.host import workdir as workdir_lib
from zerojax.host.errors import RunError, UsageError
from zerojax.host.progress import Progress
from zerojax.host.stop import Stopped
from zerojax.run import launch, many, worker
from zerojax.run.watch import Watch, WatchedRun
from zerojax.run.worker import Lost, Outcome

SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=6)


def groups_of(sizes):
    """Groups of so many runs, each with its group and its place in it."""
    return [[(g, i) for i in range(size)] for g, size in enumerate(sizes)]


@settings(deadline=None)  # of a machine that has other work
@given(SIZES, st.integers(1, 30), st.integers(1, 5))
def test_each_run_is_in_one_task_of_its_program(sizes, workers, at_once):
    groups = groups_of(sizes)
    tasks = launch.split(groups, workers, at_once)
    assert sorted(run for task in tasks for run in task) == [run for x in groups for run in x]
    assert all(len({g for g, _ in task}) == 1 for task in tasks)
    assert [len(task) for task in tasks] == sorted(map(len, tasks), reverse=True)


@settings(deadline=None)  # of a machine that has other work
@given(SIZES, st.integers(1, 30))
def test_tasks_keep_every_worker_busy_and_are_few(sizes, workers):
    tasks = launch.split(groups_of(sizes), workers)
    total = sum(sizes)
    assert min(workers, total) <= len(tasks) < workers + len(sizes)
    assert len(tasks[0]) <= -(-total // workers), 'no worker has more than its share'


@settings(deadline=None)  # of a machine that has other work
@given(SIZES, st.integers(1, 30), st.integers(1, 5))
def test_runs_that_are_computed_at_once_are_those_of_one_machine(sizes, workers, at_once):
    groups = groups_of(sizes)
    tasks = launch.split(groups, workers, at_once)
    batches = [x[i : i + at_once] for x in (*tasks,) for i in range(0, len(x), at_once)]
    alone = [x[i : i + at_once] for x in groups for i in range(0, len(x), at_once)]
    assert sorted(batches) == sorted(alone)


@pytest.mark.parametrize('launcher', ['', 'Ray', 'ray:', 'slurm:', 'slurm:x', 'dask', 'ray,slurm'])
def test_another_launcher_is_a_mistake(tmp_path, launcher):
    with (
        pytest.raises(UsageError, match=f'^--launcher={launcher}: must be ray, ray:ADDRESS or sl'),
        launch.connect(launcher, tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    'launcher,library,extra', [('ray:x:1', 'ray', 'ray'), ('slurm', 'submitit', 'slurm')]
)
def test_a_missing_library_is_one_line_with_the_command(
    tmp_path, monkeypatch, launcher, library, extra
):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f'zerojax.run.on_{extra}', raising=False)
    needs = rf"^--launcher={launcher}: needs {library}; pip install 'zerojax\[{extra}\]'$"
    with pytest.raises(UsageError, match=needs), launch.connect(launcher, tmp_path):
        pass


def line(step, kind):
    values = {'loss': step, 'accuracy': 0.5} if kind == 'eval' else {'asymmetry': 0.0}
    return json.dumps({'step': step, 'kind': kind, **values, 'asymmetry_by_stream': {'a': 0.0}})


LINES = [line(step, kind) for step in range(0, 12, 2) for kind in ('train', 'eval', 'symmetry')]
TEXT = ''.join(f'{each}\n' for each in LINES)


@settings(deadline=None)  # of a machine that has other work
@given(st.lists(st.tuples(st.integers(0, len(TEXT)), st.booleans()), max_size=12))
def test_each_evaluation_is_shown_once_however_the_file_grows(tmp_path_factory, sizes):
    """Also if lines are half written, or a run goes on from before and writes them anew."""
    folder = tmp_path_factory.mktemp('run')
    file = folder / 'metrics.jsonl'
    run = WatchedRun(folder, 10)
    seen, furthest = run.update(), 0
    for size, goes_on in [*sizes, (len(TEXT), True)]:
        size = max(size, file.stat().st_size if file.exists() else 0) if goes_on else size
        file.write_text(TEXT[:size])
        seen += run.update()
        furthest = max(furthest, TEXT[:size].count('\n') // 3)
        assert [step for step, _ in seen] == list(range(0, 2 * furthest, 2))
    assert run.step == 10
    assert [values['loss'] for _, values in seen] == [0, 2, 4, 6, 8, 10]


def test_a_file_that_has_become_another_is_read_anew(tmp_path):
    run = WatchedRun(tmp_path, 10)
    (tmp_path / 'metrics.jsonl').write_text(TEXT[:300])
    run.update()
    (tmp_path / 'metrics.jsonl').write_text(f'# {"x" * 400}\n{TEXT}')
    assert run.update() == run.update() == []
    (tmp_path / 'metrics.jsonl').write_text(TEXT)
    run.update()
    assert run.step == 10


def summary_of(i):
    return dict.fromkeys(many.SUMMARY, 0) | {'params_sha256': str(i)}


class Workers:
    """A cluster that trains by writing what is looked at, or loses its worker at some run.

    `deaths` are how often each run ends its worker, after as many steps more as `further` says;
    `outcomes` what a run fails with, or its task ends with; of None a task has no end.
    """

    def __init__(self, deaths=None, outcomes=None, further=0):
        self.deaths, self.outcomes, self.further = deaths or {}, outcomes or {}, further
        self.step = 0
        self.submitted, self.stopped = [], []

    def workers(self, devices):
        return 2

    def submit(self, tasks):
        for task in tasks:
            self.submitted.append([workdir.name for _, workdir in task.jobs])
        return tasks

    def outcome(self, task):
        failed = {}
        for config, workdir in task.jobs:
            name = workdir.name
            if name in self.outcomes:
                if self.outcomes[name] is None:
                    return None
                if isinstance(self.outcomes[name], Outcome):
                    return self.outcomes[name]
                failed[name] = self.outcomes[name]
                continue
            if self.deaths.get(name, 0):
                self.deaths[name] -= 1
                self.step += self.further
                workdir.mkdir(exist_ok=True)
                with open(workdir / 'metrics.jsonl', 'a') as file:
                    file.write(line(self.step, 'train') + '\n')
                return Lost('gone')
            finish(config, workdir)
        return Outcome(failed=failed)

    def stop(self, tickets):
        self.stopped = [workdir.name for task in tickets for _, workdir in task.jobs]


def finish(config, workdir):
    workdir.mkdir(exist_ok=True)
    digits = many.Programs().dataset(config)
    resolved = config_lib.as_json(many.resolve(config, digits))
    (workdir / 'config.json').write_text(json.dumps(resolved))
    (workdir / 'summary.json').write_text(json.dumps(summary_of(workdir.name)))


@pytest.fixture
def jobs(tiny_config, tmp_path, monkeypatch):
    """Six runs of two programs, in folders a to f."""
    monkeypatch.setattr(launch, 'POLL_SECONDS', 0)
    monkeypatch.setattr(launch, 'RETRY_SECONDS', 0)
    tiny_config.model.update({'name': 'mlp', 'convolution': 'direct'})
    jobs = []
    for i, name in enumerate('abcdef'):
        config = tiny_config.copy_and_resolve_references()
        config.seed = i
        config.model.width = 8 if name in 'abcd' else 9
        jobs.append((config, tmp_path / name))
    return jobs


def names_of(summaries):
    return ''.join(summary['params_sha256'] for summary in summaries)


def test_all_runs_are_trained_by_tasks_of_one_program(jobs):
    cluster = Workers()
    assert names_of(launch.sweep_on(cluster, jobs, None)) == 'abcdef'
    assert cluster.submitted == [['a', 'b', 'c'], ['e', 'f'], ['d']]
    assert cluster.stopped == []


def test_a_driver_that_is_started_again_submits_what_is_not_finished(jobs):
    for job in jobs[1:5]:
        finish(*job)
    cluster = Workers()
    assert names_of(launch.sweep_on(cluster, jobs, None)) == 'abcdef'
    assert cluster.submitted == [['a'], ['f']]
    cluster = Workers()
    assert names_of(launch.sweep_on(cluster, jobs, None)) == 'abcdef'
    assert cluster.submitted == []


def test_the_runs_of_a_lost_worker_are_submitted_again_but_for_those_finished(jobs, capsys):
    cluster = Workers(deaths={'b': 1})
    assert names_of(launch.sweep_on(cluster, jobs, None)) == 'abcdef'
    assert cluster.submitted[:3] == [['a', 'b', 'c'], ['e', 'f'], ['d']]
    assert sorted(run for task in cluster.submitted[3:] for run in task) == ['b', 'c']
    assert (
        'a worker was lost (gone); on another go on from their checkpoints: b, c'
        in capsys.readouterr().out
    )


def test_a_run_that_always_ends_its_worker_fails_alone(jobs):
    """What was with it in a task is tried alone, and is trained."""
    cluster = Workers(deaths={'a': 99})
    reason = 'its worker was lost 3 times before anything was trained (gone)'
    with pytest.raises(RunError, match=re.escape(f'1 of 6 runs failed: a: {reason}')):
        launch.sweep_on(cluster, jobs, None)
    assert sum('a' in task for task in cluster.submitted) == launch.TRIES
    assert [(folder / 'summary.json').exists() for _, folder in jobs] == [False] + 5 * [True]


def test_workers_may_be_lost_for_ever_if_each_gets_further(jobs):
    cluster = Workers(deaths={'a': 9}, further=1)
    assert names_of(launch.sweep_on(cluster, jobs, None)) == 'abcdef'
    assert sum('a' in task for task in cluster.submitted) == 10


@pytest.fixture
def clock(monkeypatch):
    """The time that the driver takes for that; it waits for nothing."""
    clock = types.SimpleNamespace(now=1.0, monotonic=lambda: clock.now, sleep=lambda _: None)
    monkeypatch.setattr(launch, 'time', clock)
    return clock


@pytest.mark.parametrize('seconds,seen', [(60, True), (100, False)])
def test_what_a_worker_has_finished_may_be_seen_late_but_is_not_trained_again(
    jobs, clock, seconds, seen
):
    """Over a network files take a while; if they do not come at all, folders are not shared."""

    class Away(Workers):
        def outcome(self, task):
            clock.now += 10
            for job in task.jobs:
                if clock.now >= seconds and seen:
                    finish(*job)
            return Outcome()

    cluster = Away()
    if seen:
        assert names_of(launch.sweep_on(cluster, jobs, None)) == 'abcdef'
    else:
        told = re.escape(f'--workdir={jobs[0][1].parent}: a worker has finished a in it, which is ')
        with pytest.raises(UsageError, match=f'^{told}.*; must be a folder that all workers sh'):
            launch.sweep_on(cluster, jobs, None)
    assert cluster.submitted == [['a', 'b', 'c'], ['e', 'f'], ['d']]


def test_without_a_worker_nothing_is_submitted(jobs, capsys):
    class Later(Workers):
        asked = 0

        def workers(self, devices):
            self.asked += 1
            assert self.asked < 4 or not self.submitted
            return 0 if self.asked < 4 else 2

    cluster = Later()
    assert names_of(launch.sweep_on(cluster, jobs, None)) == 'abcdef'
    assert cluster.submitted[0] == ['a', 'b', 'c']
    assert capsys.readouterr().out.count('no worker is there that has what a task needs') == 1


def test_a_run_that_another_process_trains_is_left_to_it(jobs, capsys):
    """As by a worker of a driver that was killed; once it is free it is looked at again."""
    held = workdir_lib.lock(jobs[0][1])
    (jobs[0][1] / 'config.json').touch()

    class Others(Workers):
        def outcome(self, task):
            done = super().outcome(task)
            if held.is_locked and all((folder / 'summary.json').exists() for _, folder in jobs[1:]):
                finish(*jobs[0])
                held.release()
            return done

    cluster = Others()
    assert names_of(launch.sweep_on(cluster, jobs, None)) == 'abcdef'
    assert not any('a' in task for task in cluster.submitted)
    assert capsys.readouterr().out.count('a is trained by a worker of before; waiting') == 1


def test_runs_that_fit_a_worker_do_not_wait_with_those_that_do_not(jobs, monkeypatch):
    class Small(Workers):
        larger = False

        def workers(self, devices):
            self.larger = self.larger or all(
                (folder / 'summary.json').exists() for _, folder in small
            )
            return 2 if devices == 1 or self.larger else 0

    small, jobs[5][0].mesh.data = jobs[:5], 2
    cluster = Small()
    assert names_of(launch.sweep_on(cluster, jobs, None)) == 'abcdef'
    assert cluster.submitted[0] == ['a', 'b', 'c']
    assert cluster.submitted[-1] == ['f']


def pretended(monkeypatch, name, library, **has):
    """The module `name` of zerojax.run, where the library has only this."""
    monkeypatch.setitem(sys.modules, library, types.SimpleNamespace(**has))
    file = pathlib.Path(launch.__file__).with_name(f'{name}.py')
    spec = importlib.util.spec_from_file_location(f'pretended_{name}', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_task_for_which_ray_has_no_node_any_more_is_given_up_and_nobody_is_to_blame(
    jobs, monkeypatch
):
    """It would wait for ever, where a smaller node could take it."""
    nodes = [{'Alive': True, 'Resources': {'CPU': float(cores)}} for cores in (16, 8)]
    asked, cancelled = [], []
    remote = types.SimpleNamespace(
        options=lambda **options: asked.append(options['num_cpus']) or remote,
        remote=lambda *_: len(asked),
    )
    on_ray = pretended(
        monkeypatch, 'on_ray', 'ray', nodes=lambda: nodes, wait=lambda tickets, **_: ([], tickets),
        remote=lambda **_: lambda _: remote, cancel=cancelled.append,
    )  # fmt: skip
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(on_ray, 'time', types.SimpleNamespace(monotonic=lambda: clock.now))
    cluster = on_ray.OnRay()
    (ticket,) = cluster.submit([worker.Task(jobs, 1, 1)])
    assert cluster.outcome(ticket) is None
    nodes[0]['Alive'] = False
    clock.now += 60
    assert cluster.outcome(ticket) is None, 'if it was trained there, Ray will tell'
    clock.now += 60
    lost = cluster.outcome(ticket)
    assert (lost.begun, cancelled) == (False, [ticket])
    cluster.submit([worker.Task(jobs, 1, 1)])
    assert asked == [16, 8]


def test_a_client_of_ray_that_lacks_a_library_is_one_line(monkeypatch):
    def init(*_, **__):
        raise ModuleNotFoundError("No module named 'grpc'")

    errors = types.SimpleNamespace(RayError=NotTaken)
    on_ray = pretended(monkeypatch, 'on_ray', 'ray', init=init, exceptions=errors)
    told = re.escape("--launcher=ray:ray://x: no Ray cluster can be had (No module named 'grpc')")
    with pytest.raises(UsageError, match=f'^{told}$'), on_ray.connect('ray://x'):
        pass


def test_runs_that_never_had_a_worker_do_not_fail(jobs):
    class Full(Workers):
        def outcome(self, task):
            return super().outcome(task) if len(self.submitted) > 12 else Lost('gone', begun=False)

    cluster = Full()
    assert names_of(launch.sweep_on(cluster, jobs, None)) == 'abcdef'
    assert ['a', 'b', 'c'] in cluster.submitted[3:]


class JobOfSlurm:
    job_id, state, ended = '7_0', 'RUNNING', False

    def __init__(self, folder):
        self.paths = types.SimpleNamespace(result_pickle=folder / 'result', stderr='7_0.err')
        self.cancelled = False

    def done(self, force_check=False):
        return self.ended or self.cancelled

    def cancel(self, check):
        self.cancelled = True


class NotTaken(Exception):
    """Of submitit, when sbatch ends with an error."""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The module, and the job that sbatch takes before it takes none any more."""
    jobs = [JobOfSlurm(tmp_path)]

    def map_array(*_):
        if not jobs:
            print('sbatch: error: Invalid\n  partition', file=sys.stderr)
            raise NotTaken('sbatch: error: Invalid\n  partition')
        return [jobs.pop()]

    executor = types.SimpleNamespace(update_parameters=lambda **_: None, map_array=map_array)
    errors = types.SimpleNamespace(utils=types.SimpleNamespace(FailedJobError=NotTaken))
    module = pretended(
        monkeypatch, 'on_slurm', 'submitit', AutoExecutor=lambda *_: executor, core=errors
    )
    return module, jobs[0]


def test_jobs_that_sbatch_does_not_take_are_a_mistake_and_what_it_took_is_cancelled(
    jobs, slurm, tmp_path, capsys
):
    module, taken = slurm
    cluster = module.OnSlurm(tmp_path, False)
    told = re.escape('--launcher=slurm: sbatch does not take the jobs (sbatch: error: Invalid part')
    with pytest.raises(UsageError, match=f'^{told}'):
        cluster.submit([worker.Task(jobs, 1, devices) for devices in (1, 2)])
    assert taken.cancelled
    assert capsys.readouterr().err == '', 'the one line is enough'


@pytest.mark.parametrize('state', ['NODE_FAIL', 'PREEMPTED'])
def test_a_job_of_slurm_that_left_no_result_is_lost_after_a_while(slurm, tmp_path, state):
    """Nobody waits for it meanwhile, and where its log is is told."""
    module, job = slurm
    clock = types.SimpleNamespace(now=0.0)
    module.time = types.SimpleNamespace(monotonic=lambda: clock.now)
    cluster = module.OnSlurm(tmp_path, False)
    assert cluster.outcome(job) is None
    job.state, job.ended = state, state != 'PREEMPTED'  # which may come again, for submitit
    for clock.now in (20.0, 30.0):
        assert cluster.outcome(job) is None
    clock.now = 36.0
    assert cluster.outcome(job) == Lost(f'job 7_0 of Slurm: {state}; see 7_0.err')


def test_runs_that_fail_are_told_as_by_a_sweep_on_one_machine(jobs):
    cluster = Workers(outcomes={'b': 'step 3: not finite', 'e': 'step 9: not finite'})
    with pytest.raises(RunError) as error:
        launch.sweep_on(cluster, jobs, None)
    told = '2 of 6 runs failed: b: step 3: not finite; e: step 9: not finite'
    assert str(error.value) == told
    assert (jobs[2][1] / 'summary.json').exists()


@pytest.mark.parametrize('status,error', [(2, UsageError), (1, RunError)])
def test_what_ends_a_sweep_on_one_machine_ends_it_here_and_stops_the_others(jobs, status, error):
    outcomes = {'a': None, 'e': Outcome(status, 'error: b: no such data')}
    cluster = Workers(outcomes=outcomes)
    with pytest.raises(error, match=r'^b: no such data$'):
        launch.sweep_on(cluster, jobs, None)
    assert cluster.stopped == ['a', 'b', 'c', 'd']


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_workers(jobs, number):
    class Signalled(Workers):
        def submit(self, tasks):
            signal.raise_signal(number)
            return super().submit(tasks)

        def outcome(self, task):
            return None

    cluster = Signalled()
    with pytest.raises(Stopped, match='stopped and saved by the workers; the same') as stopped:
        launch.sweep_on(cluster, jobs, None)
    assert stopped.value.signal == number
    assert sorted(cluster.stopped) == list('abcdef')


def test_a_worker_that_is_stopped_is_lost_unless_the_sweep_is(jobs):
    """As a job of Slurm whose time is over."""
    stopped = Outcome(143, 'SIGTERM: stopped and saved at step 4; the same command resumes')

    class Timed(Workers):
        def outcome(self, task):
            return (
                stopped
                if task.jobs[0][1].name == 'a' and len(self.submitted) == 3
                else (super().outcome(task))
            )

    cluster = Timed()
    assert names_of(launch.sweep_on(cluster, jobs, None)) == 'abcdef'
    assert sum('a' in task for task in cluster.submitted) == 2


def test_a_worker_trains_what_a_sweep_does_and_says_what_it_found(
    tiny_config, tmp_path, monkeypatch
):
    tiny_config.model.update({'name': 'mlp', 'convolution': 'direct'})
    tiny_config.num_steps = 2
    jobs = []
    for i, rate in enumerate([0.03, 1e30]):
        config = tiny_config.copy_and_resolve_references()
        config.optimizer.learning_rate = rate
        jobs.append((config, tmp_path / str(i)))
    monkeypatch.setenv('ZEROJAX_LAUNCHER', '')  # comes back afterwards
    outcome = worker.train_task(worker.Task(jobs, 1, 1), 'test')
    assert (outcome.status, outcome.message) == (0, '')
    assert list(outcome.failed) == ['1']
    assert 'not finite' in outcome.failed['1']
    manifest = json.loads((tmp_path / '0' / 'manifest.json').read_text())
    assert (manifest['launcher'], manifest['host']) == ('test', platform.node())
    held = workdir_lib.lock(jobs[1][1])
    assert worker.train_task(worker.Task(jobs, 1, 1), 'test').in_use
    held.release()
    jobs[0][0].batch_size = 10**6
    outcome = worker.train_task(worker.Task(jobs, 1, 1), 'test')
    assert outcome.status == 2
    assert outcome.message.startswith('error: 0: batch_size=1000000: must be at most')


def test_a_run_that_failed_is_told_though_its_worker_is_stopped_at_a_later_one(jobs, monkeypatch):
    def train_alike(plan, numbers, *_):
        plan.failed[numbers[0]] = RunError('not finite')
        raise Stopped(signal.SIGTERM, 'at step 4')

    monkeypatch.setattr(worker, 'train_alike', train_alike)
    monkeypatch.setenv('ZEROJAX_LAUNCHER', '')  # comes back afterwards
    outcome = worker.train_task(worker.Task(jobs[:4], 1, 1), 'test')
    assert (outcome.status, outcome.failed) == (143, {'a': 'not finite'})


def test_what_has_not_grown_is_not_read(tmp_path, monkeypatch):
    """Thousands of runs are looked at each second, over a network."""
    (tmp_path / 'metrics.jsonl').write_text(TEXT)
    watch = Watch({i: WatchedRun(tmp_path, 10) for i in range(3)}, Progress(30))
    opened = []
    monkeypatch.setattr('builtins.open', lambda *_: opened.append(1) or io.BytesIO())
    watch.update()
    assert not opened
    monkeypatch.setattr(WatchedRun, 'update', lambda run: opened.append(1) or [])
    watch.update([1, 99])  # what is no longer watched is left out
    assert len(opened) == 1


def test_the_bar_counts_each_step_once(tmp_path):
    """What was done before, what is done now, and what never will be are all steps in the end."""
    (tmp_path / 'metrics.jsonl').write_text(TEXT[: TEXT.index(LINES[9])])
    counted = []
    bar = Progress(30)
    bar.advance = lambda steps: counted.append(steps)
    watch = Watch({0: WatchedRun(tmp_path, 10), 1: WatchedRun(tmp_path / 'none', 20)}, bar)
    assert sum(counted) == watch.steps([0, 1]) == 4
    (tmp_path / 'metrics.jsonl').write_text(TEXT)
    watch.update()
    assert sum(counted) == 10
    watch.leave(0)
    watch.leave(1)
    assert sum(counted) == 30
