"""What a machine can be trusted with: noise and symmetry of one train step, and the verdict.

The top storey of the audit: all that one train step gives, by `noise` and `equal_features`; what
the verdict says and how it looks. The command above it, which knows of configs, files and flags, is
`zerojax.audit`.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zerojax import symmetry
from zerojax.measure import equal_features
from zerojax.measure.compiled import Operation, operations_that_may_not_repeat
from zerojax.measure.noise import Spread, noise_floor
from zerojax.step import Batch, Model, TrainState, cross_entropy

Tree = Any
Streams = dict[str, dict[str, dict[str, Spread]]]  # broken one, other one, tensor
PARTS = ('forward', 'gradients', 'new state')
ONE_EXECUTABLE, COMPILATIONS, PROCESSES = 'one executable', 'fresh compilations', 'processes'

_UNITS = {ONE_EXECUTABLE: 'calls', COMPILATIONS: 'compilations', PROCESSES: 'processes'}
_TITLES = {ONE_EXECUTABLE: 'calls of one executable'} | {x: x for x in (COMPILATIONS, PROCESSES)}
_ROW = '{:<34} {:>7} {:>8} {:>9} {:>8}  {}'
_COLUMNS = ('distinct', 'ULPs', 'relative', 'most in')
_ROWS = 4  # of any list in the verdict, which is one screen


def symmetric_state(
    state: TrainState,
    model: Model,
    tx: optax.GradientTransformation,
    orbits: symmetry.Orbits | None = None,
) -> TrainState:
    """The state with `symmetric_fill` for weights, and the optimizer as it starts."""
    params = equal_features.symmetric_fill(state.params, model.feature_axes()['params'], orbits)
    return dataclasses.replace(state, params=params, opt_state=tx.init(params))


def make_inspection(
    model: Model, layers: Collection[str], make_batch: Callable[[TrainState, Tree], Batch]
) -> Callable[[TrainState, Tree], dict[str, Any]]:
    """A pure (state, data) -> `equal_features.tensors` of the train step that the state is at.

    The model is one of Linen, `layers` the paths of its submodules whose outputs are looked at,
    `make_batch(state, data)` makes the step's batch. It must be without dropout, which would make
    equal features differ, whatever the kernels do.
    """

    def inspect(state: TrainState, data: Tree) -> dict[str, Any]:
        batch = make_batch(state, data)

        def loss(params: Tree) -> jax.Array:
            logits_BxN, _ = model.apply(
                {'params': params, 'batch_stats': state.batch_stats},
                batch['image'],
                train=True,
                mutable=['batch_stats'],
            )
            return jnp.mean(cross_entropy(logits_BxN, batch['label']))

        return equal_features.tensors(loss, state.params, layers)

    return inspect


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A train step as executables, and what they are called with.

    Attributes:
        train_steps: compiled (state, data, count) -> (state, metrics), which donates the state; see
            `step.make_train_steps`. It is called for one step.
        inspection: compiled (state, data) -> the step's intermediate tensors; see
            `make_inspection`. These do not leave `train_steps`, so they are those of a second
            program, of the same operations but fused otherwise.
        state, data: the arguments.
    """

    train_steps: Any
    inspection: Any
    state: TrainState
    data: Tree

    def run(self) -> dict[str, Any]:
        """{'forward': ..., 'gradients': ..., 'new state': ...}, each a pytree."""
        copy = jax.tree.map(lambda x: x.copy(), self.state)
        state, metrics = self.train_steps(copy, self.data, np.int32(1))
        return self.inspection(self.state, self.data) | {
            'new state': {
                'params': state.params,
                'batch_stats': state.batch_stats,
                'opt_state': state.opt_state,
                'metrics': metrics,
            }
        }

    def operations(self, backend: str) -> list[Operation]:
        """Operations of the training program that may not repeat."""
        return operations_that_may_not_repeat(self.train_steps.as_text(), backend)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was measured, and what it says.

    Attributes:
        compared: number of results that were compared in each scope ('one executable', 'fresh
            compilations', 'processes').
        noise: for each scope the spread of each tensor ('forward/outputs/stem').
        operations: those of the training program that may not repeat.
        features: spread between the features of each tensor that are equal in exact arithmetic
            ('outputs/stem', 'gradients/block1_0/conv/kernel'); behind the first '/' comes the
            layer.
        streams: of each stream, while it is broken, the same for each other one, see
            `break_streams`; None: not measured.
    """

    compared: dict[str, int]
    noise: dict[str, dict[str, Spread]]
    operations: list[Operation]
    features: dict[str, Spread]
    streams: Streams | None = None

    def unequal_layers(self) -> dict[str, tuple[str, Spread]]:
        """The layers whose features differ, each with its worst tensor, the worst first."""
        unequal: dict[str, tuple[str, Spread]] = {}
        for name, spread in self.features.items():
            layer = name.split('/')[1]
            if spread.distinct > 1 and (
                layer not in unequal or spread.ulps > unequal[layer][1].ulps
            ):
                unequal[layer] = name, spread
        return dict(sorted(unequal.items(), key=lambda item: -item[1][1].ulps))

    def unequal_streams(self) -> dict[str, dict[str, tuple[str, Spread]]]:
        """Of each broken stream that has others to be compared: those whose features differ, each
        with its worst tensor."""
        unequal: dict[str, dict[str, tuple[str, Spread]]] = {}
        for broken, others in (self.streams or {}).items():
            if others:
                worst_of = {other: _largest(tensors) for other, tensors in others.items()}
                unequal[broken] = {k: x for k, x in worst_of.items() if x[1].distinct > 1}
        return unequal

    def layers(self) -> list[str]:
        """All layers whose features were compared."""
        return list(dict.fromkeys(name.split('/')[1] for name in self.features))

    def silent(self) -> list[str]:
        """Tensors of the forward pass and the gradients that were 0 throughout; also those that
        only were while a stream was broken."""
        floor = next(iter(self.noise.values()))
        always = [
            name
            for name, spread in floor.items()
            if spread.magnitude == 0 and not name.startswith('new state/')
        ]
        return always + [
            f'{name} while {broken} is broken'
            for broken, others in (self.streams or {}).items()
            for tensors in others.values()
            for name, spread in tensors.items()
            if spread.magnitude == 0 and not name.startswith('new_')
        ]

    def record(self, *, full: bool) -> dict[str, Any]:
        """As JSON takes it: every tensor, or of each part and layer only the worst."""
        noise: dict[str, Any] = {}
        for scope, floor in self.noise.items():
            if full:
                noise[scope] = {name: spread.record() for name, spread in floor.items()}
            else:
                noise[scope] = {
                    part: {'tensor': name, **spread.record()}
                    for part in PARTS
                    for name, spread in [worst(floor, part)]
                }
        chosen = self.features if full else dict(self.unequal_layers().values())
        return {
            'verdict': self.sentences(),
            'compared': self.compared,
            'noise': noise,
            'operations': [dataclasses.asdict(operation) for operation in self.operations],
            'features' if full else 'unequal_features': {
                name: spread.record() for name, spread in chosen.items()
            },
            **({'streams': jax.tree.map(Spread.record, self.streams)} if full else {}),
        }

    def sentences(self) -> list[str]:
        """What can be said from what was measured, and no more."""
        sentences = []
        counts = {scope: f'{number} {_UNITS[scope]}' for scope, number in self.compared.items()}
        noisy = {
            scope: {name: spread for name, spread in floor.items() if spread.distinct > 1}
            for scope, floor in self.noise.items()
        }
        quiet = [counts[scope] for scope, tensors in noisy.items() if not tensors]
        if len(quiet) == len(noisy):
            sentences.append(f'Repeats to the bit: no noise observed in {_listed(quiet)}.')
        elif quiet:
            sentences.append(f'No noise observed in {_listed(quiet)}.')
        for scope, tensors in noisy.items():
            if tensors:
                name, spread = _largest(tensors)
                sentences.append(
                    f'Noise of its own in {counts[scope]}: {len(tensors)} of '
                    f'{len(self.noise[scope])} tensors differ, most of all {name}: '
                    f'{_ulps(spread)} ULPs, {_relative(spread)} of its largest number.'
                )
        unequal, layers = self.unequal_layers(), self.layers()
        if unequal:
            name, spread = _largest(dict(unequal.values()))
            sentences.append(
                f'Kernels do not keep equal features equal in {len(unequal)} of {len(layers)} '
                f'layers, least of all {name}: {spread.distinct} distinct features, '
                f'{_ulps(spread)} ULPs, {_relative(spread)} of its largest number.'
            )
        elif layers:
            sentences.append(
                f'Kernels keep equal features bitwise equal in all {len(layers)} layers.'
            )
        else:
            sentences.append('No features of this network are meant to be equal.')
        sentences += self._sentences_on_streams()
        if silent := self.silent():
            sentences.append(
                f'Tensors that are 0 throughout and tell nothing: {_shortened(silent)}.'
            )
        return sentences

    def _sentences_on_streams(self) -> list[str]:
        streams = self.unequal_streams()
        failed = {
            (broken, other): tensor
            for broken, others in streams.items()
            for other, tensor in others.items()
        }
        if not streams:
            return []
        if not failed:
            return [
                f'Each of {len(streams)} streams, broken alone, leaves all others bitwise equal.'
            ]
        (broken, other), (name, spread) = max(
            failed.items(), key=lambda item: (item[1][1].ulps, item[1][1].distinct)
        )
        return [
            f'Kernels do not keep all other streams equal while one is broken, for '
            f'{sum(map(bool, streams.values()))} of {len(streams)} streams, least of all {other} '
            f'while {broken} is broken, in {name}: {spread.distinct} distinct features, '
            f'{_ulps(spread)} ULPs, {_relative(spread)} of its largest number.'
        ]

    def _table_of_streams(self) -> list[str]:
        streams = self.unequal_streams()
        if not streams:
            return ['  no other stream has equal features']
        lines = []
        differing_first = sorted(streams.items(), key=lambda item: not item[1])
        for broken, others in differing_first[:_ROWS]:
            differing = [f'{other} by {_ulps(spread)}' for other, (_, spread) in others.items()]
            told = (
                f'differ, in ULPs: {_shortened(differing)}'
                if others
                else 'all others bitwise equal'
            )
            lines.append(f'  {broken:<16} {told}')
        return lines + _and_more(len(streams))

    def table(self) -> list[str]:
        """The measurements as lines of at most 100 columns."""
        lines = [_ROW.format('noise floor', 'tensors', *_COLUMNS)]
        for scope, floor in self.noise.items():
            lines.append(f'{self.compared[scope]} {_TITLES[scope]}')
            for part in PARTS:
                names = [name for name in floor if name.startswith(f'{part}/')]
                name, spread = worst(floor, part)
                where = '' if spread.distinct == 1 else name.removeprefix(f'{part}/')
                lines.append(_row(part, spread, where, tensors=len(names)))

        lines += ['', 'operations known not to repeat on some backend']
        lines += [f'  {x.count:>3} {x.name}: {x.remark}' for x in self.operations[:_ROWS]]
        lines += _and_more(len(self.operations)) if self.operations else ['  none in the program']

        unequal, number = self.unequal_layers(), len(self.layers())
        lines += ['', _ROW.format('equal features', '', *_COLUMNS) if unequal else 'equal features']
        for layer, (name, spread) in list(unequal.items())[:_ROWS]:
            lines.append(_row(layer, spread, name))
        lines += _and_more(len(unequal))
        lines.append(f'  bitwise equal in {number - len(unequal)} of {number} layers')

        if self.streams is not None:
            lines += ['', 'streams, each broken alone', *self._table_of_streams()]
        return [line[:100].rstrip() for line in lines]


def worst(floor: dict[str, Spread], part: str) -> tuple[str, Spread]:
    """The tensor of a part ('forward', 'gradients', 'new state') that differs most, in ULPs."""
    return _largest({name: x for name, x in floor.items() if name.startswith(f'{part}/')})


def _largest(spreads: dict[str, Spread]) -> tuple[str, Spread]:
    return max(spreads.items(), key=lambda item: (item[1].ulps, item[1].distinct))


def _row(title: str, spread: Spread, where: str, tensors: int | str = '') -> str:
    distinct, ulps, relative = spread.distinct, _ulps(spread), _relative(spread)
    return _ROW.format(f'  {title}', tensors, distinct, ulps, relative, where[-28:])


def _ulps(spread: Spread) -> str:
    if not np.isfinite(spread.ulps):
        return 'NaN'
    return str(spread.ulps) if spread.ulps < 1e6 else f'{spread.ulps:.1e}'


def _relative(spread: Spread) -> str:
    if not np.isfinite(spread.relative):
        return 'NaN'
    return f'{spread.relative:.0e}' if spread.relative else '0'


def _listed(texts: list[str]) -> str:
    return ', '.join(texts[:-1]) + ' and ' + texts[-1] if len(texts) > 1 else texts[0]


def _shortened(names: list[str]) -> str:
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def _and_more(number: int) -> list[str]:
    return [f'  and {number - _ROWS} more, see audit.json'] if number > _ROWS else []


def equal_features_of_step(
    results: dict[str, Any],
    feature_axes: Tree,
    orbits: symmetry.Orbits | None,
    *,
    new_state: bool,
    stream: str | None = None,
) -> dict[str, Spread]:
    """`equal_features_of` what `CompiledStep.run` returns; also of the new state, if that is asked
    for: 'new_params/stem/kernel', 'new_batch_stats/block1_0/bn/mean'.

    `feature_axes` is the model's declaration, of parameters and statistics.
    """
    found = equal_features.equal_features_of(results, feature_axes['params'], orbits, stream)
    if new_state:
        for kind in ('params', 'batch_stats'):
            new, axes = results['new state'][kind], feature_axes[kind]
            spreads = equal_features.equal_features(new, axes, orbits, stream)
            found |= {f'new_{kind}/{name}': spread for name, spread in spreads.items()}
    return found


def break_streams(
    compiled: CompiledStep,
    feature_axes: Tree,
    orbits: symmetry.Orbits | None = None,
    *,
    new_state: bool,
) -> Streams:
    """What the kernels make of all other streams while one is broken.

    In exact arithmetic these stay symmetric. As long as all streams are, sums over features are of
    equal numbers, whose order is no matter; here it is. The step is called once for each stream, by
    the executables that are there, at its own weights with the stream broken by `broken_fill`.

    Args:
        compiled: a step at symmetric weights.
        feature_axes, orbits, new_state: as in `equal_features_of_step`. The orbits are without
            `entries`, which tie streams together.

    Returns:
        {broken stream: {other stream: {tensor: Spread between its equal features}}}, without
        streams that have none.
    """
    names = symmetry.stream_names(feature_axes['params'])
    found: Streams = {}
    for broken in names:
        params = equal_features.broken_fill(compiled.state.params, feature_axes['params'], broken)
        params = jax.tree.map(
            lambda new, old: jax.device_put(new, old.sharding), params, compiled.state.params
        )
        state = dataclasses.replace(compiled.state, params=params)
        results = dataclasses.replace(compiled, state=state).run()
        spreads = {
            other: equal_features_of_step(
                results, feature_axes, orbits, new_state=new_state, stream=other
            )
            for other in names
            if other != broken
        }
        found[broken] = {other: tensors for other, tensors in spreads.items() if tensors}
    return found


def audit_compiled(
    compiled: CompiledStep,
    params_axes: Tree,
    repeats: int,
    orbits: symmetry.Orbits | None = None,
) -> Verdict:
    """The short audit: noise of executables that exist already, and their equal features."""
    first = compiled.run()
    return Verdict(
        compared={ONE_EXECUTABLE: repeats},
        noise={ONE_EXECUTABLE: noise_floor([first, *(compiled.run() for _ in range(repeats - 1))])},
        operations=compiled.operations(jax.default_backend()),
        features=equal_features.equal_features_of(first, params_axes, orbits),
    )
