"""What XLA compiled, kept on disk for the next process.

JAX's persistent compilation cache, in a folder for each kind and number of CPUs: JAX takes programs
compiled for others, which may use instructions that this one does not have, or other threads.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import tempfile

import jax

from zerojax.host import terminal
from zerojax.host.manifest import cpuinfo, usable_cores

VERSION = 2  # before it, programs for GPUs may have what was chosen by time


def use_compilation_cache() -> None:
    """Keeps and takes all compiled programs, unless JAX is told another place, or not to.

    `JAX_COMPILATION_CACHE_DIR` and `JAX_ENABLE_COMPILATION_CACHE=false` tell it. Without a folder
    that can be written to there is no cache; what is damaged is compiled anew, with JAX's warning.

    In no case does XLA keep what its autotuner chose: a deterministic program would take what one
    in mode 'hardware' chose by time, and JAX's cache would not tell it from one that did not.
    """
    jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return
    try:
        folder = default_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where home is
        terminal.complain(
            f'note: programs are compiled anew, since there is no cache for them ({error}); '
            'XDG_CACHE_HOME may name a folder that can be written to'
        )
        return
    jax.config.update('jax_compilation_cache_dir', str(folder))
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def leave_compilation_cache() -> None:
    """Undoes `use_compilation_cache`, before anything is compiled.

    Of several processes the first alone writes, so they would not compile alike.
    """
    with contextlib.suppress(RuntimeError):
        if jax.config.jax_compilation_cache_dir == str(default_folder()):  # type: ignore[attr-defined]
            jax.config.update('jax_compilation_cache_dir', None)


def default_folder() -> pathlib.Path:
    """Where the cache lies unless JAX is told another place: in the user's folder for caches.

    Raises:
        RuntimeError: the user has no home folder.
    """
    of_user = pathlib.Path(os.environ.get('XDG_CACHE_HOME', ''))
    if not of_user.is_absolute():  # as the XDG specification has it
        of_user = pathlib.Path.home() / '.cache'
    return of_user / 'zerojax' / f'programs-{VERSION}' / cpu_name()


def cpu_name() -> str:
    """A name of kind and number of CPUs, the same on machines that may share compiled programs."""
    facts = [platform.processor(), str(usable_cores()), os.environ.get('NPROC', '')]
    first = cpuinfo().split('\n\n')[0]
    facts += [x for x in first.splitlines() if x.startswith(('model name', 'flags', 'Features'))]
    return f'{platform.machine()}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}'
