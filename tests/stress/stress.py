"""Runs under fire: killed, damaged, without space, raced for. Nothing is lost or silently wrong.

    python tests/stress/stress.py [--only=NAME,NAME,...] [--kills=100] [--terms=20] [--disks=12]
                                  [--races=20] [--files=N] [--bits=20] [--configs=2000]
                                  [--workdir=DIR] [--seed=0]

Each scenario prints what it did and ends with 'passed', or the script stops with the assertion that
failed; the folder DIR (default: a new one in the system's temporary folder) keeps what it did.

    kills    SIGKILL at random moments, so many times over one run, which then ends with the weights
             and, to the byte, the records of a run that nobody disturbed
    terms    the same with SIGTERM, at any moment of start, compilation, evaluation and saving: exit
             status 143, or 0 for a run that was just finished (before Python has begun to run the
             program, the signal itself)
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
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from damaged_data import data
from fire import (
    ROOT,
    Fire,
    check_message,
    cut_in_half,
    emptied,
    flags,
    one_bit_turned,
    sha,
)
from odd_commands import configs


def newest_checkpoint(workdir: pathlib.Path) -> int:
    names = (path.name for path in (workdir / 'checkpoints').glob('*'))
    return max((int(name) for name in names if name.isdigit()), default=0)


def kills(fire: Fire, number: int) -> None:
    """SIGKILL; moments are spread from the start of a process to its sixtieth step."""
    steps = 60 * number + 200  # more than as many lives make
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
        newest = newest_checkpoint(workdir)
        # Times of another run are a guess; so no life makes more than its 60 steps.
        moment = time.monotonic() + fire.random.uniform(0, start + 60 * a_step)
        while time.monotonic() < moment and newest_checkpoint(workdir) < newest + 60:
            time.sleep(0.002)
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()
            break
        process.kill()
        process.communicate()
        done += 1
        moments.append(newest_checkpoint(workdir))
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


def terms(fire: Fire, number: int, steps: int = 400) -> None:
    """SIGTERM at moments spread over a whole short run."""
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


def damage(fire: Fire, number_of_files: int | None = None) -> None:
    """Every file of the newest checkpoint, in three ways; in this process, to compile once."""
    from zerojax.host.errors import RunError
    from zerojax.run.cli import parse_flags
    from zerojax.run.program import Programs
    from zerojax.run.train import train

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
