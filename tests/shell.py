"""Commands as a user types them, and what a run of the toy leaves."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
DIGITS = f'--config={ROOT}/configs/digits.py'
TOY = (
    f'{DIGITS} --config.num_steps=4 --config.model.name=mlp --config.model.init=averaging '
    '--config.model.width=8 --config.model.convolution=direct --config.eval_every_steps=2'
)

NOT_OF_A_USER = ('XLA_FLAGS', 'PYTHONUNBUFFERED')


def shell(command, **variables):
    """A command line of bash, as a user has it, with one device."""
    assignments = ' '.join(f'{name}={shlex.quote(x)}' for name, x in variables.items())
    command = command.replace('python', f'env {assignments} {sys.executable}', 1)
    return subprocess.run(
        ['bash', '-c', f'set -o pipefail; {command}'], capture_output=True, cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in NOT_OF_A_USER}, timeout=600,
        encoding='utf-8', errors='surrogateescape',
    )  # fmt: skip


def files(workdir):
    return {
        str(x.relative_to(workdir)) for x in workdir.rglob('*')
        if '/d/' not in str(x) and 'ocdbt' not in str(x) and 'tfevents' not in x.name
    }  # fmt: skip


def sha256(workdir):
    return json.loads((workdir / 'summary.json').read_text())['params_sha256']


def whole(workdir, undisturbed, *, drawn=True):
    """All that a run leaves is there, and is what it is of a run that nobody disturbed."""
    left_out = set() if drawn else {'figures', 'figures/run.png'}
    assert files(workdir) == files(undisturbed) - left_out
    assert sha256(workdir) == sha256(undisturbed)
    metrics = 'metrics.jsonl'
    assert (workdir / metrics).read_bytes() == (undisturbed / metrics).read_bytes()
