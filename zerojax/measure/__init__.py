"""What can be asked of a network or of a train step; works on any model.

`metrics` is what the paper measures. `stability` tells how fast a small asymmetry grows along a
symmetric run, `kinks` where it has no derivative. What a machine can be trusted with has three
storeys: `noise` compares numbers, `equal_features` the features of one result, `step_audit` all
that one train step gives; the command on top is `zerojax.audit`. A new measurement is a function.
"""
