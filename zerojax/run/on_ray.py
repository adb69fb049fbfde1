"""Workers of a Ray cluster: each task is one of Ray's, in a process of its own."""

import contextlib
import logging
import math
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import ray

from zerojax.host.errors import UsageError, first_line
from zerojax.host.manifest import VARIABLES
from zerojax.run.worker import Lost, Outcome, Task, train_task

CONNECT_SECONDS = 10
STOP_SECONDS = 60  # for checkpoints to be saved
NODES_SECONDS = 10  # after which is asked again which nodes are there
PLACE_SECONDS = 30  # without a node; meanwhile Ray tells of tasks that were trained on it
RESOURCES = {'cpu': 'CPU', 'cuda': 'GPU', 'gpu': 'GPU', 'tpu': 'TPU'}  # of JAX's platforms


@contextlib.contextmanager
def connect(address: str | None) -> Iterator['OnRay']:
    """The cluster at an address, as `ray.init` takes it; None: the one that Ray finds, or one of
    this machine alone, which ends with this process.

    Raises:
        UsageError: it cannot be reached.
    """
    where = address or os.environ.get('RAY_ADDRESS', '')
    flag = f'--launcher=ray{f":{address}" if address else ""}'
    _check_reachable(where, flag)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except (
        ValueError, ConnectionError, RuntimeError, ImportError, ray.exceptions.RayError
    ) as error:  # fmt: skip
        reason = first_line(error)
        raise UsageError(f'{flag}: no Ray cluster can be had ({reason})') from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray has its own
    try:
        yield OnRay()
    finally:
        ray.shutdown()


def _check_reachable(address: str, flag: str) -> None:
    """Raises UsageError if nobody answers at HOST:PORT, which Ray would wait for for minutes."""
    found = re.fullmatch(r'(?:ray://)?\[?([^/]+?)\]?:(\d{1,5})/?', address)
    if found is None:
        return
    try:
        with socket.create_connection((found[1], int(found[2])), timeout=CONNECT_SECONDS):
            pass
    except (OSError, OverflowError) as error:
        raise UsageError(f'{flag}: nobody answers at {address} ({error})') from error


class OnRay:
    """A `zerojax.run.launch.Cluster`."""

    def __init__(self) -> None:
        self._needed: dict[Any, dict[str, float]] = {}  # by ticket, of tasks that have not ended
        self._without: dict[Any, float] = {}  # since when tasks have no node, by ticket
        self._there: list[dict[str, float]] = []  # `_nodes`, when they were
        self._asked = -math.inf

    def _needs(self, devices: int) -> dict[str, float]:
        """The resources of a task, by Ray's names: devices of the kind that JAX_PLATFORMS names, or
        else that the cluster has.

        On CPUs all of a node, of those that have most: then runs share cores with no others.
        """
        nodes = self._nodes()
        platform = os.environ.get('JAX_PLATFORMS', '').partition(',')[0]
        there = [kind for kind in ('GPU', 'TPU') if any(kind in node for node in nodes)]
        kind = RESOURCES.get(platform) or next(iter(there), 'CPU')
        if kind != 'CPU':
            return {kind: devices}
        return {'CPU': max((node.get('CPU', 0) for node in nodes), default=0) or 1}

    def _nodes(self) -> list[dict[str, float]]:
        """The resources of each node that is there."""
        return [node['Resources'] for node in ray.nodes() if node['Alive']]

    def _has_place(self, ticket: Any) -> bool:
        """Whether a node is there, or was till now, that has what a task needs, in use or not."""
        if time.monotonic() - self._asked > NODES_SECONDS:
            self._there, self._asked = self._nodes(), time.monotonic()
        needed = self._needed.get(ticket, {}).items()
        if any(all(node.get(kind, 0) >= x for kind, x in needed) for node in self._there):
            self._without.pop(ticket, None)
            return True
        since = self._without.setdefault(ticket, time.monotonic())
        return time.monotonic() - since < PLACE_SECONDS

    def workers(self, devices: int) -> int:
        ((kind, number),) = self._needs(devices).items()
        return sum(int(node.get(kind, 0) // number) for node in self._nodes())

    def submit(self, tasks: list[Task]) -> list[Any]:
        # What decides bits is as in this process. Ray would tell libraries how many threads to use;
        # an empty value keeps it from doing so.
        variables = {
            name: value
            for name, value in os.environ.items()
            if name.startswith('JAX_') or VARIABLES.fullmatch(name)
        }
        variables['OMP_NUM_THREADS'] = os.environ.get('OMP_NUM_THREADS', '')
        tickets = []
        self._asked = -math.inf
        for task in tasks:
            needs = self._needs(task.devices)
            needed = dict(needs)
            # A process of its own, whose memory and mode of determinism end with it. Its runs are
            # submitted anew by `launch`, without those that are finished.
            train = ray.remote(max_calls=1, max_retries=0)(train_task).options(
                num_cpus=needs.pop('CPU', 0),
                num_gpus=needs.pop('GPU', 0),
                resources=needs,
                runtime_env={'env_vars': variables},
                name=f'zerojax: {len(task.jobs)} runs, {task.jobs[0][1].name}, ...',
            )
            tickets.append(train.remote(task, 'ray'))
            self._needed[tickets[-1]] = needed
        return tickets

    def outcome(self, ticket: Any) -> Outcome | Lost | None:
        ready, _ = ray.wait([ticket], timeout=0)
        if not ready:
            if self._has_place(ticket):
                return None
            ray.cancel(ticket)  # which would wait for such a node for ever
            return Lost('no node is left that has what its task needs', begun=False)
        self._needed.pop(ticket, None)
        try:
            outcome: Outcome = ray.get(ticket)
        except ray.exceptions.RayTaskError as error:
            if 'failed to import on the worker' not in str(error):
                raise  # a fault of this program
            reason = str(error).strip().splitlines()[-1]
            raise UsageError(
                f'--launcher=ray: the workers cannot import zerojax ({reason}); install it where '
                'they run, of the same version'
            ) from error
        except ray.exceptions.RayError as error:
            return Lost(first_line(error))
        return outcome

    def stop(self, tickets: list[Any]) -> None:
        for ticket in tickets:
            ray.cancel(ticket, force=False)  # SIGINT, as if from a terminal
        if tickets:
            ray.wait(tickets, num_returns=len(tickets), timeout=STOP_SECONDS)
