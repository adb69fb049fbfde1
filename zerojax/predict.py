"""Predicts when a run begins to learn and which streams break, without training it.

python -m zerojax.predict --config=configs/NAME.py[:VARIANT] [--config.FIELD=VALUE ...]
                          [--scales=1e-8,1e-6] [--steps=N] [--features=8] [--seeds=5]
                          [--workdir=DIR]
python -m zerojax.predict --model=MODULE:FUNCTION [the same flags, but --config]

For gaussian noise on the initial weights of a network whose features start equal. Small networks
stand for the run's: one of two features a stream says how small noise grows (linear prediction),
one of --features follows the run itself, through the kinks of ReLUs (reduced prediction). Both are
of the very noise that the run would draw, and of its batches; the reduced one also of other seeds
of the noise, --seeds in all, since onsets scatter. Training begins at the onset: the number of
updates after which the asymmetry first is 0.1.

A model of your own needs no config: FUNCTION returns (apply, params, tx, loss, batches), as
zerojax.own_model.Model takes them, or such a Model; which axes hold features is inferred. Its
linear prediction is of the network itself, and --features and --seeds are for a Model that has
`make`, of which there is a reduced one; without it, `curves` in predict.json are the linear ones.

--scales defaults to the config's perturbation.scale (of a model to 1e-6), --steps to the run's, but
at most 400. The screen tells each stream's growth, and each scale's onsets; DIR/predict.json
(default: runs/predict_NAME) has the curves, DIR/figures/predict.png shows them. Exit status: 0
success, whatever is predicted; 1 the symmetric run itself diverges; 2 a mistake in flags, config,
model, data or workdir, or a run that this cannot predict.
"""

import math
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax.host import figures, manifest, paths, records
from zerojax.host.command import run_command
from zerojax.host.errors import RunError, UsageError
from zerojax.host.progress import Progress
from zerojax.host.stop import exit_on_signals
from zerojax.host.terminal import say
from zerojax.measure import own_model
from zerojax.measure.compiled import count_operations
from zerojax.measure.prediction import ALONE, Curves, growth_per_step, largest
from zerojax.measure.stability import ONSET, predict_onset
from zerojax.run import checks, cli, data, named_model
from zerojax.run.prediction import Predictor, check_predictable

MAX_STEPS = 400


class Answer(NamedTuple):
    """What is told, drawn and written."""

    workdir: pathlib.Path
    described: records.Record  # what was predicted, for predict.json
    found: records.Record  # what predict.json holds of the prediction
    curves: dict[float, tuple[Curves, list[Curves]]]  # {scale: (linear, reduced of each seed)}
    seeds: int  # of the reduced prediction; 0: there is none


def parse_scales(text: str | None, config: ConfigDict) -> list[float]:
    """The scales that --scales names, or the config's.

    Raises:
        UsageError: one is no number above 0, or would be 0 or infinite in the run's precision.
    """
    if text is None:
        scales = [config.perturbation.scale]
        if scales[0] <= 0:
            raise UsageError(
                f'perturbation.scale={scales[0]}: must be above 0, or give --scales=1e-8,1e-6'
            )
        return scales
    return scales_in(text, config.param_dtype)


def scales_in(text: str, dtype: str) -> list[float]:
    """The scales that --scales names, for weights of a dtype.

    Raises:
        UsageError: one is no number above 0, or would be 0 or infinite in the dtype.
    """
    try:
        scales = [float(each) for each in text.split(',')]
    except ValueError:
        scales = []
    least, most = (1e-307, 1e307) if dtype == 'float64' else (1e-37, 1e37)
    if not scales or not all(least <= each <= most for each in scales):
        raise UsageError(
            f'--scales={text}: must be numbers above 0, such as 1e-8,1e-6, from {least} to {most}'
        )
    return list(dict.fromkeys(scales))


def median_onset(onsets: list[int | None]) -> float | None:
    """None if the middle one is: such runs count as later than any other."""
    middle = statistics.median(math.inf if each is None else each for each in onsets)
    return None if math.isinf(middle) else middle


def onset_records(scale: float, linear: Curves, reduced: list[Curves]) -> list[records.Record]:
    """The onset of each stream, and with stream None that of the largest asymmetry."""
    rows = []
    for stream in (*linear, None):

        def of(curves: Curves, stream: str | None = stream) -> np.ndarray:
            return largest(curves) if stream is None else curves[stream]

        seeds = [predict_onset(of(each)) for each in reduced]
        rows.append(
            {
                'scale': scale,
                'stream': stream,
                'linear': predict_onset(of(linear)),
                'reduced': median_onset(seeds) if seeds else None,
                'reduced_seeds': seeds,
            }
        )
    return rows


def in_log10(curves: Curves) -> dict[str, list[float | None]]:
    """In logarithms to base 10, None where there is no finite number."""
    return {
        name: [float(x) / math.log(10) if math.isfinite(x) else None for x in curve]
        for name, curve in curves.items()
    }


def cost_lines(
    predictor: Predictor, operations: dict[str, float], features: int, runs: int
) -> list[str]:
    """What the prediction and the runs that it stands for cost."""
    config, steps = predictor.config, predictor.steps
    # The linear part's steps take about two of the reduced network's each.
    seconds = predictor.seconds_per_step() * steps * (runs + 2)
    return [
        f'{config.model.name} on {config.dataset.name}, {steps} of {config.num_steps} steps; '
        f'{runs} run{"s" if runs > 1 else ""} with gaussian noise on the initial weights',
        f'operations a step: {operations["full"]:.2g}; of a reduced network of at most {features} '
        f'features a stream {operations["reduced"]:.2g}',
        f'the prediction takes about {seconds:.0f} s once it is compiled; the runs take '
        f'{runs * steps * operations["full"]:.2g} operations',
    ]


def predict(
    predictor: Predictor, scales: list[float], features: int, seeds: int
) -> tuple[records.Record, dict[float, tuple[Curves, list[Curves]]]]:
    """What predict.json holds, and {scale: (linear, reduced of each seed)}.

    Raises:
        RunError: the symmetric run itself diverges.
    """
    operations = predictor.operations()
    try:
        for line in cost_lines(predictor, operations, features, len(scales) * seeds):
            say(line)
        linear = predictor.linear(1.0)
    except ValueError as error:
        raise RunError(f'the symmetric run itself: {error}') from error
    reduced: dict[float, list[Curves]] = {scale: [] for scale in scales}
    with Progress(len(scales) * seeds * predictor.steps) as progress:
        for i in range(seeds):
            noise = predictor.noise(predictor.config.perturbation.seed + i)
            for scale in scales:
                reduced[scale].append(predictor.reduced(noise, scale, progress.advance))
    curves = {scale: (predictor.linear(scale), reduced[scale]) for scale in scales}
    found = record(
        predictor.stream_sizes,
        linear,
        curves,
        dtype=predictor.config.model.dtype or predictor.config.param_dtype,
        operations=operations,
    )
    return found, curves


def record(
    features: dict[str, int],
    of_unit: Curves,
    curves: dict[float, tuple[Curves, list[Curves]]],
    *,
    dtype: str,
    operations: Mapping[str, float | None],
) -> records.Record:
    """What predict.json holds of a prediction; `of_unit` is the linear one per unit of scale."""
    return {
        'streams': {
            name: {'features': count, 'growth': growth_per_step(of_unit[name])}
            for name, count in features.items()
        },
        'onsets': [row for scale, each in curves.items() for row in onset_records(scale, *each)],
        'curves': {
            str(scale): in_log10((reduced or [linear])[0])
            for scale, (linear, reduced) in curves.items()
        },
        'linear_curves': {str(scale): in_log10(linear) for scale, (linear, _) in curves.items()},
        'rounding_scale': rounding_scale(dtype, of_unit),
        'operations': operations,
        'steps': len(largest(of_unit)) - 1,
    }


def rounding_scale(dtype: str, linear: Curves) -> float:
    """The scale of noise whose asymmetry at the start is one rounding of the run's arithmetic.

    What is smaller may be swallowed, whatever the linear law says of it, or blown up. `linear` is
    per unit of scale. 0 where no stream has two features, so that no noise is an asymmetry.
    """
    roundoff = float(jnp.finfo(dtype).eps) / 2
    start = float(largest(linear)[0])
    return roundoff * math.exp(-start) if start > -math.inf else 0.0


def screen(found: records.Record) -> list[str]:
    """The prediction as lines of at most 100 columns."""
    width = min(max([14, *map(len, found['streams'])]), 32)  # the end of a name tells most
    row = f'{{:<{width}}}{{:>9}}{{:>14}}  {{}}'
    over = f'small asymmetry, over {found["steps"]} steps'
    lines = ['', row.format('stream', 'features', 'growth a step', over)]
    for name, stream in found['streams'].items():
        growth = stream['growth']
        lines.append(
            row.format(
                name[-width:],
                stream['features'],
                '-' if growth is None else f'{growth:+z.4f}',
                fate(growth),
            )
        )
    row = f'{{:<10}}{{:<{width}}}{{:>8}}{{:>10}}  {{}}'
    lines += ['', f'onset: the step at which the asymmetry is {ONSET:g}']
    lines += [row.format('scale', 'stream', 'linear', 'reduced', 'reduced, by seed of the noise')]
    for each in found['onsets']:
        lines.append(
            row.format(
                f'{each["scale"]:g}',
                'any' if each['stream'] is None else each['stream'][-width:],
                shown(each['linear']),
                shown(each['reduced']) if each['reduced_seeds'] else '-',
                ', '.join(shown(onset) for onset in each['reduced_seeds']),
            )
        )
    floor = found['rounding_scale']
    if any(each['scale'] < floor for each in found['onsets']):
        lines += [
            '',
            f'below a scale of {floor:.0e} rounding decides: such noise starts training about when '
            'the reduced',
            'network says, or, where it is swallowed, never',
        ]
    return [line[:100].rstrip() for line in lines]


def fate(growth: float | None) -> str:
    """What becomes of small asymmetry that grows so much a step."""
    if growth is None:
        return 'none'
    if abs(growth) < 5e-5:  # shown as 0.0000
        return 'stays'
    if growth < 0:
        return 'dies'
    return f'grows, twice as large every {math.log(2) / growth:.0f} steps'


def shown(onset: float | None) -> str:
    return 'never' if onset is None else f'{onset:g}'


def draw(curves: dict[float, tuple[Curves, list[Curves]]], seeds: int, path: pathlib.Path) -> None:
    """A panel a scale: each stream's asymmetry against the step, reduced and linear prediction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(curves), 3)
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(5 * columns + 1.5, 4 * rows), layout='constrained')
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes in panels.ravel()[len(curves) :]:
        axes.set_axis_off()
    for axes, (scale, (linear, reduced)) in zip(panels.flat, curves.items(), strict=False):
        for i, name in enumerate(linear):
            color = f'C{i}'
            for of_seed in reduced[1:]:
                axes.plot(np.exp(of_seed[name]), color=color, lw=0.7, alpha=0.4)
            for of_seed in reduced[:1]:
                axes.plot(np.exp(of_seed[name]), color=color, lw=1.8, label=name)
            small = np.where(linear[name] < 0, linear[name], np.nan)
            label = None if reduced else name
            axes.plot(np.exp(small), '--', color=color, lw=1.2, label=label)
        axes.axhline(ONSET, color='0.5', lw=0.8)
        axes.set(yscale='log', xlabel='step', ylabel='asymmetry', title=f'noise of {scale:g}')
        axes.grid(alpha=0.3)
    others = f', thin: {seeds - 1} other seeds of the noise' if seeds > 1 else ''
    lines = f'line: reduced network{others}\n' if seeds else ''
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc='outside lower center',
        ncols=4,
        frameon=False,
        title=f'{lines}dashes: linear prediction; grey: onset',
        title_fontsize=9,
    )
    figures.save_png(figure, path)


def predict_config(argv: list[str], values: flags.FlagValues) -> Answer:
    """Of the run of a config."""
    config, workdir = cli.parse_flags(argv, values, workdir='runs/predict_NAME')
    steps = cli.count(values, 'steps', least=2)
    features = cli.count(values, 'features', least=ALONE + 1)
    seeds = cli.count(values, 'seeds', least=1)
    check_predictable(config)
    scales = parse_scales(values.scales, config)
    last_seed = config.perturbation.seed + seeds - 1
    if last_seed > config_lib.INT32:
        raise UsageError(
            f'--seeds={seeds}: are the seeds {config.perturbation.seed} to {last_seed} of the '
            f'perturbation; must be at most {config_lib.INT32}'
        )
    predictor = Predictor(config, data.load_of(config), steps, features)
    cli.make_folder(workdir)
    found, curves = predict(predictor, scales, features, seeds)
    return Answer(workdir, {'config': config_lib.as_json(config)}, found, curves, seeds)


def predict_model(argv: list[str], values: flags.FlagValues) -> Answer:
    """Of a model that --model names."""
    given = cli.flags_given(argv)
    for name in given:
        if name == 'config':
            raise UsageError('--model, --config: one run is predicted; leave one of them out')
        if name.startswith('config.'):
            raise UsageError(
                f'--{name}: is a field of a config, and --model has none; leave it out'
            )
    flags.DEFINE_string('workdir', None, '', flag_values=values)
    cli.parse(argv, values)
    where = values.workdir or f'runs/predict_{values.model.replace(":", "_")}'
    workdir = paths.meant(where, f'--workdir={where}')
    steps = cli.count(values, 'steps', least=2)
    features = cli.count(values, 'features', least=ALONE + 1)
    seeds = cli.count(values, 'seeds', least=1)
    checks.check_devices()
    model = named_model.load(values.model)
    dtype = str(jnp.result_type(*jax.tree.leaves(model.params)))
    scales = scales_in(values.scales or '1e-6', dtype)
    if not model.make and (unused := [x for x in ('features', 'seeds') if x in given]):
        raise UsageError(
            f'--{unused[0]}: is of the reduced prediction, which needs an own_model.Model with '
            'make; leave it out'
        )
    if len(model.batches) < 2:
        raise UsageError(f'--model={values.model}: has 1 batch; must have at least 2, one a step')
    try:
        own_model.check_predictable(model, features)
    except ValueError as error:
        raise UsageError(f'--model={values.model}: {error}') from error
    cli.make_folder(workdir)
    say(f'{values.model}, {min(steps, len(model.batches))} steps')
    try:
        full = count_operations(model.step, model.start(), model.batches[0])
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        told = own_model.predict(model, scales, steps, features=features, seeds=seeds)
    except ValueError as error:
        raise RunError(f'the symmetric run itself: {error}') from error
    of_unit = {name: x - math.log(scales[0]) for name, x in told.linear[scales[0]].items()}
    curves = {scale: (told.linear[scale], told.reduced.get(scale, [])) for scale in scales}
    operations = {'full': full, 'reduced': None}
    found = record(told.streams, of_unit, curves, dtype=dtype, operations=operations)
    described = {'model': values.model, 'feature_axes': told.report}
    return Answer(workdir, described, found, curves, seeds if told.reduced else 0)


def run(argv: list[str]) -> None:
    """The command; `argv` are the program's name and the flags."""
    began = time.monotonic()
    values = cli.text_flags(model=None, scales=None, steps=str(MAX_STEPS), features='8', seeds='5')
    given = cli.flags_given(argv)
    if 'model' not in given and 'config' not in given:
        raise UsageError(
            '--config: missing; give it, or --model=MODULE:FUNCTION; to begin with, '
            '--config=configs/digits.py'
        )
    answer = (predict_model if 'model' in given else predict_config)(argv, values)
    for line in screen(answer.found):
        say(line)
    figure = answer.workdir / 'figures' / 'predict.png'
    drawn = figures.try_to_draw(figure, lambda: draw(answer.curves, answer.seeds, figure))
    records.write_json(
        answer.workdir / 'predict.json',
        {
            **manifest.environment(),
            **answer.described,
            **answer.found,
            'seconds': round(time.monotonic() - began, 1),
        },
    )
    say(f'\n{answer.workdir}/predict.json' + (', figures/predict.png' if drawn else ''))


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    return run_command(run, argv, __doc__, exit_on_signals)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
