"""One run on several processes, one a host, that start together and compute the same program.

Every process has a part of the devices of the mesh. All of them write checkpoints; the first writes
everything else. The folder of the run must be the same for all: a file system that they share.
"""

import os
import threading
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from zerojax.host import terminal
from zerojax.host.errors import UsageError, first_line

TIMEOUT = 300  # seconds in which all processes must have come
END_TIMEOUT = 60  # seconds in which all must leave, after which JAX aborts those that have not


def start(where: str, timeout: int = TIMEOUT) -> None:
    """Joins the other processes; before anything asks for a device.

    Args:
        where: 'auto', as a TPU pod or Slurm tell it; or 'HOST:PORT,N,I': address of process 0,
            number of processes, and the number of this one, from 0 to N - 1.
        timeout: seconds in which all must have come. If they do not, this process ends with a line
            on stderr and exit status 1: JAX itself would abort it with a stack trace.

    Raises:
        UsageError: `where` is none of these, or nothing here says where the others are.
    """
    arguments: dict[str, Any] = {}
    if where != 'auto':
        address, *numbers = where.split(',')
        host, _, port = address.rpartition(':')
        if not (
            host
            and len(numbers) == 2
            and all(x.isascii() and x.isdigit() and len(x) < 10 for x in (port, *numbers))
            and int(port) < 2**16
            and int(numbers[1]) < int(numbers[0])
        ):
            raise UsageError(
                f"--distributed={where}: must be 'auto' or HOST:PORT,N,I with process I of 0 to N-1"
            )
        arguments = {
            'coordinator_address': address,
            'num_processes': int(numbers[0]),
            'process_id': int(numbers[1]),
        }

    def too_late() -> None:
        terminal.complain(
            f'error: --distributed={where}: not all processes came within {timeout} s; start all '
            'of them, with the same address, or give more time with --distributed_timeout=SECONDS'
        )
        os._exit(1)  # nothing was begun that could be lost

    watch = threading.Timer(timeout, too_late)
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=timeout + 60, shutdown_timeout_seconds=END_TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(f'--distributed={where}: {first_line(error)}') from error
    finally:
        watch.cancel()


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    return jax.process_index() == 0


def largest(value: int) -> int:
    """The largest of all processes' values; all must call it at the same point."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def wait_for_all() -> None:
    """Returns once all processes have called it, however long that takes."""
    largest(0)


def agree(error: Exception | None) -> None:
    """Raises `error`, or if another process has one, UsageError; all must call it together.

    Without this, the others would wait for a process that has stopped.
    """
    anywhere = largest(error is not None)
    if error is not None:
        raise error
    if anywhere:
        raise UsageError('another process of this run found a mistake; see its message')


def fetch(tree: Any) -> Any:
    """`jax.device_get`, also of arrays with parts on other hosts; all must call it together."""

    def get(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return jax.device_get(x)

    return jax.tree.map(get, tree)
