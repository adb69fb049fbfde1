"""First differences of metrics and of weights."""

import ml_dtypes
import numpy as np

from zerojax.compare import parting


def line(step, kind='train', **values):
    return {'step': step, 'kind': kind, **values}


def test_the_first_difference_and_the_steps_before_it():
    a = [line(0, 'eval', loss=1.0), line(4, loss=2.0), line(8, loss=2.0, layers={'x': {'y': 3.0}}),
         line(8, 'eval', loss=1.0), line(12, loss=5.0)]  # fmt: skip
    b = [dict(each) for each in a]
    assert parting.compare_lines(a, b) == ([0, 4, 8, 12], None)
    b[2] = line(8, loss=2.0, layers={'x': {'y': 3.5}})
    b[4] = line(12, loss=6.0)
    difference = parting.DifferingLine(8, 'train', 'layers.x.y', (3.0, 3.5))
    assert parting.compare_lines(a, b) == ([0, 4], difference)
    b[2] = dict(a[2])
    b[3] = line(8, 'eval', loss=None)
    difference = parting.DifferingLine(8, 'eval', 'loss', (1.0, None))
    assert parting.compare_lines(a, b) == ([0, 4], difference), 'the rest of step 8 is equal'


def test_only_what_both_have_is_compared():
    a = [line(4, loss=2.0), line(8, loss=3.0, extra=1.0), line(9, loss=1.0), line(12, loss=0.5)]
    b = [line(6, loss=9.0), line(8, loss=3.0), line(12, 'eval', loss=7.0)]
    assert parting.compare_lines(a, b) == ([8], None)
    assert parting.compare_lines(a, []) == ([], None)


def test_the_first_tensor_in_the_networks_order():
    order = ['params/z/kernel', 'params/a/kernel', 'batch_stats/z/mean']
    a = {
        'params': {'a': {'kernel': np.ones(4, 'f4')}, 'z': {'kernel': np.ones((2, 3), 'f4')}},
        'batch_stats': {'z': {'mean': np.zeros(2, 'f4')}},
    }
    assert parting.first_differing_tensor(a, a, order) is None
    b = {**a, 'batch_stats': {'z': {'mean': np.array([0.0, -0.0], 'f4')}}}
    assert parting.first_differing_tensor(a, b, order) is None
    b = {**a, 'batch_stats': {'z': {'mean': np.array([0.0, 1e-45], 'f4')}}}
    expected = parting.DifferingTensor('batch_stats/z/mean', 1, 2, 1)
    assert parting.first_differing_tensor(a, b, order) == expected
    one_more = np.nextafter(np.float32(1), np.float32(2))
    two_more = np.nextafter(one_more, np.float32(2))
    kernel = np.array([[1, one_more, 1], [1, two_more, 1]], 'f4')
    b['params'] = {'a': {'kernel': np.zeros(4, 'f4')}, 'z': {'kernel': kernel}}
    expected = parting.DifferingTensor('params/z/kernel', 2, 6, 2)
    assert parting.first_differing_tensor(a, b, order) == expected


def test_other_dtypes_are_compared_by_value():
    a = {'w': np.array([1.0, 0.5, 0.1], np.float32)}
    assert parting.first_differing_tensor(a, {'w': a['w'].astype(np.float64)}, ['w']) is None
    half = {'w': a['w'].astype(ml_dtypes.bfloat16)}
    expected = parting.DifferingTensor('w', 1, 3, None)
    assert parting.first_differing_tensor(a, half, ['w']) == expected
