"""From a config to a finished run.

`train` is the place to begin: one run from top to bottom. It takes its data from `data`, has what
can be wrong found by `checks`, compiles a `program` of the parts that `building` makes, goes on
where `restore` says, perhaps from a lottery `ticket`, measures with `evaluate` and writes through a
`recorder`. An `executable` is a function compiled ahead, `inspection` is what an audit looks at,
`cli` are the flags. `many` runs are trained one after another or at once; `launch` has the workers
of a cluster train them, `on_ray` or `on_slurm`: each is a `worker`, and the driver alone watches
(`watch`) and submits again what was lost. `prediction` tells what a run will do, by the small
networks of `reduction`; `compilation` compiles its step for a `target` that need not be here. A new
field is a line in `zerojax.config`, and its use here.
"""
