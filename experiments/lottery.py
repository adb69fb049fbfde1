"""Do lottery tickets exist where all weights start equal? Pruning and rewinding.

    python -m experiments.lottery
    python -m experiments.lottery --config=configs/cifar.py

Trains ConstNet (with a perturbation of 1e-6) and the random control, removes the smallest weights
of each layer, sets the rest back to what they were at step 0 (or `pruning.rewind_step`), and trains
again; beside it a random mask of the same size. 42 runs on the digits, a quarter of an hour on two
CPU cores. See `experiments.runs` for flags and restarts.
"""

import sys

from experiments import runs

FRACTIONS = (0.5, 0.8, 0.95)
NETWORKS: dict[str, dict[str, object]] = {
    'ConstNet': {
        'model.init': 'averaging',
        'perturbation.kind': 'gaussian',
        'perturbation.scale': 1e-6,
    },
    'random control': {'model.init': 'random', 'perturbation.kind': 'none'},
}
MASKS = {'magnitude': 'smallest removed', 'random': 'random mask'}


def run(experiment: runs.Experiment) -> None:
    results: dict[tuple[str, str, float], list[runs.FinishedRun]] = {}
    for network, fields in NETWORKS.items():
        dense = f'{network} dense'
        config = experiment.config
        keep = tuple(sorted({config.pruning.rewind_step, *config.keep_checkpoints_at}))
        whole = {**fields, 'model.name': 'constnet', 'keep_checkpoints_at': keep}
        its_runs = runs.train_all(experiment, {dense: whole})
        for mask in MASKS:
            results[network, mask, 0.0] = its_runs
        for mask in MASKS:
            for fraction in FRACTIONS:
                results[network, mask, fraction] = [
                    run
                    for source in its_runs
                    for run in runs.train_all(
                        experiment,
                        {
                            f'{network} {mask} {fraction}': {
                                **whole,
                                'pruning.source': str(source.workdir),
                                'pruning.fraction': fraction,
                                'pruning.mask': mask,
                                'pruning.seed': source.seed,
                            }
                        },
                        only_seed=source.seed,
                    )
                ]
    draw(experiment, results)
    runs.write_table(
        experiment,
        [
            {
                'network': network,
                'weights removed': f'{fraction:.0%}',
                'mask': MASKS[mask] if fraction else 'none',
                **runs.accuracies(its_runs),
            }
            for (network, mask, fraction), its_runs in results.items()
            if fraction or mask == 'magnitude'
        ],
    )


def draw(
    experiment: runs.Experiment, results: dict[tuple[str, str, float], list[runs.FinishedRun]]
) -> None:
    figure, axes = runs.new_figure(1, 1, width=6, height=4)
    for i, network in enumerate(NETWORKS):
        for mask, line_style in zip(MASKS, runs.STYLES, strict=False):
            fractions = (0.0, *FRACTIONS)
            per_seed = zip(*(results[network, mask, each] for each in fractions), strict=True)
            accuracies = [[run.summary['eval_accuracy'] for run in seed] for seed in per_seed]
            look = {'color': runs.COLORS[i], 'linestyle': line_style, 'marker': 'o'}
            kept = [100 * (1 - fraction) for fraction in fractions]
            look['label'] = f'{network}, {MASKS[mask]}'
            runs.plot_band(axes, kept, accuracies, at_most=1, **look)
    axes.set(xlabel='weights kept in each layer (%)', ylabel='held-out accuracy', xscale='log')
    axes.set_xticks(kept, [f'{each:.0f}' for each in kept], minor=False)
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.legend(frameon=False)
    runs.save_figure(experiment, figure)


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=3))
