"""The benchmark: what it counts and divides by. How fast anything is, is not tested."""

import contextlib
import csv
import io
import json
import types

import jax
import pytest

from experiments.performance import benchmark, measuring
from experiments.performance.measuring import Row
from zerojax.host.errors import RunError, UsageError

ROW = Row(depth=7, width=1, size=8, channels=1, batch_size=16, precision='float32')
FOUND = {
    'train': {'median': 200.0, 'least': 150.0, 'most': 250.0},
    'evaluation': {'median': 500.0, 'least': 400.0, 'most': 600.0},
    'milliseconds a step': 80.0,
    'flops a step': 4e9,
    'peak': 100e9,
    'memory': 5e6,
    'projected over plain': 1.25,
    'measurements in steps': 3.0,
}


@pytest.fixture
def clock(monkeypatch):
    """Stands still but for what is added to it."""
    clock = types.SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(measuring, 'time', clock)
    return clock


def test_calls_take_turns_and_are_timed_singly(clock):
    made = []

    def lasting(name, seconds):
        def call(n):
            made.append((name, n))
            clock.now += n * seconds

        return call

    got = measuring.time_in_turns(
        {'short': lasting('short', 2), 'long': lasting('long', 5)}, 3, 6.0
    )
    assert got['short'] == {'median': 2, 'least': 2, 'most': 2}
    assert got['long']['median'] == 5
    assert made[4:] == [('short', 3), ('long', 3)] * 3, 'the shortest fills 6 seconds'


def test_the_slowest_repetition_is_the_lowest_rate():
    got = measuring.rates(12, measuring.median_and_range([1.0, 2.0, 6.0]))
    assert got == {'median': 6.0, 'least': 2.0, 'most': 12.0}


def multiplications(row: Row) -> int:
    """In the forward pass of one image, of convolutions and head."""
    blocks = (row.depth - 4) // 3
    side, features = row.size, 16
    count = 9 * row.channels * features * side**2
    for stage in range(3):
        for block in range(blocks):
            new = 16 * row.width * 2**stage
            side = side // 2 if stage and not block else side
            count += 9 * features * new * side**2
            count += features * new * side**2 if new != features else 0
            features = new
    return count + features * 10


@pytest.mark.parametrize(
    ('size', 'channels', 'steps', 'share'), [(8, 1, 11, 1.05), (8, 1, 1, 1.05), (16, 3, 1, 0.95)]
)
def test_flops_are_those_of_one_step(size, channels, steps, share):
    """Twice the multiplications, three times: forward, and backward to inputs and weights.

    Also of a call that makes several. Patches, which these take and the smallest images, are
    multiplied at the padding too, direct convolutions are not; all else is little.
    """
    row = Row(7, 1, size, channels, batch_size=128, precision='float32')
    config = benchmark.build_config(row)
    config.steps_per_call = steps
    with jax.numpy_dtype_promotion('standard'):
        stepper = measuring.Stepper(config, benchmark.random_dataset(row))
        flops = stepper.flops()
    assert flops == pytest.approx(share * 6 * multiplications(row) * row.batch_size, rel=0.1)


def test_a_row_is_measured(monkeypatch):
    """On the network that is compiled in the shortest time."""
    build_config = benchmark.build_config

    def toy(row):
        config = build_config(row)
        config.model.update({'name': 'mlp', 'width': 20, 'convolution': 'direct'})
        return config

    monkeypatch.setattr(benchmark, 'build_config', toy)
    monkeypatch.setattr(benchmark, 'SECONDS', 0.0)
    with jax.numpy_dtype_promotion('standard'):
        found = benchmark.measure(ROW, repetitions=1)
    assert found.keys() == FOUND.keys()
    seconds = ROW.batch_size / found['train']['median']
    assert found['milliseconds a step'] == pytest.approx(1e3 * seconds)
    numbers = [value for value in found.values() if isinstance(value, float | int)]
    assert all(number > 0 for number in numbers)


def test_a_line_of_the_table(monkeypatch):
    seconds = iter([30.0, 10.0, 0.0, 0.0, 0.0, 0.0])
    torch = {'torch': {'train': {'median': 90.0, 'least': 80.0, 'most': 95.0}}}
    torch['torch.compile'] = {'train': {'median': 100.0, 'least': 99.0, 'most': 101.0}}

    def in_process(kind, *_):
        found = torch | {'first step': True, 'hardware': 64.0, 'jax': FOUND}
        return found[kind], next(seconds)

    monkeypatch.setattr(benchmark, 'in_process', in_process)
    line = benchmark.measure_row(ROW, 5, with_torch=True)
    assert line['first step, cold (warm), s'] == '30.0 (10.0)'
    assert line['train images/s'] == '200 (150 to 250)'
    assert line['of peak'] == '50%', '4 GFLOP in 80 ms'
    assert line['deterministic / hardware'] == '1.250', '80 ms over 64'
    assert line['over best PyTorch'] == '2.00'


def test_without_pytorch_its_columns_are_empty(monkeypatch):
    monkeypatch.setattr(
        benchmark, 'in_process', lambda kind, *_: (64.0 if kind == 'hardware' else FOUND, 1.0)
    )
    line = benchmark.measure_row(ROW, 5, with_torch=False)
    assert [value for name, value in line.items() if 'PyTorch' in name] == ['-', '-', '-']


def test_a_process_that_fails_is_named(monkeypatch, capsys):
    bad = Row(depth=8, width=1, size=8, channels=1, batch_size=16, precision='float32')
    monkeypatch.setattr(benchmark, 'in_process', lambda kind, *_: (None, 1.0))
    with pytest.raises(RunError, match='digits-8-1-16-f32'):
        benchmark.measure_row(bad, 1, with_torch=False)
    monkeypatch.undo()
    assert benchmark.in_process('first step', bad)[0] is None
    assert 'model.depth=8: must be 3n + 4' in capsys.readouterr().out


def test_the_command(monkeypatch, tmp_path, capsys):
    argv = ['benchmark', f'--workdir={tmp_path}', '--rows=digits-10-1-32-f32']

    def measured(kind, *_):
        if kind != 'machine':
            return 64.0 if kind == 'hardware' else FOUND, 1.0
        with contextlib.redirect_stdout(io.StringIO()) as printed:  # of the child, in this process
            assert benchmark.main(['benchmark', '--child=["machine", null, 1]']) == 0
        return json.loads(printed.getvalue()), 1.0

    monkeypatch.setattr(benchmark, 'in_process', measured)
    assert benchmark.main(argv) == 0
    assert 'the CPU is measured' in capsys.readouterr().out
    with open(tmp_path / 'table.csv') as file:
        (line,) = csv.DictReader(file)
    assert (line['network'], line['batch']) == ('ConstNet-10-1, 8x8x1', '32')
    table = (tmp_path / 'table.md').read_text()
    assert 'python -m experiments.performance.benchmark' in table
    assert 'torch' in table
    for name, value in line.items():
        assert name in table
        assert f' {value} ' in table
    with pytest.raises(UsageError, match='rows=digits-1: no such row; allowed: digits-10-1-32-f32'):
        benchmark.run(['benchmark', '--rows=digits-1'])
