"""Symmetry of features, measured to the bit.

A model declares, or has found, which axes of which parameter are indexed by the same features: a
tree like the parameters (nested dictionaries) whose leaves are tuples with a name, or None, for
every axis (the form known from permutation alignment, Ainsworth et al., "Git Re-Basin", 2022). An
orbit is a set of features that start identical: all features along a named axis, unless
`find_orbits` says otherwise. Everything here follows from that declaration and works on any nested
dictionary of arrays that has one; it knows no network and no train step.

`inference` finds the declaration in a function instead: `following` goes through its operations,
`axis_rules` holds what each does to axes, `identities` which axes are indexed by the same features.
`check` refutes a wrong declaration by numbers: those of a function at random weights (`trial`).
`orbits` holds the declaration and finds the orbits, `measures` says how equal their features are,
`quotient` makes the small network that a symmetric one is equal to, `alignment` brings the features
of two networks into the same order. A new measure of symmetry is a function in `measures`.
"""

from zerojax.symmetry.check import AxesCheck, check_feature_axes
from zerojax.symmetry.inference import InferredAxes, infer_feature_axes
from zerojax.symmetry.measures import (
    asymmetry,
    asymmetry_by_stream,
    distance,
    distance_by_stream,
    is_symmetric,
    is_symmetric_by_stream,
    largest_weights,
    project,
    transverse,
    unique_features,
    unique_features_by_stream,
)
from zerojax.symmetry.orbits import Orbits, find_orbits, named_axes, output_axes, stream_names

__all__ = [
    'AxesCheck', 'InferredAxes', 'Orbits', 'asymmetry', 'asymmetry_by_stream',
    'check_feature_axes', 'distance', 'distance_by_stream', 'find_orbits', 'infer_feature_axes',
    'is_symmetric', 'is_symmetric_by_stream', 'largest_weights', 'named_axes', 'output_axes',
    'project', 'stream_names', 'transverse', 'unique_features', 'unique_features_by_stream',
]  # fmt: skip
