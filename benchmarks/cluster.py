"""Does a build on a cluster that loses nodes come to the same bytes?

    python benchmarks/cluster.py [--nodes 3] [--lose 1] [--pictures 120]

Simulates a cluster on this machine: a head without CPUs and NODES workers with one CPU each, every one a raylet of its
own. Builds a small recipe of pictures by `longllava build --address`, once undisturbed, once while LOSE nodes are ended
by SIGKILL in the middle of a shard, each replaced as a spot fleet would. Prints a report as JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chaos import command, digests, left_behind, write_inputs


def wait_for(out: Path, shards: int, driver: "subprocess.Popen[bytes]") -> None:
    """Waits until some shards are done."""
    while len(list((out / ".build/shards").glob("*.json"))) < shards:
        if driver.poll() is not None:
            raise SystemExit(f"the build ended with exit code {driver.returncode} before a node was lost")
        time.sleep(0.01)


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--lose", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=120)
    options = parser.parse_args()
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as sessions:
        folder = Path(name)
        recipe = write_inputs(folder, options.pictures)
        common = {"object_store_memory": 80 << 20, "include_dashboard": False}
        cluster = Cluster(True, head_node_args={"num_cpus": 0, "temp_dir": sessions, **common})
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(options.nodes)]
        try:
            subprocess.run(command(recipe, folder / "calm", cluster.address), check=True, capture_output=True)
            started = time.monotonic()
            with subprocess.Popen(
                command(recipe, folder / "out", cluster.address), stdout=subprocess.DEVNULL
            ) as driver:
                for lost in range(options.lose):
                    wait_for(folder / "out", 1 + 3 * lost, driver)
                    cluster.remove_node(nodes.pop(), allow_graceful=False)
                    nodes.append(cluster.add_node(num_cpus=1, object_store_memory=80 << 20))
            report = {
                "nodes": options.nodes,
                "lost": options.lose,
                "exit_code": driver.returncode,
                "identical": digests(folder / "out") == digests(folder / "calm"),
                "seconds": round(time.monotonic() - started, 1),
                "left_behind": left_behind(folder),
            }
        finally:
            cluster.shutdown()
    print(json.dumps(report, indent=2))
    sys.exit(0 if report["identical"] and not report["left_behind"] else 1)


if __name__ == "__main__":
    main()
