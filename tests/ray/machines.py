"""A cluster whose machines have disks of their own; run by test_object_storage.py in a process of its own, told what to do on stdin.

Commands, a JSON object per line: {"add": NAME, "cache": FOLDER} starts a node of one CPU that sees that cache folder, {"kill": NAME} kills
it with SIGKILL; the end of stdin ends the cluster. Each command is answered with a JSON object, the first one holds the address.
"""

from __future__ import annotations

import json
import sys

from ray.cluster_utils import Cluster


def main() -> None:
    sys.modules["ray.dashboard.optional_deps"] = None  # as where ray comes without its extra `default`: smaller agents
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = {}
    print(json.dumps({"address": cluster.address}), flush=True)
    try:
        for line in sys.stdin:
            asked = json.loads(line)
            if "add" in asked:
                nodes[asked["add"]] = cluster.add_node(num_cpus=1, env_vars={"SAFEBASIN_CACHE": asked["cache"]})
            else:
                cluster.remove_node(nodes.pop(asked["kill"]), allow_graceful=False)
            print(json.dumps({"done": asked}), flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
