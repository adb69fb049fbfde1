"""The manifest of a run: what its result depends on beyond its config, at every start."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess

import jax
from flax.traverse_util import flatten_dict

from zerojax.host.errors import UsageError
from zerojax.host.records import Record, write_json

PACKAGES = (
    'zerojax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'ml-collections',
    'tensorflow-datasets', 'scikit-learn', 'numpy',
)  # fmt: skip

LAUNCHER = 'ZEROJAX_LAUNCHER'  # the variable that names what brought this process about

# What is logged, checked, cached or found where decides no bit; all other options of JAX may.
# `jax_enable_x64` each run sets to what its `param_dtype` asks for.
_HARMLESS = re.compile(
    'async|backend|binary|cache|check|color|constants|debug|device|dump|enable_x64|'
    'error|explain|export|frames|garbage|guard|host|jax2tf|leak|location|log|mesh|mutable|'
    'no_execution|platform|poison|preemption|profil|promotion|recover|regex|serialization|'
    'sharding|source|timeout|traceback|tracing|transfer|transport|verbose|visible'
)
# What XLA and its libraries read: kernels, precision, order of additions, number of threads.
VARIABLES = re.compile(
    'XLA_FLAGS|LIBTPU_INIT_ARGS|NVIDIA_TF32_OVERRIDE|(PJRT_)?NPROC|'
    'NCCL_(ALGO|PROTO|MIN_NCHANNELS|MAX_NCHANNELS|NTHREADS|NVLS_ENABLE|COLLNET_ENABLE)|'
    'CUBLAS(LT)?_WORKSPACE_CONFIG|TF_(CUDNN|DETERMINISTIC)_.*'
)
# Flags that only say how many devices there are, which the manifest counts, what is dumped, or how
# long devices wait for one another.
_HARMLESS_FLAGS = re.compile(
    r'--xla_(force_host_platform_device_count|dump|\w*collective_\w*timeout)'
)


def environment() -> Record:
    """What a result depends on beyond its config: versions, revision, machine, settings; and when,
    where and by which process it was asked for, and what launched that on a cluster."""
    device = jax.devices()[0]
    return {
        'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'pid': os.getpid(),
        'launcher': os.environ.get(LAUNCHER),
        'host': platform.node(),
        'platform': platform.platform(),
        'python': platform.python_version(),
        'versions': {name: importlib.metadata.version(name) for name in PACKAGES},
        'git': _git_revision(),
        'backend': jax.default_backend(),
        'device_kind': device.device_kind,
        'device_count': jax.device_count(),
        'cpu': _cpu(),
        'cpu_count': os.cpu_count(),
        'cpu_cores': usable_cores(),
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
        'settings': settings(),
    }


def settings() -> Record:
    """Options of JAX and environment variables that may decide bits, as JSON takes them.

    An option has the value that holds in this thread. A variable that is not set is left out.
    """
    options = {
        name.upper(): getattr(jax.config, name, value)
        for name, value in sorted(jax.config.values.items())
        if not _HARMLESS.search(name)
    }
    variables = {
        name: ' '.join(x for x in text.split() if not _HARMLESS_FLAGS.match(x))
        for name, text in sorted(os.environ.items())
        if VARIABLES.fullmatch(name)
    }
    plain = (bool, int, float, str, type(None))
    found = {name: x if isinstance(x, plain) else str(x) for name, x in options.items()}
    return found | {name: text for name, text in variables.items() if text}


def cpuinfo() -> str:
    """What Linux says of the CPUs, in any locale; elsewhere nothing."""
    try:
        return pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace')
    except OSError:
        return ''


def _cpu() -> str:
    """Model of the CPU, as the system names it, and what else tells it from others of that name."""
    found = dict(re.findall(r'^([\w ]+?)\s*: (.+)$', cpuinfo().partition('\n\n')[0], re.M))
    name = found.get('model name') or platform.processor() or platform.machine()
    numbers = [f'{x} {found[x]}' for x in ('cpu family', 'model', 'stepping') if x in found]
    return f'{name} ({", ".join(numbers)})' if numbers else name


def usable_cores() -> int | None:
    """Number of cores that this process may use, which XLA takes for its number of threads."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def read_starts(path: pathlib.Path) -> list[Record]:
    """All starts that a manifest has, the newest last; none if there is no file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        starts: list[Record] = json.loads(path.read_text())['starts'] if path.exists() else []
        for start in starts:
            start['step'], start['dataset'], start['versions']['zerojax']
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UsageError(
            f'--workdir={path.parent}: its manifest.json cannot be read ({error}); '
            'put it back, or name another folder'
        ) from error
    return starts


def differences(path: pathlib.Path, facts: Record) -> list[str]:
    """How machine, versions and execution differ here from where a run was started or resumed last.

    Sentences, none if nothing does. `facts` as in `add_start`.

    Raises:
        UsageError: the run cannot go on as it began: with other settings, or on other data; or
            nobody knows whether it would.
    """
    starts = read_starts(path)
    if not starts:
        return []
    before, now = starts[-1], environment() | facts
    where = f'--workdir={path.parent}: its run was started'
    if starts[0]['dataset'] != facts['dataset']:
        raise UsageError(
            f'{where} on other data, see the hashes in manifest.json; name another folder'
        )
    if 'settings' not in before:
        raise UsageError(
            f'{where} by zerojax {before["versions"]["zerojax"]}, which did not note what settings '
            'of JAX were in force; finish it with that version, or name another folder'
        )
    for name in sorted(before['settings'].keys() | now['settings'].keys()):
        there, here = before['settings'].get(name), now['settings'].get(name)
        # Of options, another version of JAX has others; a variable may be set or not.
        known = name in before['settings'] and name in now['settings']
        if there != here and (known or VARIABLES.fullmatch(name)):
            raise UsageError(
                f'{where} with {name}={there!r}, here it is {here!r}, which may change its '
                'numbers; set it as it was, or name another folder'
            )
    there, here = _flat(before), _flat(now)
    return [
        f'{name} was {there.get(name)!r}, is {here.get(name)!r}'
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


def _flat(start: Record) -> Record:
    """Machine, versions and execution of a start, by dotted names."""
    names = ('git', 'backend', 'device_kind', 'device_count', 'cpu', 'cpu_count', 'cpu_cores')
    groups = {name: start.get(name, {}) for name in ('versions', 'compiler_options', 'execution')}
    return {name: start.get(name) for name in names} | flatten_dict(groups, sep='.')


def add_start(path: pathlib.Path, step: int, facts: Record) -> Record:
    """Appends this start, or resume, at `step` to the manifest, and returns the manifest.

    `facts` are what the caller knows: compiler options, execution mode, dataset; the environment is
    added. The manifest's top level repeats the newest start; `starts` has them all.

    Raises:
        UsageError: the manifest cannot be read.
    """
    starts = read_starts(path)
    start = {'step': step, **environment(), **facts}
    kept = json.loads(path.read_text()) if starts else {}
    audit = {'audit': kept['audit']} if 'audit' in kept else {}
    manifest = {**start, **audit, 'starts': [*starts, start]}
    write_json(path, manifest)
    return manifest


def add_audit(path: pathlib.Path, manifest: Record, audit: Record) -> None:
    """Adds the audit of a run's machine, made once and kept by all later starts."""
    write_json(path, {**manifest, 'audit': audit})


def _git_revision() -> str | None:
    """Revision of the checkout that this code runs from, '+' behind it if changed; else None."""
    here = pathlib.Path(__file__)
    git = ['git', '-C', str(here.parent)]
    output = ''
    for command in (
        [*git, 'ls-files', '--error-unmatch', here.name],
        [*git, 'describe', '--always', '--abbrev=40', '--dirty=+'],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:
            return None  # installed, not a checkout
        output = done.stdout.strip()
    return output
