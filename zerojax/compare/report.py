"""What `zerojax.compare` finds out, as a text of one screen."""

import textwrap
from collections.abc import Iterable, Iterator

from zerojax.host.records import Record


def report(found: Record) -> str:
    """What `compare` returns as a text of one screen."""
    lines = [f'Newest checkpoints, {found["eval_examples"]} held-out examples:']
    for number, run in enumerate(found['runs'], start=1):
        lines.append(
            f'  {number}  {run["workdir"]}: step {run["step"]} of {run["num_steps"]}, '
            f'loss {_number(run["loss"])}, accuracy {run["accuracy"]:.4f}, '
            f'weights {run["params_sha256"][:12]}'
        )
        lines += textwrap.wrap(
            f'streams: {_streams(run)}', 100, initial_indent=' ' * 5, subsequent_indent=' ' * 7
        )
    for number, pair in enumerate(found['pairs'], start=2):
        lines += ['', f'1 and {number}', *_wrapped(_pair_rows(pair))]
    lines += [
        '',
        f'All {len(found["runs"])} runs together',
        *_wrapped(_ensemble_rows(found['ensemble'])),
    ]
    return '\n'.join(lines)


def _streams(run: Record) -> str:
    broken, asymmetry = run['broken_streams'] or {}, run['asymmetry_by_stream'] or {}
    texts = []
    for stream in broken or asymmetry:
        if stream in broken and broken[stream] is None:
            texts.append(f'{stream} {"symmetric" if stream in asymmetry else "not broken yet"}')
        else:
            at_step = [f'broken at {broken[stream]}'] if stream in broken else []
            size = [f'asymmetry {asymmetry[stream]:.3g}'] if stream in asymmetry else []
            texts.append(f'{stream} {", ".join(at_step + size)}')
    return '; '.join(texts) or 'not recorded'


def _wrapped(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    for name, text in rows:
        yield from textwrap.wrap(
            text, 100, initial_indent=f'  {name:<15}', subsequent_indent=' ' * 17
        )


def _pair_rows(pair: Record) -> Iterator[tuple[str, str]]:
    fields = [f'{field} {x!r} | {y!r}' for field, (x, y) in pair['config'].items()]
    yield 'config', '; '.join(fields) or 'the same'
    yield 'training data', 'the same' if pair['same_training_data'] else 'not the same'
    if pair['same_network']:
        yield from _parting_rows(pair['parting'])
        weights, line = pair['weights'], pair['line']
        yield (
            'weights',
            f'L2 distance {weights["l2"]:.4g}, angle {_degrees(weights["angle"])}; '
            f'aligned {weights["l2_aligned"]:.4g}, {_degrees(weights["angle_aligned"])} '
            f'({weights["features_moved"]} of {weights["features"]} features moved)',
        )
        by_stream = (f'{name} {x:.4g}' for name, x in weights['l2_by_stream'].items())
        yield 'by stream', f'L2 distance {", ".join(by_stream)}'
        yield (
            'loss barrier',
            f'{_number(line["barrier"])}; aligned {_number(line["barrier_aligned"])} '
            '(statistics of BatchNorm recomputed on training data at each point)',
        )
        values = (f'{k} {"none" if x is None else f"{x:.3f}"}' for k, x in pair['cka'].items())
        yield 'linear CKA', f'(debiased) {", ".join(values)}'
    else:
        yield 'network', 'not the same, so weights, line and features are not compared'
    yield 'disagreement', f'{pair["disagreement"]:.2%} of held-out examples'


def _number(x: float | None) -> str:
    return 'not finite' if x is None else f'{x:.4f}'


def _degrees(angle: float | None) -> str:
    return 'none' if angle is None else f'{angle:.4g}°'


def _parting_rows(known: Record) -> Iterator[tuple[str, str]]:
    if known['different_at'] is None:
        verdict = f'nowhere: equal to step {known["equal_at"]}, in all that both have recorded'
    elif known['equal_at'] is None:
        verdict = f'by step {known["different_at"]}; nothing from before is common to both'
    else:
        proof = 'equal weights' if known['proven'] else 'equal metrics, no weights of it are kept'
        verdict = f'after step {known["equal_at"]} ({proof}) and by step {known["different_at"]}'
    yield 'they part', verdict
    line, checkpoint = known['differing_line'], known['differing_checkpoint']
    if line:
        a, b = line['values']
        yield (
            'metrics',
            f'first differ at step {line["step"]}: {line["kind"]} {line["field"]} {a} | {b}',
        )
    else:
        yield 'metrics', f'equal at all {len(known["equal_lines"])} steps that both recorded'
    equal = ', '.join(map(str, known['equal_checkpoints'])) or 'none'
    if checkpoint:
        most = checkpoint['max_ulps']
        yield (
            'checkpoints',
            f'equal: {equal}; first that differs: {checkpoint["step"]}, from '
            f'{checkpoint["tensor"]} on, in {checkpoint["differing"]} of its '
            f'{checkpoint["entries"]} entries, '
            + (
                'of another dtype' if most is None else f'by {most} units in the last place at most'
            ),
        )
    else:
        yield 'checkpoints', f'equal: {equal}'


def _ensemble_rows(found: Record) -> Iterator[tuple[str, str]]:
    yield (
        'accuracy',
        f'{found["accuracy_mean"]:.4f} ± {found["accuracy_deviation"]:.4f} (mean and deviation)',
    )
    yield 'as ensemble', f'{found["ensemble_accuracy"]:.4f}, a gain of {found["gain"]:+.4f}'
    yield 'diversity', f'{found["diversity"]:.2%} of examples, mean disagreement of two runs'
    if found['variance_on_test_set'] is None:
        yield 'variance', 'not of one network and training set'
    else:
        beyond = [field for field in found['varied'] if not field.endswith('seed')]
        estimate = found['variance_on_distribution']
        on_distribution = 'unknown' if estimate is None else f'{estimate:.3g}'
        yield (
            'variance',
            f'between runs: {found["variance_on_test_set"]:.3g} on these examples, '
            f'{on_distribution} on their distribution (unbiased estimate)'
            + (f'; the runs differ in more than seeds: {", ".join(beyond)}' if beyond else ''),
        )
