"""What a worker of a cluster does: it trains runs in their folders, as a sweep of them would."""

import dataclasses
import os
import signal

from zerojax.host.command import ending
from zerojax.host.manifest import LAUNCHER
from zerojax.host.progress import Progress
from zerojax.host.stop import exit_on_signals
from zerojax.host.workdir import InUse
from zerojax.run.many import Job, make_plan, train_alike
from zerojax.run.program import Programs


@dataclasses.dataclass(frozen=True)
class Task:
    """Runs that share a program, for one worker."""

    jobs: list[Job]
    runs_at_once: int | None  # as `zerojax.run.many.sweep`
    devices: int  # that each batch is spread over


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a task."""

    status: int = 0  # that `zerojax.sweep` would have, had it ended with this
    message: str = ''  # one line, of what ended it before its time
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # by name of the folder
    in_use: bool = False  # another process has one of the folders


@dataclasses.dataclass(frozen=True)
class Lost:
    """What is known of a task whose worker has ended without an outcome."""

    reason: str
    begun: bool = True  # as far as is known; False: it never had a worker


def train_task(task: Task, launcher: str) -> Outcome:
    """Trains the runs of a task that are not finished; for a process that does nothing else.

    SIGTERM, SIGINT, and the signal by which Slurm tells that time is over or that another job has
    precedence: a checkpoint is saved, and the status is that of a sweep which is stopped.
    """
    exit_on_signals()
    signal.signal(signal.SIGUSR2, lambda *_: signal.raise_signal(signal.SIGTERM))
    os.environ[LAUNCHER] = launcher
    failed: dict[str, str] = {}
    in_use = False

    def train() -> None:
        nonlocal in_use
        programs = Programs()
        try:
            plan = make_plan(task.jobs, task.runs_at_once, programs)
            with Progress(plan.num_steps()) as bar:
                for numbers in filter(None, plan.pending.values()):
                    try:
                        train_alike(plan, numbers, task.runs_at_once, programs, bar)
                    finally:  # also if it is stopped at a later run
                        failed.update((plan.name(i), str(x)) for i, x in plan.failed.items())
        except InUse:
            in_use = True

    status, message = ending(train)
    return Outcome(status, message, failed, in_use)
