import ast
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zerojax import models, step
from zerojax.measure import compiled
from zerojax.step import determinism


def reduce_of_broadcast(x):
    return jnp.sum(jnp.broadcast_to(x, (2, 1024, 1024)))


@pytest.mark.parametrize('mode', determinism.MODES)
def test_every_mode_keeps_the_code_out_in_which_older_jaxlibs_race(mode):
    """Whether a race is lost is chance (1 to 288 of 500 sums were wrong in jaxlib 0.10.2 on two
    cores), so the program is checked, not the sums alone: without the option it calls YNNPACK."""
    x = jnp.ones((1024, 1))
    if '__ynn_fusion' not in jax.jit(reduce_of_broadcast).lower(x).compile().as_text():
        pytest.skip('this jaxlib does not call YNNPACK here, so nothing is to be kept out')
    compiled = determinism.jit_in_mode(reduce_of_broadcast, mode).lower(x).compile()
    assert 'ynn' not in compiled.as_text()
    assert {float(compiled(x)) for _ in range(100)} == {2.0 * 1024 * 1024}


@pytest.mark.parametrize('mode', determinism.MODES)
@pytest.mark.parametrize('backend', ['cpu', 'gpu', 'tpu'])
def test_every_backend_has_its_options(mode, backend):
    options = determinism.compiler_options(mode, backend)
    assert ('xla_gpu_deterministic_ops' in options) == ((backend, mode) == ('gpu', 'deterministic'))
    assert all(isinstance(value, bool | int | str) for value in options.values())


def test_a_deterministic_gpu_program_reads_no_folder_of_choices():
    options = determinism.compiler_options('deterministic', 'gpu')
    assert options['xla_gpu_per_fusion_autotune_cache_dir'] == ''


def test_unknown_modes_and_backends_are_refused():
    with pytest.raises(ValueError, match=r"mode='exact': must be one of deterministic, hardware"):
        determinism.compiler_options('exact')
    with pytest.raises(ValueError, match="backend 'abacus'"):
        determinism.compiler_options('deterministic', 'abacus')


def test_an_option_that_jaxlib_lacks_is_an_error(monkeypatch):
    determinism.check_supported('deterministic')
    monkeypatch.setitem(
        determinism._OPTIONS, ('cpu', 'deterministic'), {'xla_cpu_no_such_option': True}
    )
    with pytest.raises(ValueError, match='does not take xla_cpu_no_such_option=True'):
        determinism.check_supported('deterministic')


def test_two_compilations_give_the_same_bits():
    x = jax.random.normal(jax.random.key(0), (64, 64))
    results = {
        determinism.jit_in_mode(lambda x: jnp.linalg.norm(x @ x.T), 'deterministic')(x).item()
        for _ in range(2)
    }
    assert len(results) == 1


ROOT = pathlib.Path(__file__).parents[2]


def sources():
    """Python that a user's numbers go through, by where it is: package, experiments, documents."""
    for folder in ('zerojax', 'experiments'):
        for path in sorted((ROOT / folder).rglob('*.py')):
            if 'performance' not in path.parts:
                yield str(path.relative_to(ROOT)), path.read_text()
    for page in [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]:
        blocks = re.findall(r'^```python\n(.*?)^```', page.read_text(), re.M | re.S)
        for number, block in enumerate(blocks):
            yield f'{page.name}, block {number}', block


def bare_jits(source):
    """Lines that compile without naming compiler options, in whatever way they come by it."""
    tree = ast.parse(source)
    with_options = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and any(keyword.arg == 'compiler_options' for keyword in node.keywords)
    }
    for node in ast.walk(tree):
        compiles = ('jit', 'pjit', 'pmap', 'filter_jit')
        if (
            isinstance(node, ast.Attribute)
            and node.attr in compiles
            and id(node) not in with_options
        ):
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith('zerojax'):
            yield from (node.lineno for each in node.names if each.name in compiles)


@pytest.mark.parametrize(
    'bare',
    [
        '@jax.jit\ndef f(): ...', 'jax.jit(f)', 'functools.partial(jax.jit, static_argnums=0)',
        'from jax import jit', 'nn.jit(Block)', 'eqx.filter_jit(f)', 'compile = jax.jit',
    ],
)  # fmt: skip
def test_bare_jits_are_seen(bare):
    assert list(bare_jits(bare)) == [1]
    assert not list(bare_jits('jax.jit(f, compiler_options=options)'))


def test_whatever_a_number_goes_through_is_compiled_with_the_options_of_a_mode():
    """jaxlib 0.10.2 gives wrong results without them, not only varying ones."""
    found = {where: list(bare_jits(source)) for where, source in sources()}
    assert len(found) > 80
    assert not {where: lines for where, lines in found.items() if lines}


@pytest.mark.parametrize('mode', determinism.MODES)
def test_a_vmapped_product_that_older_jaxlibs_get_wrong(mode):
    """jax#39103: compiled without the options, jaxlib 0.10.2 gives other numbers than n²."""
    n = jnp.arange(32_769, dtype=jnp.float32)
    rows = jnp.stack([n, jnp.zeros_like(n), jnp.zeros_like(n)], axis=1)

    def squared_lengths(rows):
        return jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(rows)

    found = determinism.jit_in_mode(squared_lengths, mode)(rows)
    np.testing.assert_array_equal(found, n**2)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As far as modes go."""
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(determinism, '_mode_on_gpu', None)


@pytest.mark.parametrize('first,second', [determinism.MODES, determinism.MODES[::-1]])
def test_a_process_on_a_gpu_has_programs_of_one_mode(on_a_gpu, first, second):
    """XLA's autotuner takes what it chose for the same operation before, in whatever mode."""
    model, tx = models.create('mlp', width=20), optax.sgd(0.1)
    step.make_train_step(model, tx, determinism=first)
    for refused in (
        lambda: step.make_train_step(model, tx, determinism=second),
        lambda: step.make_train_steps(None, determinism=second, steps_per_call=1),
        lambda: step.jit_in_mode(jnp.sin, second),
        lambda: determinism.check_process(second),
    ):
        with pytest.raises(ValueError, match=f'has GPU programs of mode {first!r}'):
            refused()
    step.make_train_step(model, tx, determinism=first)
    assert step.jit_without_products(lambda x: x + 1)(1) == 2


def test_fresh_compilations_are_of_the_process_mode(on_a_gpu):
    determinism.claim_process('hardware')
    with pytest.raises(ValueError, match="has GPU programs of mode 'hardware'"):
        compiled.compile_afresh(jnp.sin, 1.0)


def test_other_backends_have_both_modes():
    for mode in (*determinism.MODES, *determinism.MODES):
        assert step.jit_in_mode(lambda x: x + 1, mode)(1) == 2


def test_jaxlib_knows_the_options_of_each_backend():
    for backend in ('cpu', 'gpu', 'tpu'):
        for mode in determinism.MODES:
            options = determinism.compiler_options(mode, backend)
            assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
