"""As much of Slurm as submitit asks for, on this machine, for test_launcher.py.

What this file is called as says what it does: sbatch, srun, sacct or scancel. Jobs are noted in the
folder that it lies in, by their numbers; a job's file holds the number of its process.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys

HERE = pathlib.Path(sys.argv[0]).absolute().parent


def sbatch(script):
    text = pathlib.Path(script).read_text()
    options = dict(re.findall(r'^#SBATCH --([a-z-]+)(?:=(.*))?$', text, re.M))
    with open(HERE / 'submitted', 'a') as file:
        file.write(f'{options}\n')
    job = os.getpid()
    last = re.match(r'0-(\d+)%', options['array'])[1] if 'array' in options else None
    for i in range(1 if last is None else int(last) + 1):
        name, array = f'{job}', {}
        if last is not None:
            name, array = f'{job}_{i}', {'ARRAY_JOB_ID': job, 'ARRAY_TASK_ID': i}
        variables = {'JOB_ID': job + i, 'NTASKS': 1, 'JOB_NUM_NODES': 1, 'NODEID': 0} | array
        variables |= {'PROCID': 0, 'LOCALID': 0, 'JOB_NODELIST': 'here'}
        environment = {f'SLURM_{key}': str(value) for key, value in variables.items()}
        with open(HERE / f'{name}.log', 'w') as log:
            process = subprocess.Popen(
                ['bash', script], env=os.environ | environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        (HERE / name).write_text(str(process.pid))
    print(f'Submitted batch job {job}')


def srun(*arguments):
    arguments = list(arguments)
    while arguments[0].startswith('--'):
        del arguments[: 2 if arguments[0] in ('--output', '--error') else 1]
    os.execvp(arguments[0], arguments)


def sacct(*_):
    print('JobID|State|NodeList')
    for file in HERE.iterdir():
        if re.fullmatch(r'\d+(_\d+)?', file.name):
            runs = pathlib.Path('/proc', file.read_text()).exists()
            print(f'{file.name}|{"RUNNING" if runs else "COMPLETED"}|here')


def scancel(job):
    os.killpg(int((HERE / job).read_text()), signal.SIGTERM)


globals()[pathlib.Path(sys.argv[0]).name](*sys.argv[1:])
