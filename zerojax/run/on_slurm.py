"""Workers are jobs of Slurm, submitted as arrays through submitit."""

import contextlib
import importlib.util
import io
import itertools
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import submitit

from zerojax.host.errors import UsageError
from zerojax.run.worker import Lost, Outcome, Task, train_task

WORKERS = 32  # jobs of an array; how many Slurm will run at once, nobody knows before
LOCAL_WORKERS = 2
MINUTES = 24 * 60  # of a job, unless SBATCH_TIMELIMIT says otherwise
ASK_SECONDS = 60  # submitit alone would wait for up to ten minutes
RESULT_SECONDS = 15  # in which the file of a job that has ended comes into sight
STOP_SECONDS = 60  # for checkpoints to be saved


@contextlib.contextmanager
def connect(workdir: pathlib.Path) -> Iterator['OnSlurm']:
    """Slurm, as the commands of this machine reach it; what is submitted is in `workdir`/submitit.

    With ZEROJAX_SLURM=local in the environment jobs are processes of this machine, for tests.

    Raises:
        UsageError: the commands are not there.
    """
    local = os.environ.get('ZEROJAX_SLURM') == 'local'
    missing = [name for name in ('sbatch', 'srun') if shutil.which(name) is None]
    if missing and not local:
        raise UsageError(
            f'--launcher=slurm: there is no {missing[0]} here; start the sweep on a machine from '
            'which jobs are submitted'
        )
    yield OnSlurm(workdir.absolute() / 'submitit', local)


class OnSlurm:
    """A `zerojax.run.launch.Cluster`."""

    def __init__(self, folder: pathlib.Path, local: bool) -> None:
        self._local = local
        self._folder = folder
        self._asked = time.monotonic()
        self._ended: dict[str, float] = {}  # since when jobs are known to have, without a result

    def workers(self, devices: int) -> int:
        return LOCAL_WORKERS if self._local else WORKERS

    def submit(self, tasks: list[Task]) -> list[Any]:
        jobs: list[Any] = []
        for devices, alike in itertools.groupby(tasks, key=lambda task: task.devices):
            arrays = list(alike)
            executor = self._executor(devices)
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # it prints the reason as well
                    jobs += executor.map_array(train_task, arrays, ['slurm'] * len(arrays))
            except submitit.core.utils.FailedJobError as error:
                self.stop(jobs)
                reason = ' '.join(str(error).split())
                raise UsageError(
                    f'--launcher=slurm: sbatch does not take the jobs ({reason}); mend that, as '
                    'with variables SBATCH_*, and the same command goes on'
                ) from error
        return jobs

    def _executor(self, devices: int) -> Any:
        executor = submitit.AutoExecutor(self._folder, 'local' if self._local else 'slurm')
        # Tasks are not bound to cores: bits depend on how many there are.
        executor.update_parameters(
            name='zerojax', timeout_min=MINUTES, slurm_srun_args=['--cpu-bind=none']
        )
        if self._on_gpus():
            executor.update_parameters(gpus_per_node=devices)
        else:
            executor.update_parameters(slurm_exclusive=True)  # all cores of a node
        return executor

    def _on_gpus(self) -> bool:
        """Whether JAX here has its plugin for CUDA, and is not told to leave it."""
        plugins = ('jax_cuda12_plugin', 'jax_cuda13_plugin')
        there = any(importlib.util.find_spec(name) for name in plugins)
        return there and os.environ.get('JAX_PLATFORMS') != 'cpu'

    def outcome(self, job: Any) -> Outcome | Lost | None:
        # Slurm is asked of all jobs at once, and seldom; a job that ends well is seen by its files.
        force = time.monotonic() - self._asked > ASK_SECONDS
        if force:
            self._asked = time.monotonic()
        # One that was preempted may come again, submitit thinks; its runs need not wait for it.
        if not job.done(force_check=force) and job.state != 'PREEMPTED':
            self._ended.pop(job.job_id, None)
            return None
        if job.paths.result_pickle.exists():
            outcome: Outcome = job.result()  # raises only what is a fault of this program
            return outcome
        ended = self._ended.setdefault(job.job_id, time.monotonic())
        if time.monotonic() - ended < RESULT_SECONDS:
            return None  # submitit would wait here, for each job
        return Lost(f'job {job.job_id} of Slurm: {job.state}; see {job.paths.stderr}')

    def stop(self, jobs: list[Any]) -> None:
        for job in jobs:
            job.cancel(check=False)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and not all(job.done(force_check=True) for job in jobs):
            time.sleep(1)
