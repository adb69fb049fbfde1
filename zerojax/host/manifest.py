"""The manifest of a run: what its result depends on beyond its config, at every start."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess

import jax

from zerojax.host.errors import UsageError
from zerojax.host.records import Record, write_json

PACKAGES = (
    'zerojax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'ml-collections',
    'tensorflow-datasets', 'scikit-learn', 'numpy',
)  # fmt: skip


def environment() -> Record:
    """What a result depends on beyond its config: time, process, versions, git revision, devices,
    XLA flags."""
    return {
        'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'pid': os.getpid(),
        'host': platform.node(),
        'platform': platform.platform(),
        'python': platform.python_version(),
        'versions': {name: importlib.metadata.version(name) for name in PACKAGES},
        'git': _git_revision(),
        'device_kind': jax.devices()[0].device_kind,
        'device_count': jax.device_count(),
        'backend': jax.default_backend(),
        'cpu_count': os.cpu_count(),
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
    }


def add_start(path: pathlib.Path, step: int, facts: Record) -> Record:
    """Appends this start, or resume, at `step` to the manifest, and returns the manifest.

    `facts` are what the caller knows: compiler options, execution mode, dataset; the environment is
    added. The manifest's top level repeats the newest start; `starts` has them all.

    Raises:
        UsageError: the manifest is damaged, or the run was started on other data.
    """
    try:
        manifest = json.loads(path.read_text()) if path.exists() else {'starts': []}
        starts = manifest['starts']
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f'--workdir={path.parent}: its manifest.json cannot be read ({error}); '
            'remove that file, or name another folder'
        ) from error
    if starts and starts[0]['dataset'] != facts['dataset']:
        raise UsageError(
            f'--workdir={path.parent}: its run was started on other data, see the hashes in '
            'manifest.json; name another folder'
        )
    start = {'step': step, **environment(), **facts}
    audit = {'audit': manifest['audit']} if 'audit' in manifest else {}
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
