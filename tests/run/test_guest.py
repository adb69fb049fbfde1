"""`train` is a guest in other people's programs: it works in any thread, and leaves no trace."""

import asyncio
import concurrent.futures
import contextlib
import gc
import locale
import logging
import multiprocessing
import os
import pathlib
import random
import signal
import sys
import threading
import warnings

import jax
import matplotlib
import numpy as np
import pytest

from zerojax.config import default_config
from zerojax.host.errors import RunError, UsageError
from zerojax.host.stop import StopRequest, exit_on_signals
from zerojax.run import recorder
from zerojax.run.program import Programs
from zerojax.run.train import train
from zerojax.step.precision import numbers_of


def toy(dtype='float32'):
    config = default_config()
    config.num_steps = 8
    config.eval_every_steps = config.checkpoint_every_steps = 2
    config.param_dtype = dtype
    config.model.update({'name': 'mlp', 'width': 8, 'convolution': 'direct'})
    config.dataset.name = 'digits'
    config.perturbation.kind, config.perturbation.scale = 'gaussian', 1e-6
    return config


@pytest.fixture(scope='module')
def programs():
    return Programs()


@pytest.fixture(scope='module')
def expected(tmp_path_factory, programs):
    """Of a run in the main thread, which is resumed once.

    What libraries do when they are imported or first used is done afterwards.
    """
    folder = tmp_path_factory.mktemp('alone')
    train(toy(), folder, programs)
    return train(toy(), folder, programs)['params_sha256']


def open_files():
    """What they are, but for fonts, which Matplotlib keeps for each thread; numbers are reused."""
    names = []
    for number in os.listdir('/proc/self/fd'):
        with contextlib.suppress(OSError):  # that of the folder itself
            names.append(os.readlink(f'/proc/self/fd/{number}'))
    return sorted(name for name in names if not name.endswith('.ttf'))


def state_of_the_process():
    gc.collect()
    loggers = logging.root.manager.loggerDict.values()
    return {
        'signals': {n: signal.getsignal(n) for n in signal.valid_signals()},
        'JAX': {name: getattr(jax.config, name, x) for name, x in jax.config.values.items()},
        'NumPy': (np.geterr(), np.geterrcall(), np.get_printoptions()),
        'random numbers': (str(np.random.get_state()), random.getstate()),
        'Matplotlib': dict.copy(matplotlib.rcParams),
        'warnings': (list(warnings.filters), warnings.showwarning),
        'logging': [
            (x.name, x.level, list(x.handlers), x.disabled)
            for x in (logging.root, *loggers)
            if isinstance(x, logging.Logger)
        ],
        'hooks': (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook),
        'streams': (sys.stdin, sys.stdout, sys.stderr),
        'interpreter': (sys.getrecursionlimit(), sys.getswitchinterval(), gc.get_threshold()),
        'environment': (dict(os.environ), os.getcwd(), locale.setlocale(locale.LC_ALL)),
        'threads': {x.name for x in threading.enumerate()} - {'tqdm_monitor'},
        'open files': open_files(),
        'modules': (list(sys.path), list(sys.argv)),
    }


@contextlib.contextmanager
def no_trace():
    before = state_of_the_process()
    yield
    after = state_of_the_process()
    for name, value in before.items():
        assert after[name] == value, name


def test_a_run_leaves_the_process_as_it_was(expected, programs, tmp_path):
    """Also another one, and one that finds itself finished."""
    with no_trace():
        assert train(toy(), tmp_path / 'a', programs)['params_sha256'] == expected
    with no_trace():
        assert train(toy(), tmp_path / 'b', programs)['params_sha256'] == expected
        assert train(toy(), tmp_path / 'b', programs)['params_sha256'] == expected


class Unforeseen(BaseException):
    pass


def raising(*_):
    raise Unforeseen


@pytest.mark.parametrize('end', ['usage', 'run', 'unforeseen'])
def test_so_does_one_that_ends_badly(expected, programs, tmp_path, monkeypatch, end):
    config = toy()
    if end == 'usage':
        config.perturbation.at_step = 8
    if end == 'run':
        config.optimizer.learning_rate = 1e30
    if end == 'unforeseen':
        monkeypatch.setattr(recorder.Recorder, 'record_step', raising)
    with no_trace(), pytest.raises((UsageError, RunError, Unforeseen)):
        train(config, tmp_path, programs)


def test_a_figure_that_cannot_be_drawn_takes_nothing_with_it(
    expected, programs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(matplotlib.rcParams, 'text.usetex', True)
    monkeypatch.setenv('PATH', '/nowhere')
    with no_trace():
        assert train(toy(), tmp_path, programs)['params_sha256'] == expected
    printed = capsys.readouterr()
    assert printed.err.startswith(f'note: {tmp_path}/figures/run.png could not be drawn (')
    assert printed.err.count('\n') == 1
    assert printed.out.endswith(f'{tmp_path}/summary.json\n')


def test_in_a_thread_signals_are_left_to_the_main_one(expected, programs, tmp_path):
    with no_trace(), concurrent.futures.ThreadPoolExecutor(1) as pool:
        done = pool.submit(train, toy(), tmp_path, programs)
        assert done.result()['params_sha256'] == expected


def test_a_running_event_loop_is_no_obstacle(expected, programs, tmp_path):
    """As a notebook has it."""

    async def cell():
        return train(toy(), tmp_path, programs)

    with no_trace():
        assert asyncio.run(cell())['params_sha256'] == expected


def test_a_handler_that_no_python_code_has_set_stays(expected, programs, tmp_path, monkeypatch):
    """As where Python is embedded in another program: nobody could put it back."""
    monkeypatch.setattr(signal, 'getsignal', lambda number: None)
    monkeypatch.setattr(signal, 'signal', raising)
    assert train(toy(), tmp_path, programs)['params_sha256'] == expected


def test_a_second_signal_is_for_the_program_around_it(expected, programs, tmp_path, monkeypatch):
    """As of somebody who interrupts a cell of a notebook twice, and wants to keep the notebook."""
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted_twice(*_):
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(recorder.Recorder, 'record_step', interrupted_twice)
    with no_trace(), pytest.raises(KeyboardInterrupt):
        train(toy(), tmp_path, programs)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_command_at_once(number):
    """By the system: a handler of Python's would wait until what is compiled is done."""
    exit_on_signals()
    before = signal.getsignal(number)
    with StopRequest() as stop:
        signal.raise_signal(number)
        assert stop.signal == number
        assert {signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)} == {signal.SIG_DFL}
    assert signal.getsignal(number) is before


@pytest.mark.slow
def test_runs_of_two_precisions_in_two_threads_do_not_mix(expected, tmp_path):
    """JAX's option for them is one of the process, as Orbax reads it in threads of its own."""
    alone = train(toy('float64'), tmp_path / 'alone')['params_sha256']
    with no_trace(), concurrent.futures.ThreadPoolExecutor(4) as pool:
        kinds = ['float32', 'float64'] * 2
        done = [pool.submit(train, toy(x), tmp_path / str(i)) for i, x in enumerate(kinds)]
        assert [each.result()['params_sha256'] for each in done] == [expected, alone] * 2


def test_numbers_within_others_are_those_of_the_inner_one():
    with no_trace(), numbers_of('float64'):
        with numbers_of('float32'):
            assert not jax.config.jax_enable_x64
        assert jax.config.jax_enable_x64


def in_a_process(workdir):
    summary = train(toy(), workdir)
    return summary['params_sha256'], threading.current_thread() is threading.main_thread()


@pytest.mark.slow
@pytest.mark.parametrize('method', ['spawn', 'forkserver'])
def test_a_pool_of_processes_trains_as_this_one(tmp_path, expected, method):
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        found = list(pool.map(in_a_process, [tmp_path / '0', tmp_path / '1']))
    assert found == [(expected, True)] * 2


def test_a_run_stays_where_it_was_begun(expected, programs, tmp_path, monkeypatch):
    """Whatever the program around it does with the working directory."""
    monkeypatch.chdir(tmp_path)
    record_step = recorder.Recorder.record_step

    def elsewhere(self, step, *measured):
        os.chdir('/')
        record_step(self, step, *measured)

    monkeypatch.setattr(recorder.Recorder, 'record_step', elsewhere)
    assert train(toy(), pathlib.Path('run'), programs)['params_sha256'] == expected
    names = {path.name for path in (tmp_path / 'run').iterdir()}
    assert {'summary.json', 'metrics.jsonl', 'figures', 'tensorboard', 'checkpoints'} <= names
