"""What a run has to do with the machine: files, processes, signals, terminal.

`command` (help, exit statuses), `errors`, `stop` (signals), `distributed` (several processes),
`progress` (terminal); `workdir` (made, locked), `records` (manifest, metrics), `checkpoint`,
`objectstore` (workdirs in gs://), `figures`, `torch_checkpoint` (files of the paper's code).
Nothing here knows what is trained.
"""
