"""A Ray cluster of two nodes on this machine, each with all of its cores, for test_launcher.py.

    python tests/ray_nodes.py FOLDER

prints its address, has SIGKILL end all of the second node for each line `kill` on stdin, and ends
with stdin.
"""

import os
import sys

os.environ['RAY_TMPDIR'] = sys.argv[1]
os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
os.environ['RAY_worker_niceness'] = '0'  # noqa: SIM112 - else all else comes first

from ray.cluster_utils import Cluster

cores = len(os.sched_getaffinity(0))
node = {'num_cpus': cores, 'include_dashboard': False, 'object_store_memory': 10**8}
cluster = Cluster(initialize_head=True, head_node_args=node)
second = cluster.add_node(num_cpus=cores, object_store_memory=10**8)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for line in sys.stdin:
    assert line == 'kill\n'
    cluster.remove_node(second, allow_graceful=False)
    print('killed', flush=True)
cluster.shutdown()
