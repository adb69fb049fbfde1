"""What can be asked of a network or of a train step; works on any model.

`metrics` is what the paper measures. `stability` tells how fast a small asymmetry grows along a
symmetric run, `kinks` where it has no derivative, `prediction` what noise on the initial weights
will come to; `own_model` has it of anyone's function and weights, `reduced` follows that past the
linear law. What a machine can be trusted with has three storeys: `noise` compares numbers,
`equal_features` the features of one result, `step_audit` all that one train step gives; `compiled`
makes and reads the programs that they look at. The command on top is `zerojax.audit`. What a
program asks of a device is counted by `program_cost`, from the text that `hlo` reads, and held
against what `accelerators` can do; the command on top is `zerojax.compile`. A new measurement is a
function of arrays, or of a step, in the file of its kind.
"""
