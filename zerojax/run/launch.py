"""A sweep on the workers of a cluster, which write into the same folders as one on this machine.

What is known of a run is in its folder alone, so this process can be killed and started again, and
workers can be lost: a run that is not finished goes on from its checkpoint on the next worker, and
the lock of its folder keeps a second one out.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

from zerojax.host.errors import RunError, UsageError
from zerojax.host.progress import Progress
from zerojax.host.records import Record
from zerojax.host.stop import Stopped, StopRequest
from zerojax.host.workdir import InUse
from zerojax.run.many import Job, Plan, finished, make_plan
from zerojax.run.program import Programs
from zerojax.run.watch import Watch, WatchedRun
from zerojax.run.worker import Lost, Outcome, Task

T = TypeVar('T')

POLL_SECONDS = 1.0
RETRY_SECONDS = 5.0  # after which a lost worker's runs go on; until then its locks are free
SEEN_SECONDS = 90.0  # in which files of another machine come into sight; NFS takes up to 60
TRIES = 3  # of a run, in a row, whose worker is lost before anything was trained


class Cluster(Protocol):
    """Where tasks are trained."""

    def workers(self, devices: int) -> int:
        """How many tasks that need so many devices each can be trained at once, now."""

    def submit(self, tasks: list[Task]) -> list[Any]:
        """A ticket for each task, in their order; they are begun in it."""

    def outcome(self, ticket: Any) -> Outcome | Lost | None:
        """What came of a task; None: it is not at its end."""

    def stop(self, tickets: list[Any]) -> None:
        """Ends tasks, so that they save checkpoints, and waits until they have."""


@contextlib.contextmanager
def connect(launcher: str, workdir: pathlib.Path) -> Iterator[Cluster]:
    """The cluster that --launcher names, for a sweep in `workdir`.

    Raises:
        UsageError: there is no such launcher, its library is missing, or it cannot be reached.
    """
    name, _, address = launcher.partition(':')
    if not (launcher in ('ray', 'slurm') or (name == 'ray' and address)):
        raise UsageError(f'--launcher={launcher}: must be ray, ray:ADDRESS or slurm')
    try:
        if name == 'ray':
            from zerojax.run import on_ray

            cluster: Any = on_ray.connect(address or None)
        else:
            from zerojax.run import on_slurm

            cluster = on_slurm.connect(workdir)
    except ModuleNotFoundError as error:
        if error.name not in ('ray', 'submitit'):
            raise
        raise UsageError(
            f"--launcher={launcher}: needs {error.name}; pip install 'zerojax[{name}]'"
        ) from error
    with cluster as connected:
        yield connected


def split(groups: Sequence[Sequence[T]], workers: int, at_once: int = 1) -> list[list[T]]:
    """Tasks of the runs of each group, as large as keeps every worker busy; the largest first.

    All runs in a row are cut into as many equal parts as there are workers, and between groups,
    so there are fewer than workers and groups together. Runs that are computed `at_once`, which
    are those that a sweep on one machine would take, stay together.
    """
    batches = [[group[i : i + at_once] for i in range(0, len(group), at_once)] for group in groups]
    total = sum(map(len, batches))
    tasks: list[list[T]] = []
    position = 0
    for group_batches in batches:
        parts: dict[int, list[T]] = {}
        for batch in group_batches:
            parts.setdefault(position * workers // total, []).extend(batch)
            position += 1
        tasks += parts.values()
    return sorted(tasks, key=len, reverse=True)


def sweep_on(cluster: Cluster, jobs: Sequence[Job], runs_at_once: int | None) -> list[Record]:
    """`many.sweep`, on a cluster.

    Raises:
        UsageError, RunError, Stopped: as `many.sweep`; meanwhile all workers have stopped.
    """
    plan = make_plan(jobs, runs_at_once, Programs(), elsewhere=True)
    with Progress(plan.num_steps()) as bar, StopRequest() as stop:
        driver = _Driver(cluster, plan, runs_at_once, bar)
        try:
            while driver.waiting or driver.running:
                if stop.signal:
                    raise Stopped(stop.signal, 'by the workers')
                driver.advance()
                time.sleep(POLL_SECONDS)
        finally:
            cluster.stop([task.ticket for task in driver.running])
    return plan.outcome()


@dataclasses.dataclass
class _Submitted:
    """A task on its way, or being trained."""

    numbers: list[int]
    ticket: Any
    steps_before: int
    unseen_since: float | None = None  # when its runs were not finished here, but by its worker


class _Driver:
    """Which runs wait for a worker, and which have one."""

    def __init__(
        self, cluster: Cluster, plan: Plan, runs_at_once: int | None, bar: Progress
    ) -> None:
        self._cluster = cluster
        self._plan = plan
        self._runs_at_once = runs_at_once
        self._bar = bar
        pending = [i for numbers in plan.pending.values() for i in numbers]
        self.waiting = dict.fromkeys(pending, 0.0)  # and from when on they may be tried
        self.running: list[_Submitted] = []
        self._losses = dict.fromkeys(pending, 0)  # of their workers, in a row, without a step
        self._said: set[str] = set()
        self._watch = Watch(
            {i: WatchedRun(plan.jobs[i][1], plan.resolved[i].num_steps) for i in pending}, bar
        )

    def advance(self) -> None:
        """Shows what is new, settles what has ended, and submits what can be trained.

        Raises:
            UsageError, RunError: of a task that shows that none can go on.
        """
        self._watch.update()
        for task in list(self.running):
            outcome = self._cluster.outcome(task.ticket)
            if outcome is not None and self._is_seen(task, outcome):
                self.running.remove(task)
                self._watch.update(task.numbers)
                self._settle(task, outcome)
        ready = [i for i, moment in self.waiting.items() if moment <= time.monotonic()]
        self._submit([i for i in ready if self._is_free(i)])

    def _is_seen(self, task: _Submitted, outcome: Outcome | Lost) -> bool:
        """Whether the runs that a worker has finished are so here too, where that may take a while.

        Raises:
            UsageError: it took so long that the folder must be another one.
        """
        if isinstance(outcome, Lost) or outcome.status or outcome.in_use:
            return True
        for i in task.numbers:
            with contextlib.suppress(InUse):
                if self._plan.name(i) in outcome.failed or self._is_finished(i):
                    continue
                now = time.monotonic()
                task.unseen_since = task.unseen_since or now
                if now - task.unseen_since < SEEN_SECONDS:
                    return False
                raise UsageError(
                    f'--workdir={self._plan.jobs[i][1].parent}: a worker has finished '
                    f'{self._plan.name(i)} in it, which is not to be seen here; must be a folder '
                    'that all workers share'
                )
        return True

    def _settle(self, task: _Submitted, outcome: Outcome | Lost) -> None:
        reason = outcome.reason if isinstance(outcome, Lost) else outcome.message
        begun = not isinstance(outcome, Lost) or outcome.begun
        if isinstance(outcome, Lost):
            outcome = Outcome()
        for i in task.numbers:
            if self._plan.name(i) in outcome.failed:
                self._fail(i, outcome.failed[self._plan.name(i)])
        if outcome.status in (1, 2):
            error = UsageError if outcome.status == 2 else RunError
            raise error(outcome.message.removeprefix('error: '))
        left = []
        for i in task.numbers:
            with contextlib.suppress(InUse):  # by a process that has outlived its worker
                if i in self._plan.failed or self._is_finished(i):
                    continue
            left.append(i)
        stands = len(left) == len(task.numbers) and (
            self._watch.steps(task.numbers) <= task.steps_before
        )
        for i in left:
            self.waiting[i] = time.monotonic() + RETRY_SECONDS
            if outcome.in_use or not begun:
                continue
            self._losses[i] = self._losses[i] + 1 if stands else 0
            if self._losses[i] == TRIES:
                del self.waiting[i]
                self._fail(
                    i, f'its worker was lost {TRIES} times before anything was trained ({reason})'
                )
        going_on = [self._plan.name(i) for i in left if i in self.waiting]
        if going_on and not outcome.in_use:
            self._bar.say(
                f'a worker was lost ({reason or "without a word"}); on another go on from their '
                f'checkpoints: {", ".join(going_on)}'
            )

    def _submit(self, numbers: list[int]) -> None:
        """As tasks, those for which there is a worker.

        A run whose worker was lost before anything was trained is one of its own.
        """
        if not numbers:
            return
        plan = self._plan
        devices = {i: plan.resolved[i].mesh.data for i in numbers}
        there = {number: self._cluster.workers(number) for number in set(devices.values())}
        if not all(there.values()):
            self._say_once('no worker is there that has what a task needs; waiting for one')
        for i in numbers:
            if not there[devices[i]]:
                self.waiting[i] = time.monotonic() + RETRY_SECONDS
        numbers = [i for i in numbers if there[devices[i]]]
        if not numbers:
            return
        workers = there[max(devices[i] for i in numbers)]
        sound = {i for i in numbers if not self._losses[i]}
        together = [[i for i in alike if i in sound] for alike in plan.pending.values()]
        alone = [[i] for i in numbers if self._losses[i]]
        parts = split(list(filter(None, together)), workers, self._runs_at_once or 1)
        parts += alone
        tickets = self._cluster.submit(
            [
                Task([plan.jobs[i] for i in part], self._runs_at_once, devices[part[0]])
                for part in parts
            ]
        )
        for part, ticket in zip(parts, tickets, strict=True):
            self.running.append(_Submitted(part, ticket, self._watch.steps(part)))
            for i in part:
                del self.waiting[i]

    def _is_free(self, i: int) -> bool:
        """Whether a waiting run is neither finished nor in use."""
        try:
            if self._is_finished(i):
                del self.waiting[i]
                return False
        except InUse:
            self._say_once(f'{self._plan.name(i)} is trained by a worker of before; waiting for it')
            self.waiting[i] = time.monotonic() + RETRY_SECONDS
            return False
        return True

    def _is_finished(self, i: int) -> bool:
        """Raises InUse if another process has the run."""
        if i in self._plan.summaries:
            return True
        summary = finished(self._plan.resolved[i], self._plan.jobs[i][1])
        if summary is None:
            return False
        self._plan.summaries[i] = summary
        self._watch.leave(i)
        return True

    def _fail(self, i: int, reason: str) -> None:
        self._plan.failed[i] = RunError(reason)
        self._watch.leave(i)

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self._bar.say(message)
