"""What the scenarios of the stress script share: runs of a toy, and what may come of them."""

import contextlib
import io
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

ROOT = pathlib.Path(__file__).parents[2]


def flags(steps: int) -> list[str]:
    """The toy on the digits with a checkpoint every 5 steps, of which 3 are kept."""
    return [
        f'--config={ROOT}/configs/digits.py', f'--config.num_steps={steps}',
        '--config.model.name=mlp', '--config.model.init=averaging', '--config.model.width=32',
        '--config.model.convolution=direct', '--config.log_every_steps=10',
        '--config.eval_every_steps=50', '--config.checkpoint_every_steps=5',
        '--config.steps_per_call=5',
    ]  # fmt: skip


class Fire:
    """What the scenarios share: a folder, compiled programs, chance, and an undisturbed run."""

    def __init__(self, workdir: pathlib.Path, seed: int) -> None:
        self.workdir = workdir
        self.random = random.Random(seed)
        self.environment = os.environ | {
            'JAX_COMPILATION_CACHE_DIR': str(workdir / 'compilation_cache'),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        }

    def start(self, workdir: pathlib.Path, steps: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, '-m', 'zerojax.main', *flags(steps), f'--workdir={workdir}'],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=self.environment,
        )  # fmt: skip

    def run(self, workdir: pathlib.Path, steps: int) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        process = self.start(workdir, steps)
        output, error = process.communicate(timeout=600)
        return process.returncode, output, error

    def undisturbed(self, steps: int) -> pathlib.Path:
        workdir = self.workdir / f'undisturbed_{steps}'
        if not (workdir / 'summary.json').exists():
            status, _, error = self.run(workdir, steps)
            assert status == 0, error
        return workdir

    def new_folder(self, name: str) -> pathlib.Path:
        folder = self.workdir / name
        if folder.exists():
            shutil.rmtree(folder)
        return folder

    def check_same(self, workdir: pathlib.Path, steps: int) -> None:
        """The run in `workdir` ended as the undisturbed one, with whole records."""
        expected = self.undisturbed(steps)
        assert sha(workdir) == sha(expected)
        metrics = 'metrics.jsonl'
        assert (workdir / metrics).read_bytes() == (expected / metrics).read_bytes()


def sha(workdir: pathlib.Path) -> str:
    return json.loads((workdir / 'summary.json').read_text())['params_sha256']


def check_message(status: int, error: str) -> None:
    """A failure is one line that says what to do."""
    assert status in (1, 2), (status, error)
    lines = [line for line in error.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1, error
    assert 'Traceback' not in error, error


def in_this_process(argv: list[str]) -> tuple[int, str]:
    """Exit status and stderr of a command, argv[0] 'main' or 'sweep', as a user would see them."""
    import importlib

    module = importlib.import_module(f'zerojax.{argv[0]}')
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile('w+', errors='backslashreplace'))
        stack.enter_context(mock.patch.object(module, 'exit_on_signals'))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(file))
        stderr = os.dup(2)  # what is not Python writes there, too
        stack.callback(os.close, stderr)
        stack.callback(os.dup2, stderr, 2)
        os.dup2(file.fileno(), 2)
        status = module.main(argv)
        file.flush()
        file.seek(0)
        return status, file.read()


def contents(folder: pathlib.Path) -> dict[str, bytes | None]:
    """Every file in a folder with its bytes, and every folder in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob('*')
    }


def check_refusal(status: int, error: str) -> None:
    """A mistake is one printable line that begins with a field or flag."""
    assert status == 2, (status, error)
    assert error.count('\n') == 1, error
    assert error[:-1].isprintable(), error
    assert re.match(r'error: .+?[:=].+', error), error


def emptied(content: bytes, _: random.Random) -> bytes:
    return b'' if content else b'x'


def cut_in_half(content: bytes, _: random.Random) -> bytes:
    return content[: len(content) // 2] if len(content) > 1 else b'xx'


def one_bit_turned(content: bytes, chance: random.Random) -> bytes:
    if not content:
        return b'\1'
    changed = bytearray(content)
    changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(changed)
