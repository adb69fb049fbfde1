import jax
import numpy as np
import pytest
import quick
from small_step import SHAPE, setup

from zerojax import step


def test_evaluation_ignores_padding():
    model, _, state, _ = setup(init='random')
    state.params['head']['kernel'] += jax.random.normal(jax.random.key(0), (64, 10))
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    images = np.random.default_rng(0).normal(size=(6, *SHAPE)).astype(np.float32)
    labels = np.array([1, 2, 3, 4, 5, 6], np.int32)
    eval_step = quick.jit(step.eval_step_function(model, lambda x: x))
    padded = eval_step(variables, images, np.where(np.arange(6) < 4, labels, -1).astype(np.int32))
    apply = quick.jit(lambda images: model.apply(variables, images, train=False))
    logits = np.asarray(apply(images), np.float64)[:4]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert padded['loss'] == pytest.approx(-log_p[np.arange(4), labels[:4]].sum(), rel=1e-5)
    assert padded['correct'] == (logits.argmax(-1) == labels[:4]).sum()
