"""Runs under fire: killed, damaged, without space, raced for. Nothing is lost or silently wrong.

    python tests/stress/stress.py [--only=NAME,NAME,...] [--kills=100] [--terms=20] [--disks=12]
                                  [--races=20] [--files=N] [--bits=20] [--configs=2000]
                                  [--workdir=DIR] [--seed=0]

Each scenario prints what it did and ends with 'passed', or the script stops with the assertion that
failed; the folder DIR (default: a new one in the system's temporary folder) keeps what it did.

    kills    SIGKILL at random moments, so many times over one run, which then ends with the weights
             and, to the byte, the records of a run that nobody disturbed
    terms    the same with SIGTERM, at any moment of start, compilation, evaluation and saving: exit
             status 143, or 0 for a run that was just finished
    damage   every file of the newest checkpoint emptied, cut in half, and with one bit turned over:
             the run falls back to the one before and ends with the same weights; with all
             checkpoints damaged it stops with an error
    disk     a disk that is full at every point of a run, and one that becomes read-only: one line
             on stderr, exit status 1 or 2; with space again the same command ends with the same
             weights (needs the right to mount a tmpfs; says so if it is missing)
    races    two processes started at once in one folder: one trains, the other is told so
    data     every file of a prepared set missing, emptied, cut in half, and with one bit turned
             over, N times; a set half prepared; wrong labels, images and numbers of examples; a
             damaged archive: the run trains on the same data, or is refused
    configs  configs, flags and grids at random, most of them mistakes: a run passes all checks that
             come before training, or is refused
             ('refused': exit status 2, one line on stderr, and nothing written)

tests/stress/test_stress.py runs it at a small size; docs/reliability.md has the figures of the full
size.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any
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


def kills(fire: Fire, number: int) -> None:
    """SIGKILL; moments are spread from the start of a process to its hundredth step."""
    steps = 200 * number + 200  # more than as many lives can make
    expected = fire.undisturbed(steps)
    workdir = fire.new_folder('killed')
    seconds = json.loads((expected / 'summary.json').read_text())['seconds']
    start = time.monotonic()
    status, _, error = fire.run(expected, steps)  # finished: measures the start alone
    assert status == 0, error
    start = time.monotonic() - start
    a_step = max(seconds - start, 0.1 * seconds) / steps
    done, moments = 0, []
    while done < number:
        process = fire.start(workdir, steps)
        time.sleep(fire.random.uniform(0, start + 100 * a_step))
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()
            break
        process.kill()
        process.communicate()
        done += 1
        newest = max(
            (int(x.name) for x in (workdir / 'checkpoints').glob('*') if x.name.isdigit()),
            default=0,
        )
        moments.append(newest)
    status, output, error = fire.run(workdir, steps)
    assert status == 0, error
    fire.check_same(workdir, steps)
    assert done == number, f'the run was finished after {done} kills'
    resumed = re.search(r'RESUMING at step (\d+)', output)
    lives = len(json.loads((workdir / 'manifest.json').read_text())['starts'])
    print(
        f'kills: {done} of a run of {steps} steps, {lives} of {done + 1} lives came to train; '
        f'{len(set(moments))} different newest checkpoints; the last life went on from step '
        f'{resumed[1] if resumed else 0}; weights and records are those of the undisturbed run'
    )


def terms(fire: Fire, number: int) -> None:
    """SIGTERM at moments spread over a whole short run."""
    steps = 400
    fire.undisturbed(steps)
    status, finished, stopped = 0, 0, 0
    began = time.monotonic()
    workdir = fire.new_folder('timed')
    fire.run(workdir, steps)
    life = time.monotonic() - began
    for i in range(number):
        workdir = fire.new_folder(f'terminated_{i}')
        process = fire.start(workdir, steps)
        time.sleep(life * (i + fire.random.random()) / number)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=120)
        assert process.returncode in (0, 143, -signal.SIGTERM), (process.returncode, error)
        assert 'Traceback' not in error, error
        finished += process.returncode == 0
        stopped += 'stopped and saved' in error
        status, _, error = fire.run(workdir, steps)
        assert status == 0, error
        fire.check_same(workdir, steps)
    print(
        f'terms: {number} over the {life:.0f} s of a run; {stopped} saved a checkpoint, {finished} '
        'were finished already, the others had not begun to train; all went on to the same weights'
    )


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


def damage(fire: Fire, number_of_files: int | None = None) -> None:
    """Every file of the newest checkpoint, in three ways; in this process, to compile once."""
    from zerojax.cli import parse_flags
    from zerojax.errors import RunError
    from zerojax.program import Programs
    from zerojax.train import train

    steps = 100
    expected = fire.undisturbed(steps)
    newest = expected / 'checkpoints' / str(steps)
    files = sorted(x.relative_to(expected) for x in newest.rglob('*') if x.is_file())
    assert len(files) > 5
    if number_of_files is not None:
        files = fire.random.sample(files, number_of_files)
    config, _ = parse_flags(['main', *flags(steps)])
    programs = Programs()
    fell_back = unharmed = 0
    for change in (emptied, cut_in_half, one_bit_turned):
        for file in files:
            workdir = fire.new_folder('damaged')
            shutil.copytree(expected, workdir)
            content = change((workdir / file).read_bytes(), fire.random)
            (workdir / file).write_bytes(content)
            summary = train(config, workdir, programs)
            fire.check_same(workdir, steps)
            assert summary['params_sha256'] == sha(expected), (change, file)
            aside = (workdir / 'damaged_checkpoints' / str(steps)).exists()
            fell_back += aside
            unharmed += not aside
    for change in (emptied, cut_in_half):
        workdir = fire.new_folder('damaged')
        shutil.copytree(expected, workdir)
        for file in (workdir / 'checkpoints').rglob('*'):
            if file.is_file():
                file.write_bytes(change(file.read_bytes(), fire.random))
        try:
            train(config, workdir, programs)
        except RunError as error:
            assert 'none is left to resume from' in str(error)
        else:
            raise AssertionError('trained from damaged checkpoints')
    print(
        f'damage: {3 * len(files)} cases; {fell_back} checkpoints were set aside, {unharmed} were '
        'whole in all that counts; all ended with the same weights; none left is an error'
    )


def mounted(folder: pathlib.Path, kilobytes: int) -> bool:
    """Whether a tmpfs of that size could be mounted there."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ['mount', '-t', 'tmpfs', '-o', f'size={kilobytes}k', 'tmpfs', str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def disk(fire: Fire, number: int) -> None:
    """A disk of so many sizes, none of which holds the run; then one that is large enough."""
    steps = 100
    expected = fire.undisturbed(steps)
    needed = sum(x.stat().st_size for x in expected.rglob('*') if x.is_file()) // 1024
    disk = fire.workdir / 'disk'
    if not mounted(disk, 64):
        print('disk: not run, a tmpfs may not be mounted here')
        return
    subprocess.run(['umount', str(disk)], check=True)
    statuses = []
    for i in range(number):
        size = max(4, round(needed * (i + 0.5) / number / 4) * 4)
        assert mounted(disk, size)
        try:
            status, _, error = fire.run(disk / 'run', steps)
            if status != 0:
                check_message(status, error)
            statuses.append(status)
            subprocess.run(['mount', '-o', f'remount,size={20 * needed}k', str(disk)], check=True)
            status, _, error = fire.run(disk / 'run', steps)
            assert status == 0, error
            fire.check_same(disk / 'run', steps)
        finally:
            subprocess.run(['umount', str(disk)], check=True)
    assert any(statuses), 'no disk was too small'

    assert mounted(disk, 20 * needed)
    try:
        for steps_before in (0, 1):
            workdir = disk / f'run_{steps_before}'
            if steps_before:
                shutil.copytree(expected, workdir)
            subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
            status, _, error = fire.run(workdir, steps)
            check_message(status, error)
            assert status == 2, 'nothing was trained'
            subprocess.run(['mount', '-o', 'remount,rw', str(disk)], check=True)
    finally:
        subprocess.run(['umount', str(disk)], check=True)
    print(
        f'disk: {number} sizes up to {needed} kB, {sum(map(bool, statuses))} too small, each an '
        'error of one line; with space all went on to the same weights; read-only is a mistake'
    )


def races(fire: Fire, number: int) -> None:
    """Two at once."""
    steps = 400
    fire.undisturbed(steps)
    for i in range(number):
        workdir = fire.new_folder(f'raced_{i}')
        processes = [fire.start(workdir, steps) for _ in range(2)]
        results = sorted(
            (process.returncode, errors)
            for process in processes
            for _, errors in [process.communicate(timeout=300)]
        )
        assert [status for status, _ in results] == [0, 2], results
        assert 'another process is training in it' in results[1][1]
        fire.check_same(workdir, steps)
    print(f'races: {number}; each time one trained and the other was told so')


def prepare_tiny_sets(folder: pathlib.Path, *names: str) -> None:
    script = ROOT / 'tests' / 'make_tiny_tfds.py'
    command = [sys.executable, str(script), str(folder), *names]
    subprocess.run(command, check=True, capture_output=True)


def rewrite(file: pathlib.Path, change: Callable[[list[Any]], Any]) -> None:
    """Writes an array_record file anew, with intact checksums, after a change of its examples."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    reader = ArrayRecordReader(str(file))
    records = [tf_example_pb2.Example.FromString(each) for each in reader.read_all()]
    reader.close()
    change(records)
    writer = ArrayRecordWriter(str(file), 'group_size:1')
    for record in records:
        writer.write(record.SerializeToString())
    writer.close()


def with_label(label: int) -> Callable[[list[Any]], Any]:
    return lambda records: (
        records[3].features.feature['label'].int64_list.value.__setitem__(0, label)
    )


def with_small_image(records: list[Any]) -> None:
    from PIL import Image

    png = io.BytesIO()
    Image.new('RGB', (1, 1)).save(png, 'png')
    records[3].features.feature['image'].bytes_list.value[0] = png.getvalue()


def half_prepared(folder: pathlib.Path) -> None:
    """As TFDS leaves it when it is killed: a folder beside, without the descriptions."""
    folder.rename(folder.with_name(f'incomplete.GAWX1N_{folder.name}'))
    for file in folder.parent.glob('incomplete*/*.json'):
        file.unlink()


def data(fire: Fire, bits: int, *names: str) -> None:
    """Damage of every file of prepared sets, and sets that were never right."""
    whole, copy = fire.new_folder('sets'), fire.workdir / 'damaged_sets'
    prepare_tiny_sets(whole, *names)

    def train(name: str, root: pathlib.Path) -> Any:
        """What the manifest says of the data; None if it was refused."""
        workdir = fire.new_folder('trained')
        held_out = 'validation' if 'imagenet' in name else 'test'
        status, error = in_this_process([
            'main', *flags(1), f'--workdir={workdir}', f'--config.dataset.name={name}',
            f'--config.dataset.data_dir={root}', f'--config.dataset.eval_split={held_out}',
            '--config.batch_size=8', '--config.model.width=4',
        ])  # fmt: skip
        if status == 0:
            return json.loads((workdir / 'manifest.json').read_text())['dataset']
        check_refusal(status, error)
        assert not workdir.exists()
        assert f'{root}' in error, error
        return None

    intact = {name: train(name, whole) for name in names}
    assert None not in intact.values()

    def refused(name: str, change: Callable[[pathlib.Path], Any], path: pathlib.Path) -> bool:
        """Whether the set is refused once a file or folder of it was changed."""
        shutil.copytree(whole, fire.new_folder(copy.name))
        change(copy / path)
        found = train(name, copy)
        assert found in (None, intact[name]), (change, path)
        return found is None

    def damage_file(change: Callable[[bytes, random.Random], bytes]) -> Callable[..., Any]:
        return lambda file: file.write_bytes(change(file.read_bytes(), fire.random))

    def damage_archives(folder: pathlib.Path) -> None:
        shutil.rmtree(folder)
        manual = copy / 'downloads' / 'manual'
        manual.mkdir(parents=True)
        for archive in ('cifar-10-binary.tar.gz', 'Imagenet32_train_npz.zip'):
            (manual / archive).write_bytes(b'half of it')

    file_changes = [pathlib.Path.unlink, *map(damage_file, (emptied, cut_in_half))]
    file_changes += [damage_file(one_bit_turned)] * bits
    record_changes = [
        with_label(-1), with_label(1000), with_label(2**32 + 3), with_small_image,
        lambda records: records.pop(), lambda records: records.append(records[0]),
        lambda records: records.clear(),
    ]  # fmt: skip
    results = []
    # A machine with a network and TensorFlow would go on to download the set.
    with mock.patch('zerojax.data._why_unreachable', lambda url, timeout: 'not asked'):
        for name in names:
            files = sorted(
                x.relative_to(whole) for x in (whole / name.split('/')[0]).rglob('*') if x.is_file()
            )
            for file in files:
                of_file = [refused(name, change, file) for change in file_changes]
                assert all(of_file[:3]) or 'array_record' not in file.name, file
                results += of_file
            (train_file,) = (x for x in files if '-train.' in x.name)
            never_right = [
                *[refused(name, lambda f, c=c: rewrite(f, c), train_file) for c in record_changes],
                *[
                    refused(name, change, train_file.parent)
                    for change in (half_prepared, shutil.rmtree, damage_archives)
                ],
            ]
            assert all(never_right), never_right
            results += never_right
    print(
        f'data: {len(results)} cases; {sum(results)} were refused, {len(results) - sum(results)} '
        'trained on data of the same hash'
    )


class Claimed(Exception):
    """All checks before training have passed, and the folder is claimed; instead of training."""


LONG_NUMBER = '9' * 5000
ODD_TEXTS = (
    '', ' ', 'nan', 'inf', '-inf', '1e400', '1e-300', '1e300', '-1', '-0.0', '0', '1', '2', '0.5',
    '7', '2147483647', '2147483648', '1' + '0' * 30, LONG_NUMBER, '0x10', '1_0', '²', '٣', 'None',
    'True', 'false', '()', '(1,', '(1,2)', '(0.1,0.2)', '(nan,)', "('a',)", '[1]', '{}', '(' * 300,
    '10**30', "'", '"', '(', '[', '*', '(?P<', 'a{1,2', '\\', '.*', '(?i)stem', '(a+)+$', 'ü', '𝕬',
    '\u202e', '\u2028', '\n', 'a\nb', '\r', '\x1b[31m', '\x7f', '\udc80', '%s', '{0}', '$HOME', '~',
    '..', '/', '/dev/null', '/dev/null/x', 'a' * 300, 'a/' * 3000, 'gs://b/x', 'file:///x',
    'constnet', 'leakynet', 'mlp', 'wideresnet', 'averaging', 'random', 'he', 'hadamard', 'fixup',
    'delta_orthogonal', '1_iiii_iiii_iiii', '1iii', 'hhhh', 'kaka', 'direct', 'patches', 'pre_relu',
    'bfloat16', 'float64', 'float16', 'hardware', 'deterministic', 'gaussian', 'one_weight', 'ulp',
    'gradient', 'activation', 'dropout', 'disout', 'unequal_init', 'sgd', 'radam', 'digits',
    'cifar10', 'svhn_cropped', 'imagenet_resized/32x32', 'imagenet', 'train', 'test', 'train[:8]',
    'train[:0]', 'train[', 'train+test', 'all', 'magnitude', 'stem', 'block1_0/.*', 'nowhere',
)  # fmt: skip
ODD_VALUES = (
    None, True, False, 0, 1, 2, 3, 7, 10, 16, 1000, -1, 2**20, 2**31 - 1, 2**31, 2**63, 10**30,
    -(10**400), 0.0, -0.0, 0.5, 0.999, 1.0, 1e-6, 1e-45, 1e-300, 1e30, 1e300, -1.5, float('nan'),
    float('inf'), float('-inf'), 1j, b'', b'a', (), (1,), (0.5, 0.6), (0.6, 0.5), (1.0, 2.0, 3.0),
    (float('nan'),), (1e300,), (1e-300,), (10**400,), (True,), ('a',), ((1,),), (None,), [], [1],
    {}, {'a': 1}, {1: 2}, range(3), '\0', 'a\0b',
)  # fmt: skip


LIKELY_TEXTS = {
    'batch_size': '1 2 8 40 41 1437 1438',
    'dataset.augment': 'true',
    'dataset.cutout': '1 8 9 33',
    'dataset.mean': '() (1.0,) (1.0,2.0,3.0)',
    'dataset.mixup': '0.001 1.0 1e-9',
    'dataset.std': '() (1.0,) (1.0,2.0,3.0)',
    'determinism.mode': 'hardware deterministic',
    'keep_checkpoints_at': '(0,) (5,5) (10000,)',
    'mesh.data': '1 2 2147483647',
    'model.convolution': 'direct patches',
    'model.depth': '1 4 7 10 16 22 9998',
    'model.dropout': '0.0 0.5',
    'model.dropout_at': 'stem blocks',
    'model.dtype': 'bfloat16',
    'model.init': 'averaging random he hadamard delta_orthogonal fixup 1iii 1_hiak hhhhhhh',
    'model.name': 'mlp constnet leakynet wideresnet',
    'model.negative_slope': '0 0.3',
    'model.shortcut': 'pre_relu',
    'model.sigma_w': '0 0.5 1e6',
    'model.unique_features': '1 3 4 5',
    'model.width': '1 2 3 5 1000 1000000 2147483647',
    'num_epochs': '1 2147483647',
    'num_steps': '1 5 2147483647',
    'optimizer.b1': '0.8',
    'optimizer.drop_at': '() (0.5,) (0.1,0.1,0.9)',
    'optimizer.freeze': 'stem .*bias .* ( *',
    'optimizer.learning_rate': '0 0.1 1e30',
    'optimizer.momentum': '0 0.5',
    'optimizer.name': 'radam sgd',
    'optimizer.nesterov': 'true',
    'param_dtype': 'bfloat16 float64 float32',
    'perturbation.at_step': '0 1 5 700 2147483647',
    'perturbation.backward': 'true',
    'perturbation.count': '1 2 100 2147483647',
    'perturbation.every': '0 1 100',
    'perturbation.kind': 'none gaussian one_weight ulp unequal_init gradient activation disout',
    'perturbation.layers': '.*bias stem block1_0 hidden/kernel head [',
    'perturbation.relative': 'true',
    'perturbation.scale': '0 0.5 1.0 1e30',
    'pruning.fraction': '0.5',
    'pruning.layers': 'head (',
    'pruning.source': '. nowhere /',
    'steps_per_call': '1 7 2147483647',
    'symmetry.project': 'true',
}


def odd_commands(sets: pathlib.Path) -> Any:
    """Draws commands as (argv, what a config file sets fields to), most of them with a mistake."""
    import hypothesis.strategies as st
    from flax.traverse_util import flatten_dict

    from zerojax.config import default_config

    toy = ['--config.model.name=mlp', '--config.model.init=averaging', '--config.model.width=4',
           '--config.model.convolution=direct']  # fmt: skip
    small = ['--config.model.width=1', '--config.batch_size=8', f'--config.dataset.data_dir={sets}']
    shallow = ['--config.model.depth=7', *small]
    whole = ['--config.dataset.train_split=train', '--config.dataset.eval_split=test']
    bases = [
        ['digits.py', *toy], ['digits.py', *toy], ['digits.py', *shallow], ['onset.py:long', *toy],
        ['cifar.py', *shallow], ['cifar.py:trial', *shallow, *whole], ['leakynet.py', *small],
        ['fashion_mnist.py:trial', *shallow, *whole], ['imagenet32.py', *shallow],
    ]  # fmt: skip
    fields = sorted(flatten_dict(default_config().to_dict(), sep='.'))
    processes = (
        '', '\n', 'auto', 'h:1,2,1', 'h:1,2,2', 'h:1,2', ':1,1,0', 'h:99999,1,0', 'h:²,1,0',
        'h:1,²,0', 'h:1,0,0', 'h:1,2,-1', f'h:1,{LONG_NUMBER},0', f'h:{LONG_NUMBER},1,0',
    )  # fmt: skip

    @st.composite
    def commands(draw: Any) -> tuple[list[str], dict[Any, Any]]:
        field, text = st.sampled_from(fields), st.sampled_from(ODD_TEXTS)
        text |= st.text(max_size=8).map(lambda x: x.replace('\0', ''))
        text |= st.integers().map(str) | st.floats().map(str)
        value = st.sampled_from(ODD_VALUES) | text | st.integers() | st.floats()
        value |= st.lists(st.floats(0, 1), max_size=3).map(tuple)

        def flag() -> str:
            kinds = ['likely'] * 6 + ['field'] * 4 + ['main', 'main', 'odd'] + ['grid'] * 4 * sweep
            match draw(st.sampled_from(kinds)):
                case 'likely':
                    name = draw(st.sampled_from(sorted(LIKELY_TEXTS)))
                    return f'--config.{name}={draw(st.sampled_from(LIKELY_TEXTS[name].split()))}'
                case 'field':
                    return f'--config.{draw(field)}={draw(text)}'
                case 'main':
                    return draw(
                        st.builds('--distributed={}'.format, st.sampled_from(processes))
                        | st.builds('--distributed_timeout={}'.format, text)
                        | st.builds('--workdir={}'.format, text)
                    )
                case 'grid':
                    values = ','.join(draw(st.lists(text, max_size=3)))
                    return draw(
                        st.builds('--seeds={}'.format, text | st.just('999999999'))
                        | st.builds('--runs_at_once={}'.format, text | st.just('auto'))
                        | (field | text).map(lambda name: f'--grid.{name}={values}')
                    )
                case _:
                    names = '', '--', '--config', '--confg', '--flagfile', '--config.', '--grid.'
                    name = draw(st.sampled_from(names) | text)
                    return draw(st.sampled_from(['', '='])).join([name, draw(text)])

        sweep = draw(st.booleans())
        config, *overrides = draw(st.sampled_from(bases))
        argv = [f'--config={ROOT}/configs/{config}', *overrides]
        argv += [flag() for _ in range(draw(st.integers(0, 3)))]
        values = draw(
            st.just({})
            | st.just({})
            | st.dictionaries(field | text | st.integers(), value, max_size=2)
        )
        return ['sweep' if sweep else 'main', *argv], values

    return commands()


def fuzzed_config(file: pathlib.Path, argv: list[str], values: dict[Any, Any]) -> list[str]:
    """`argv` with a config file between that sets fields to any values, as `get_config` may."""
    base, variant = re.match(r'--config=(.*\.py):?(.*)', argv[1]).groups()  # type: ignore[union-attr]
    file.write_text(
        'import runpy\n'
        'from math import inf, nan\n'
        'def get_config():\n'
        f'    config = runpy.run_path({base!r})["get_config"]({repr(variant) if variant else ""})\n'
        '    with config.ignore_type(), config.unlocked():\n'
        f'        for name, value in {values!r}.items():\n'
        '            parts = name.rpartition(".") if type(name) is str else ("", "", name)\n'
        '            (config[parts[0]] if parts[0] in config else config)[parts[2]] = value\n'
        '    return config\n'
    )
    return [argv[0], f'--config={file}', *argv[2:]]


def configs(fire: Fire, number: int) -> None:
    """Commands at random, in this process, up to where the training would begin."""
    import hypothesis
    import jax

    from zerojax.program import Programs

    sets = fire.new_folder('sets')
    prepare_tiny_sets(sets, 'cifar10', 'fashion_mnist', 'imagenet_resized/32x32')
    undisturbed = fire.undisturbed(100)
    existing = shutil.copytree(undisturbed, fire.new_folder('existing'))
    before = contents(existing)
    here = fire.new_folder('here')
    here.mkdir()
    programs, counts = Programs(), {'refused': 0, 'passed': 0}

    @hypothesis.seed(fire.random.randrange(2**32))
    @hypothesis.settings(
        max_examples=number, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(odd_commands(sets), hypothesis.strategies.booleans())
    def refused_or_passed(command: tuple[list[str], dict[Any, Any]], in_existing: bool) -> None:
        argv, values = command
        if values:
            files = fire.workdir / 'configs'
            files.mkdir(exist_ok=True)
            argv = fuzzed_config(files / f'fuzzed_{sum(counts.values())}.py', argv, values)
        if in_existing:
            argv = [*argv, f'--workdir={existing}']
        try:
            check_refusal(*in_this_process(argv))
        except Claimed:
            counts['passed'] += 1
            for folder in here.iterdir():
                shutil.rmtree(folder)
            if contents(existing) != before:  # a sweep in it
                shutil.rmtree(existing)
                shutil.copytree(undisturbed, existing)
        else:
            counts['refused'] += 1
        assert not contents(here), argv
        assert contents(existing) == before, argv
        if sum(counts.values()) % 100 == 0:
            jax.clear_caches()

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(here))
        for name, instead in {
            'zerojax.train.Run': mock.Mock(side_effect=Claimed),
            'jax.distributed.initialize': mock.Mock(side_effect=Claimed),
            'zerojax.train.Programs': lambda: programs,
            'zerojax.sweep.Programs': lambda: programs,
            'zerojax.program.device_memory': lambda: 2**30,  # spares the machine
            'zerojax.data._why_unreachable': lambda url, timeout: 'not asked',
        }.items():
            stack.enter_context(mock.patch(name, instead))
        refused_or_passed()
    total = sum(counts.values())
    assert 0.05 * total < counts['passed'] < 0.95 * total, counts
    print(f'configs: {total} commands; {counts["refused"]} were refused, {counts["passed"]} passed')


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--only', default='kills,terms,damage,disk,races,data,configs')
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--terms', type=int, default=20)
    parser.add_argument('--disks', type=int, default=12)
    parser.add_argument('--races', type=int, default=20)
    parser.add_argument('--files', type=int, default=None)
    parser.add_argument('--bits', type=int, default=20)
    parser.add_argument('--configs', type=int, default=2000)
    parser.add_argument('--workdir', type=pathlib.Path, default=None)
    parser.add_argument('--seed', type=int, default=0)
    arguments = parser.parse_args(argv)
    workdir = arguments.workdir or pathlib.Path(tempfile.mkdtemp(prefix='zerojax_stress_'))
    workdir.mkdir(parents=True, exist_ok=True)
    print(f'in {workdir}', flush=True)
    fire = Fire(workdir.absolute(), arguments.seed)
    os.environ.update(fire.environment)  # scenarios in this process, which has not imported JAX yet
    scenarios: dict[str, Callable[[], None]] = {
        'kills': lambda: kills(fire, arguments.kills),
        'terms': lambda: terms(fire, arguments.terms),
        'damage': lambda: damage(fire, arguments.files),
        'disk': lambda: disk(fire, arguments.disks),
        'races': lambda: races(fire, arguments.races),
        'data': lambda: data(fire, arguments.bits, 'cifar10', 'imagenet_resized/32x32'),
        'configs': lambda: configs(fire, arguments.configs),
    }
    for name in arguments.only.split(','):
        began = time.monotonic()
        scenarios[name]()
        print(f'{name}: passed in {time.monotonic() - began:.0f} s', flush=True)


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1:])
