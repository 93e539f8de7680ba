"""A Ray cluster of two nodes with a core and a pretended GPU each, for test_ray.py.

Prints its address. A line on stdin kills the second node; prints the command line of the run there.
"""

import os
import sys

import psutil

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 2**27}


def runs_on(node) -> list[str]:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    commands = [" ".join(process.cmdline()) for process in raylet.children(recursive=True)]
    return [command for command in commands if "train_with_random" in command]


def main() -> None:
    cluster = Cluster(
        initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    )
    second = cluster.add_node(**NODE)
    print(cluster.address, flush=True)
    for _ in sys.stdin:
        print(" ".join(runs_on(second)), flush=True)
        cluster.remove_node(second, allow_graceful=False)
    cluster.shutdown()


main()
