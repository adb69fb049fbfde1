"""What a run has to do with the machine: files, processes, signals, terminal.

`command` (help, exit statuses), `console` (the command `zerojax`), `errors`, `stop` (signals),
`distributed` (several processes), `compilation_cache`, `terminal` (what is printed), `progress`,
`paths`; `workdir` (made, locked), `manifest` (what a result depends on), `metrics_log`,
`event_file` (TensorBoard), `checkpoint`, `hashes`, `records` (JSON, CSV), `objectstore` (workdirs
in gs://), `figures`, `torch_checkpoint` (files of the paper's code).
Nothing here knows a config.
"""
