"""Is the noise of the hardware more than noise? Its floor, against injected noise of that size.

    python -m experiments.hardware

Audits the config's step in mode 'hardware', then trains without any perturbation in both modes, and
in mode 'deterministic' with relative noise on the gradients in each step, as large as the audit
found it, and with the sums of the gradients added in a random order, which emulates a GPU's atomics
where there is none; each as it is and projected onto the symmetric subspace after each step. Where
the audit observes no noise (on CPUs), the injected noise is that of one rounding, 2^-24, and the
table says so. 3 seeds, in ten minutes on two CPU cores. See `experiments.runs` for flags and
restarts. On a GPU, where a process keeps to one mode, it ends early once, with a line that says
why, and the same command goes on.
"""

import sys

import numpy as np

from experiments import runs
from experiments.trajectories import Laboratory, Trajectory, listed_steps
from zerojax import audit
from zerojax import config as config_lib
from zerojax.host import manifest, records
from zerojax.host.terminal import say
from zerojax.measure import step_audit
from zerojax.perturb import NONE, Perturbation
from zerojax.step.precision import numbers_of

ROUNDING = 2.0**-24
REPEATS = 10


def noise_floor(experiment: runs.Experiment) -> tuple[float, list[str]]:
    """Largest relative noise of any gradient of a weight in repeated calls, and the verdict."""
    file = experiment.workdir / 'audit.json'
    fields = config_lib.as_json(experiment.config)
    here = {
        name: value
        for name, value in manifest.environment().items()
        if name in ('host', 'device_kind', 'device_count', 'cpu_count', 'versions', 'xla_flags')
    }
    if file.exists():
        found = records.read_json(file, ('floor', 'verdict', 'config', *here))
        if found['config'] == fields and all(found[name] == here[name] for name in here):
            return found['floor'], found['verdict']
    config = runs.changed(experiment.config, **{'determinism.mode': 'hardware'})
    with numbers_of(config.param_dtype):
        program = audit.prepare_step(config)
        compiled = audit.compile_step(program)
        verdict = step_audit.audit_compiled(compiled, program.feature_axes, REPEATS, program.orbits)
    floor = max(
        spread.relative
        for name, spread in verdict.noise[step_audit.ONE_EXECUTABLE].items()
        if name.startswith('gradients/params/')
    )
    found = {'floor': floor, 'verdict': verdict.sentences(), 'config': fields}
    records.write_json(file, found | manifest.environment())
    return floor, found['verdict']


def draw(experiment: runs.Experiment, found: dict[str, list[Trajectory]]) -> None:
    figure, (loss, asymmetry) = runs.new_figure(1, 2, width=12, height=5)
    asymmetry.set_yscale('log')
    for i, (arm, its_runs) in enumerate(found.items()):
        look = {**runs.style(i), **runs.marks(i), 'label': arm, 'lw': 1.5}
        steps = np.arange(1, len(its_runs[0].loss) + 1)
        runs.plot_band(loss, steps, [each.loss for each in its_runs], **look)
        if all((each.asymmetry > 0).all() for each in its_runs):
            runs.plot_band(asymmetry, steps, [each.asymmetry for each in its_runs], **look)
    loss.set(xlabel='step', ylabel='loss of the training batch (nats)')
    asymmetry.set(xlabel='step', ylabel='asymmetry (not drawn where exactly 0)')
    figure.legend(
        *loss.get_legend_handles_labels(), loc='outside lower center', ncols=3, frameon=False
    )
    runs.save_figure(experiment, figure)


def arms(floor: float) -> dict[str, tuple[str, Perturbation, str]]:
    """Name of each arm: its mode, its perturbation, and the noise in each of its steps."""
    name, size = ('the floor', floor) if floor else ('one rounding', ROUNDING)
    found = {
        'hardware': ('hardware', NONE, shown_size(floor)),
        'deterministic': ('deterministic', NONE, shown_size(0)),
        'emulated order of additions': ('deterministic', Perturbation('order'), 'of rounding'),
    }
    for label, scale in ((name, size), (f'1000 times {name}', 1000 * size)):
        injected = Perturbation('gradient', scale)
        found[f'injected, {label}'] = ('deterministic', injected, shown_size(scale))
    return found


def run(experiment: runs.Experiment) -> None:
    floor, verdict = noise_floor(experiment)
    for sentence in verdict:
        say(f'audit: {sentence}')
    found, rows = {}, []
    for arm, (mode, perturbation, noise) in arms(floor).items():
        for project in (False, True):
            label = f'{arm}, projected' if project else arm
            config = runs.changed(
                experiment.config, **{'determinism.mode': mode, 'symmetry.project': project}
            )
            folder = experiment.workdir / 'runs' / f'{mode}{"_projected" if project else ""}'
            laboratory = Laboratory(config, folder)
            (its_runs,) = laboratory.run_arms({label: perturbation}, experiment.seeds).values()
            found[label] = its_runs
            rows.append(
                {
                    'arm': label,
                    'noise in each step': noise,
                    'n': experiment.seeds,
                    'broken at step': listed_steps([each.broken_at_step for each in its_runs]),
                    'step of onset': listed_steps([each.onset() for each in its_runs]),
                    'last asymmetry': f'{max(each.asymmetry[-1] for each in its_runs):.1e}',
                    'held-out accuracy': runs.mean_and_deviation(
                        [each.accuracy for each in its_runs]
                    ),
                }
            )
    draw(experiment, found)
    runs.write_table(experiment, rows)


def shown_size(noise: float) -> str:
    return f'{noise:.1e}' if noise else 'none'


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=3, config_file='configs/onset.py'))
