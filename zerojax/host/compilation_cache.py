"""What XLA compiled, kept on disk for the next process.

JAX's persistent compilation cache, in a folder for each kind of CPU: JAX takes programs compiled
for another CPU, which may use instructions that this one does not have, or round otherwise.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import sys
import tempfile

import jax


def use_compilation_cache() -> None:
    """Keeps and takes all compiled programs, unless JAX is told another place, or not to.

    `JAX_COMPILATION_CACHE_DIR` and `JAX_ENABLE_COMPILATION_CACHE=false` tell it. A folder that
    cannot be written to, or a damaged file in it, costs the time to compile anew and no more.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return
    try:
        folder = default_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where home is
        print(
            f'note: programs are compiled anew, since there is no cache for them ({error}); '
            'XDG_CACHE_HOME may name a folder that can be written to',
            file=sys.stderr,
        )
        return
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def default_folder() -> pathlib.Path:
    """Where the cache lies unless JAX is told another place: in the user's folder for caches.

    Raises:
        RuntimeError: the user has no home folder.
    """
    of_user = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    return pathlib.Path(of_user) / 'zerojax' / cpu_name()


def cpu_name() -> str:
    """A name of this kind of CPU, the same on machines that may share compiled programs."""
    facts = [platform.processor()]
    with contextlib.suppress(OSError):  # it is there on Linux
        first = pathlib.Path('/proc/cpuinfo').read_text().split('\n\n')[0]
        facts += [
            x for x in first.splitlines() if x.startswith(('model name', 'flags', 'Features'))
        ]
    return f'{platform.machine()}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}'
