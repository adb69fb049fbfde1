"""How should a convolution be expressed here? Forward, and both gradients, of ConstNet's shapes.

    python -m experiments.performance.convolutions [--workdir=DIR] [--batch=N]

Milliseconds of each 3x3 convolution of ConstNet-16-1 on 32x32 images, of ConstNet-10-1 on 8x8
images and of a network of two features, and of its gradients with respect to inputs and weights,
in float32:

    direct     XLA's convolution
    patches    one matrix product over patches of all nine taps
    taps       nine matrix products, one a tap, that are added
    outer      weight gradients only: one matrix product of three shifted copies of the inputs along
               a row with three shifted copies of the outputs' gradients along a column
    PyTorch    channels_last, in a process of its own; empty without PyTorch

Medians of 9 repetitions in which the expressions take turns. Inputs come out of an elementwise
function, as they do in a network, so that XLA may fuse it. Ends in table.md and table.csv; three
minutes on two CPU cores. docs/performance.md keeps the results.
"""

import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import runs
from experiments.performance import measuring
from experiments.performance.benchmark import find_machine
from zerojax.host import paths
from zerojax.host.command import run_command
from zerojax.host.errors import RunError
from zerojax.host.stop import raise_on_signals
from zerojax.host.terminal import say
from zerojax.models.convolutions import convolve_direct, convolve_patches
from zerojax.run import cli
from zerojax.step.determinism import jit_in_mode

REPETITIONS = 9
SECONDS = 0.05  # that a repetition takes at least
SHAPES = (  # side, features in, features out, stride
    (32, 3, 16, 1),
    (32, 16, 16, 1),
    (32, 16, 32, 2),
    (16, 32, 32, 1),
    (16, 32, 64, 2),
    (8, 64, 64, 1),
    (8, 16, 16, 1),
    (8, 16, 32, 2),
    (4, 32, 32, 1),
    (4, 32, 64, 2),
    (2, 64, 64, 1),
    (8, 1, 16, 1),
    (32, 2, 2, 1),
)
PASSES = ('forward', 'input gradient', 'weight gradient')


def convolve_taps(x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The convolution of `zerojax.models.convolutions` as a sum of matrix products, one a tap."""
    side = (x_BxHxWxC.shape[1] - 1) // stride + 1
    x = jnp.pad(x_BxHxWxC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    span = stride * (side - 1) + 1
    products = [
        jnp.matmul(
            x[:, i : i + span : stride, j : j + span : stride], kernel[i, j], precision='highest'
        )
        for i in range(3)
        for j in range(3)
    ]
    return functools.reduce(jnp.add, products)


def outer_weight_gradient(x_BxHxWxC: jax.Array, grad_BxHxWxN: jax.Array) -> jax.Array:
    """[3, 3, C, N], of a convolution of stride 1."""
    side, channels, features = x_BxHxWxC.shape[1], x_BxHxWxC.shape[-1], grad_BxHxWxN.shape[-1]
    x = jnp.pad(x_BxHxWxC, ((0, 0), (0, 0), (1, 1), (0, 0)))
    grad = jnp.pad(grad_BxHxWxN, ((0, 0), (1, 1), (0, 0), (0, 0)))
    along_rows = jnp.concatenate([x[:, :, j : j + side] for j in range(3)], axis=-1)
    along_columns = jnp.concatenate([grad[:, 2 - i : 2 - i + side] for i in range(3)], axis=-1)
    product = jnp.einsum('bhwp,bhwq->pq', along_rows, along_columns, precision='highest')
    return product.reshape(3, channels, 3, features).transpose(2, 0, 1, 3)


def expressions(which: str, stride: int) -> dict[str, Callable[..., jax.Array]]:
    """Functions (inputs, kernel, gradient of the outputs) -> the result of one pass."""

    def one_pass(convolve: Any, x: jax.Array, kernel: jax.Array, grad: jax.Array) -> jax.Array:
        if which == 'forward':
            return convolve(x, kernel, stride)
        if which == 'input gradient':
            return jax.vjp(lambda x: convolve(x, kernel, stride), x)[1](grad)[0]
        return jax.vjp(lambda kernel: convolve(x, kernel, stride), kernel)[1](grad)[0]

    convolutions = {'direct': convolve_direct, 'patches': convolve_patches, 'taps': convolve_taps}
    found: dict[str, Callable[..., jax.Array]] = {
        name: functools.partial(one_pass, convolve) for name, convolve in convolutions.items()
    }
    if which == 'weight gradient' and stride == 1:
        found['outer'] = lambda x, kernel, grad: outer_weight_gradient(x, grad)
    return found


def inputs(shape: tuple[int, int, int, int], batch: int) -> tuple[np.ndarray, ...]:
    """Images, kernel and gradient of the outputs of one of `SHAPES`, normally distributed."""
    side, channels, features, stride = shape
    rng = np.random.default_rng(0)
    sizes = (
        (batch, side, side, channels),
        (3, 3, channels, features),
        (batch, side // stride, side // stride, features),
    )
    return tuple(rng.normal(size=size).astype(np.float32) for size in sizes)


def measure(shape: tuple[int, int, int, int], batch: int, which: str) -> dict[str, float]:
    """Milliseconds of each expression of a pass."""
    arguments = jax.device_put(inputs(shape, batch))

    def timed(expression: Callable[..., jax.Array]) -> Callable[[int], None]:
        def in_network(x: jax.Array, kernel: jax.Array, grad: jax.Array) -> jax.Array:
            return expression(jax.nn.relu(1.1 * x + 0.1), kernel, 2.0 * grad)

        function = jit_in_mode(in_network, 'deterministic')
        return measuring.repeat(lambda: function(*arguments).block_until_ready())

    calls = {name: timed(each) for name, each in expressions(which, shape[-1]).items()}
    times = measuring.time_in_turns(calls, REPETITIONS, SECONDS)
    return {name: each['median'] * 1e3 for name, each in times.items()}


def measure_torch(shape: tuple[int, int, int, int], batch: int, which: str) -> float:
    """Milliseconds of a pass in PyTorch."""
    import torch

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.backends.cudnn.allow_tf32 = False
    x, kernel, grad = (torch.from_numpy(each).to(device) for each in inputs(shape, batch))
    x, grad = x.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)  # channels_last, as they are stored
    kernel = kernel.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    stride = (shape[-1],) * 2

    def call() -> None:
        if which == 'forward':
            torch.conv2d(x, kernel, stride=stride, padding=1)
        else:
            wanted = (which == 'input gradient', which == 'weight gradient', False)
            torch.ops.aten.convolution_backward(
                grad, x, kernel, None, stride, (1, 1), (1, 1), False, (0, 0), 1, wanted
            )
        if device == 'cuda':
            torch.cuda.synchronize()

    return measuring.time_alone(measuring.repeat(call), REPETITIONS, SECONDS)['median'] * 1e3


def all_of_torch(batch: int) -> list[float | None]:
    """Of each shape and pass, measured in a fresh process.

    Raises:
        RunError: that process failed.
    """
    if importlib.util.find_spec('torch') is None:
        return [None] * (len(SHAPES) * len(PASSES))
    command = [
        sys.executable,
        '-m',
        'experiments.performance.convolutions',
        f'--torch_batch={batch}',
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
        raise RunError(f'PyTorch could not be measured: {reason}')
    return json.loads(done.stdout.splitlines()[-1])


def shown(milliseconds: float | None) -> str:
    return '-' if milliseconds is None else f'{milliseconds:.2f}'


def run(argv: list[str]) -> None:
    """The command; `argv` are the program's name and the flags."""
    # --torch_batch is for the process that the command starts.
    values = cli.text_flags(workdir='runs/experiments/convolutions', batch='128', torch_batch=None)
    cli.parse(argv, values)
    if values.torch_batch is not None:
        batch = cli.count(values, 'torch_batch', least=1)
        times = [measure_torch(shape, batch, which) for shape in SHAPES for which in PASSES]
        say(json.dumps(times))
        return
    command = ' '.join(['python -m experiments.performance.convolutions', *argv[1:]])
    workdir = paths.meant(values.workdir, f'--workdir={values.workdir}')
    batch = cli.count(values, 'batch', least=1)
    find_machine()
    cli.make_folder(workdir)
    of_torch = iter(all_of_torch(batch))  # first, as it may need the device
    rows = []
    for shape in SHAPES:
        for which in PASSES:
            found = measure(shape, batch, which) | {'PyTorch': next(of_torch)}
            side, channels, features, stride = shape
            row = {'inputs': f'{side}x{side}x{channels}', 'features': features, 'stride': stride}
            names = ('direct', 'patches', 'taps', 'outer', 'PyTorch')
            rows.append(row | {'pass': which} | {name: shown(found.get(name)) for name in names})
            say(' '.join(map(str, rows[-1].values())))
    runs.save_table(workdir, command, f'{runs.machine()}.', rows)


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    return run_command(run, argv, __doc__, raise_on_signals)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
