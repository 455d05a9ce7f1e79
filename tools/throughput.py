"Steps a second of 1 to 8 nodes of sleeping phones, on this machine, in a network of its own. Its figures are in chapter 58; run it by hand, on an idle machine."
import json, os, subprocess, sys
from functools import partial
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root/"tests")]
from test_cluster import ALONE, Machines

from digiq.cluster.nodes import Cluster
from digiq.cluster.phones import far_phones
from digiq.cluster.throughput import sleepy_phones, steps_per_second

PHONES, LATENCY, NODES = 8, 1., (1, 2, 3, 4, 6, 8)


def measure():
    "Steps a second, by number of nodes."
    machines, rates = Machines(), {}
    for n in NODES:
        while len(machines.ray.worker_nodes) < n: machines.add(cpus=0, resources={"phone": PHONES})
        with far_phones(Cluster(machines.ray.address), partial(sleepy_phones, PHONES, LATENCY)) as makers:
            assert len(makers) == n * PHONES
            steps_per_second(makers, 1) # everybody has imported everything
            rates[n * PHONES] = steps_per_second(makers, 10)
            print(n, "nodes:", rates[n * PHONES], "steps/s", file=sys.stderr)
    return rates


if __name__ == "__main__":
    if "DIGIQ_TEST_NETWORK" not in os.environ:
        environment = os.environ | dict(DIGIQ_TEST_NETWORK="1", PYTHONPATH=f"{root}:{root/'tests'}", OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0")
        sys.exit(subprocess.run([*ALONE, "sh", "-c", 'ip link set lo up && exec "$0" "$1"', sys.executable, __file__], env=environment).returncode)
    print(json.dumps(measure()))
    os._exit(0) # what is left ends with the network
