"""When does training start, after how small a perturbation, and could one have known?

    python -m experiments.onset

scale · N(0, 1) is added to the initial weights, for scales from 1e-30 to 0.1 and both places of the
shortcut. Training starts when the asymmetry reaches 0.1. Beside every measured onset stand those
predicted without the run: by the linearised step; where features start on a kink, with the first
steps taken exactly; and by a reduced network of 8 features a stream, through the kinks. kinks.csv
counts the features on a kink. 3 seeds, in 25 minutes on two CPU cores. See `experiments.runs` for
flags and restarts.
"""

import math
import sys
from typing import Any

import jax
import numpy as np

from experiments import runs
from experiments.trajectories import ONSET, Laboratory, Trajectory, listed_steps
from zerojax.host import records
from zerojax.host.terminal import say
from zerojax.measure import kinks, stability
from zerojax.measure.prediction import largest
from zerojax.perturb import NONE, Perturbation
from zerojax.run.building import build_optimizer, scalars_of
from zerojax.step import TrainState, cross_entropy, train_step_function
from zerojax.step.determinism import jit_in_mode

SCALES = tuple(10.0**n for n in (-30, -25, -20, -15, *range(-12, 0)))
SHOWN = (1e-30, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)  # as curves, of the first seed
SHORTCUTS = ('pre_relu', 'post_relu')
EXACT_STEPS = (10, 30)  # beside as many as there are features on a kink
KINK_STEPS = 10  # at which these are counted
TINY = 1e-30  # stands for every perturbation that a kink makes finite


class Prediction(Laboratory):
    """What one unperturbed run says of all perturbed ones."""

    def train_step(self, state: TrainState, source: Any) -> tuple[TrainState, Any]:
        tx = build_optimizer(self.config, scalars_of(self.config))
        step = train_step_function(self.model, tx, orbits=self.orbits)
        return step(state, self.make_batch(state, source))

    def tangent(self, state: TrainState) -> Any:
        """The noise of the run itself, per unit of scale: [1, ...] like the weights."""
        key = jax.random.fold_in(state.keys['perturbation'], 0)
        return stability.gaussian_tangents(state.params, key[None])

    def arguments(self, seed: int) -> tuple[Any, ...]:
        """Of `stability.growth`, for the noise of the seed."""
        state = self.initial_state(seed)
        step = stability.of_train_step(self.train_step)
        sources = list(self.sources(state))
        return step, stability.split(state), sources, self.tangent(state), self.axes, self.orbits

    def linear(self, seed: int) -> np.ndarray:
        """Log of the asymmetry per unit of scale, [num_steps + 1]."""

        def compute() -> dict[str, Any]:
            return {'log': stability.growth(*self.arguments(seed)).log_asymmetry[:, 0].tolist()}

        return np.array(self.remember(compute, seed=seed, predict='linear')['log'])

    def one_sided(self, seed: int, exact_steps: int) -> np.ndarray:
        """Log of the asymmetry that any tiny perturbation has, [num_steps + 1]."""

        def compute() -> dict[str, Any]:
            log = stability.one_sided_log_asymmetry(
                *self.arguments(seed), exact_steps=exact_steps, epsilon=TINY
            )
            return {'log': log[:, 0].tolist()}

        fields = {'predict': 'one-sided', 'exact_steps': exact_steps, 'epsilon': TINY}
        return np.array(self.remember(compute, seed=seed, **fields)['log'])

    def reduced(self, seed: int) -> dict[float, np.ndarray]:
        """{scale: log of the asymmetry that a reduced network has, [num_steps + 1]}."""
        curves = map(largest, self.predict(seed, SCALES)['reduced'])
        return dict(zip(SCALES, curves, strict=True))

    def features_on_kinks(self, seed: int) -> list[dict[str, list[int]]]:
        """{layer: [inputs exactly at a kink, those that the perturbation moves]} of each step."""

        def count(state: TrainState, source: Any) -> dict[str, Any]:
            batch = self.make_batch(state, source)

            def loss(params: Any) -> Any:
                logits, _ = self.model.apply(
                    {'params': params, 'batch_stats': state.batch_stats},
                    batch['image'],
                    train=True,
                    mutable=['batch_stats'],
                )
                return cross_entropy(logits, batch['label'])

            tangent = jax.tree.map(lambda x: x[0], self.tangent(state))
            moved = kinks.crossings(loss, state.params, tangent, 0.0)
            counted = kinks.count(kinks.margins(loss, state.params))
            return {layer: [counted[layer], moved[layer]] for layer in counted}

        def compute() -> dict[str, Any]:
            state = self.initial_state(seed)
            mode = self.config.determinism.mode
            counting, step = jit_in_mode(count, mode), jit_in_mode(self.train_step, mode)
            steps = []
            for number, source in zip(range(KINK_STEPS), self.sources(state), strict=False):
                found = jax.device_get(counting(state, source))
                steps.append({layer: [int(x) for x in pair] for layer, pair in found.items()})
                if number + 1 < KINK_STEPS:
                    state, _ = step(state, source)
            return {'steps': steps}

        return self.remember(compute, seed=seed, predict='kinks', count=KINK_STEPS)['steps']


def steps_on_kinks(counted: list[dict[str, list[int]]]) -> int:
    """Number of steps at the start in which the perturbation moves features that are on a kink."""
    for step, layers in enumerate(counted):
        if not any(moved for _, moved in layers.values()):
            return step
    return len(counted)


def measure(experiment: runs.Experiment, shortcut: str) -> dict[str, Any]:
    """All runs and predictions of one place of the shortcut."""
    # In this mode also what is predicted, and a process of a GPU has but one.
    deterministic = {'determinism.mode': 'deterministic'}
    config = runs.changed(experiment.config, **deterministic, **{'model.shortcut': shortcut})
    laboratory = Prediction(config, experiment.workdir / 'runs' / shortcut)
    found: dict[str, Any] = {'linear': [], 'reduced': [], 'one_sided': [], 'kinks': []}
    for seed in range(experiment.seeds):
        say(f'-- {experiment.name}: {shortcut}, prediction, seed {seed}')
        found['linear'].append(laboratory.linear(seed))
        found['reduced'].append(laboratory.reduced(seed))
        counted = laboratory.features_on_kinks(seed)
        found['kinks'].append(counted)
        kinked = steps_on_kinks(counted)
        exact = [kinked, *(n for n in EXACT_STEPS if n > kinked)] if kinked else []
        found['one_sided'].append({n: laboratory.one_sided(seed, n) for n in exact})
    found['symmetric'] = laboratory.run(NONE, seed=0)
    found['measured'] = laboratory.run_arms(
        {scale: Perturbation('gaussian', scale) for scale in SCALES}, experiment.seeds
    )
    found['num_steps'] = laboratory.config.num_steps
    return found


def rows_of(shortcut: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for scale, its_runs in found['measured'].items():
        one_sided = [
            '/'.join(listed_steps([stability.predict_onset(log)]) for log in by_steps.values())
            for by_steps in found['one_sided']
        ]
        rows.append(
            {
                'shortcut': shortcut,
                'scale': f'{scale:.0e}',
                'n': len(its_runs),
                'onset': listed_steps([each.onset() for each in its_runs]),
                'predicted, linear': listed_steps(
                    [stability.predict_onset(x, scale) for x in found['linear']]
                ),
                'predicted, reduced': listed_steps(
                    [stability.predict_onset(by_scale[scale]) for by_scale in found['reduced']]
                ),
                'predicted, one-sided': ', '.join(each or '-' for each in one_sided),
                'last asymmetry': f'{max(each.asymmetry[-1] for each in its_runs):.1e}',
                'held-out accuracy': runs.mean_and_deviation([each.accuracy for each in its_runs]),
            }
        )
    return rows


def kink_rows(shortcut: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            'shortcut': shortcut, 'seed': seed, 'step': step, 'layer': layer,
            'inputs on a kink': on_kink, 'moved by the perturbation': moved,
        }
        for seed, counted in enumerate(found['kinks'])
        for step, layers in enumerate(counted)
        for layer, (on_kink, moved) in layers.items()
        if on_kink
    ]  # fmt: skip


def draw(experiment: runs.Experiment, found: dict[str, dict[str, Any]]) -> None:
    figure, panels = runs.new_figure(3, len(SHORTCUTS), width=12, height=12)
    for column, shortcut in enumerate(SHORTCUTS):
        onset, asymmetry, loss = panels[:, column]
        draw_onsets(onset, found[shortcut])
        draw_curves(asymmetry, loss, found[shortcut])
        onset.set_title(f'shortcut {shortcut}')
    figure.suptitle(
        'points and lines: runs; predictions: dashes linear, dots reduced, dash-dots one-sided'
    )
    runs.save_figure(experiment, figure)


def draw_onsets(axes: Any, found: dict[str, Any]) -> None:
    num_steps, measured = found['num_steps'], found['measured']
    for seed in range(len(found['linear'])):
        color = runs.COLORS[seed % len(runs.COLORS)]
        points = [(scale, its_runs[seed].onset()) for scale, its_runs in measured.items()]
        started = [(scale, onset) for scale, onset in points if onset is not None]
        scales, onsets = zip(*started, strict=True) if started else ((), ())
        axes.plot(scales, onsets, 'o', color=color, ms=5, label=f'seed {seed}')
        height = num_steps * (1.05 + 0.04 * seed)
        never = [scale for scale, onset in points if onset is None]
        axes.plot(never, [height] * len(never), 'x', color=color, ms=5)
        fine = np.logspace(-30, -1, 300)
        linear = [stability.predict_onset(found['linear'][seed], scale) for scale in fine]
        axes.plot(fine, [np.nan if x is None else x for x in linear], '--', color=color, lw=1.2)
        reduced = {
            scale: stability.predict_onset(log) for scale, log in found['reduced'][seed].items()
        }
        begins = [np.nan if x is None else x for x in reduced.values()]
        axes.plot(list(reduced), begins, ':', color=color, lw=2)
        for log in list(found['one_sided'][seed].values())[-1:]:
            onset = stability.predict_onset(log)
            axes.plot(fine, [np.nan if onset is None else onset] * len(fine), '-.', color=color)
    axes.axhline(num_steps, color='0.5', lw=0.8)
    axes.set(
        xscale='log',
        xlabel='scale of the perturbation',
        ylabel='step of onset (x: never)',
        ylim=(0, num_steps * 1.2),
    )
    axes.legend(fontsize=8, frameon=False)


def draw_curves(asymmetry: Any, loss: Any, found: dict[str, Any]) -> None:
    """Of the first seed, with both predictions."""
    symmetric: Trajectory = found['symmetric']
    steps = np.arange(1, found['num_steps'] + 1)
    for i, scale in enumerate(SHOWN):
        trajectory, color = found['measured'][scale][0], runs.COLORS[i]
        asymmetry.plot(steps, trajectory.asymmetry, color=color, lw=1.3, label=f'{scale:g}')
        predicted = np.exp(found['linear'][0][1:] + math.log(scale))
        predicted[predicted > 1] = np.nan
        asymmetry.plot(steps, predicted, '--', color=color, lw=1)
        asymmetry.plot(steps, np.exp(found['reduced'][0][scale][1:]), ':', color=color, lw=1.5)
        loss.plot(steps, trajectory.loss, color=color, lw=1)
    loss.plot(steps, symmetric.loss, color='0.5', lw=1.5, label='unperturbed')
    asymmetry.set(yscale='log', xlabel='step', ylabel='asymmetry')
    asymmetry.axhline(ONSET, color='0.5', lw=0.8)
    asymmetry.legend(title='scale', fontsize=8, frameon=False)
    loss.set(xlabel='step', ylabel='loss of the training batch (nats)')
    loss.legend(fontsize=8, frameon=False)


def run(experiment: runs.Experiment) -> None:
    found = {shortcut: measure(experiment, shortcut) for shortcut in SHORTCUTS}
    draw(experiment, found)
    counted = [row for shortcut in SHORTCUTS for row in kink_rows(shortcut, found[shortcut])]
    if counted:
        records.write_csv(experiment.workdir / 'kinks.csv', counted)
        say(f'{experiment.workdir}/kinks.csv')
    runs.write_table(
        experiment, [row for shortcut in SHORTCUTS for row in rows_of(shortcut, found[shortcut])]
    )


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=3, config_file='configs/onset.py'))
