"A Ray cluster of several nodes on this machine, in a network of its own: whatever happens to nodes, the files are those of one process."
import os, shutil, subprocess, sys, threading, time
from pathlib import Path

import pytest
import standins
import troubles

from digiq.cluster.dispatch import Patience
from digiq.cluster.nodes import Cluster
from digiq.cluster.phones import far_phones, serve
from digiq.core import DigiqError, Run
from digiq.play import rollout
from digiq.play.fleet import FleetSettings, collect_fleet
from digiq.play.rollout import Rollout
from digiq.vlm.embedding import embed_run

ROOT = Path(__file__).resolve().parent.parent
ALONE = ["unshare", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"] # and nobody left behind
INSIDE = "DIGIQ_TEST_NETWORK" in os.environ
inside = pytest.mark.skipif(not INSIDE, reason="runs in a network of its own, see the last test")


@pytest.mark.skipif(INSIDE, reason="this is the inside")
def test_in_a_network_of_its_own(tmp_path):
    "All other tests of this file, where there is no address but loopback."
    try: subprocess.run([*ALONE, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError): pytest.skip("this machine lends no network namespaces")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | dict(DIGIQ_TEST_NETWORK="1", OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0",
        RAY_gcs_rpc_server_reconnect_timeout_s="3", RAY_health_check_timeout_ms="60000", RAY_health_check_failure_threshold="2") # a busy node is not taken for a dead one
    script = 'ip link set lo up && cd "$1" && mkdir small && mount -t tmpfs -o size=64k none small && exec "$2" -m pytest -q -n 0 -p no:cacheprovider --basetemp "$1/inside" "$3"'
    done = subprocess.run([*ALONE, "sh", "-c", script, "sh", str(tmp_path), sys.executable, __file__], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" in done.stdout.splitlines()[-1]


def settings(k):
    "Of the k-th node. Ports that are given need not be waited for."
    names = "metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port"
    return dict(node_ip_address="127.0.0.1", object_store_memory=100 << 20, **{name: 20_000 + 4*k + i for i, name in enumerate(names)})


class Machines:
    "Nodes that are added and removed."
    def __init__(self):
        from ray.cluster_utils import Cluster
        self.n, self.ray = 0, Cluster()
        self.start(num_cpus=0, include_dashboard=False) # the head

    def start(self, **how):
        for last in False, False, True: # a busy machine may take longer than Ray waits for a node
            self.n += 1
            try: return self.ray.add_node(**how, **settings(self.n))
            except Exception as e:
                if last or "timed out" not in str(e): raise

    def add(self, cpus=1, resources=None, **environment):
        "A node with environment variables of its own."
        return self.start(num_cpus=cpus, resources=resources or {}, env_vars={k: str(v) for k, v in environment.items()})

    def remove(self, node): self.ray.remove_node(node, allow_graceful=False)

    def remove_once(self, node, mark):
        "Kill a node in the middle of its work."
        def wait():
            deadline = time.monotonic() + 600
            while not mark.exists() and time.monotonic() < deadline: time.sleep(.05)
            self.remove(node)
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        return thread


@pytest.fixture(scope="module")
def machines():
    import ray
    machines = Machines()
    machines.add()
    yield machines
    ray.shutdown()
    machines.ray.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    standins.make(folder)
    return folder


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    "A run by this process."
    lab = standins.experiment(models, tmp_path_factory.mktemp("alone"), "workers=1")
    lab.evaluate("behaviour")
    return lab


def names(path): return sorted(f.name for f in Path(path).rglob("*") if f.suffix in (".parquet", ".npy")) # with checksums


@pytest.fixture
def there(models, machines, tmp_path):
    "The same run on the nodes."
    (tmp_path/"run"/"stages").mkdir(parents=True)
    lab = standins.experiment(models, tmp_path/"run", kind=standins.OnNodes, cluster=machines.ray.address)
    lab.cluster.patience = Patience(slow=1e6) # whoever has work finishes it, or loses it
    return lab


@inside
def test_killed_in_evaluation(machines, alone, there, tmp_path):
    mark = tmp_path/"hangs"
    killing = machines.remove_once(machines.add(DIGIQ_TEST_HANGS=mark), mark)
    there.evaluate("behaviour")
    killing.join()
    assert mark.exists() and all(names(there.path/part) == names(alone.path/part) for part in ("tuning", "evaluations"))
    ours, theirs = there.metrics(), alone.metrics()
    assert all(ours[k] == theirs[k] for k in ("success", "outcomes", "temperatures", "tuning")) and there.table().equals(alone.table())


@inside
def test_training_does_not_wait_for_evaluation(machines, models, alone, there, tmp_path):
    "train_and_remote_eval: the figures are those of one process, though the node is killed in mid-episode."
    alone.collect(); alone.featurise(); alone.propose(); alone.finetune(); alone.embed()
    for part in "episodes", "screens", "proposals", "embeddings", "checkpoints": shutil.copytree(alone.path/part, there.path/part)
    for f in (alone.path/"stages").glob("*.json"): shutil.copy(f, there.path/"stages")
    mark = tmp_path/"hangs"
    killing = machines.remove_once(machines.add(DIGIQ_TEST_HANGS=mark), mark)
    there.ask_evaluation("behaviour")
    there.train_critic(); there.score(); there.train_policy("digiq")
    there.ask_evaluation("digiq")
    there.await_evaluations()
    killing.join()
    alone.train_critic(); alone.score(); alone.train_policy("digiq"); alone.evaluate("digiq")
    ours, theirs = there.metrics(), alone.metrics()
    assert mark.exists() and all(ours[k] == theirs[k] for k in ("success", "outcomes", "temperatures", "tuning")) and set(ours["success"]) == {"behaviour", "digiq"}
    assert there.table().equals(alone.table()) and there.draw_success().size
    there.ask_evaluation("didiq")
    with pytest.raises(DigiqError, match="there is no agent 'didiq'"): there.await_evaluations()


@pytest.fixture
def cluster(machines):
    cluster = Cluster(machines.ray.address)
    cluster.patience = Patience(slow=1e6) # whoever has work finishes it, or loses it
    return cluster


def collected(path, workers=1, policy=troubles.Thrown()):
    "Files of episodes, named after what is in them."
    return names(rollout.collect(Run(path), troubles.TASKS, policy, troubles.counting, Rollout(24, 2, 1., 6, 2), workers=workers).shards.path)


@inside
def test_straggler_in_collection(machines, cluster, tmp_path):
    mark, cluster.patience = tmp_path/"hangs", Patience(slow=1.5)
    node, policy = machines.add(DIGIQ_TEST_HANGS=mark), troubles.Waiting(mark) # nobody is done before the straggler has begun
    assert collected(tmp_path/"there", cluster, policy) == collected(tmp_path/"here", policy=policy)
    machines.remove(node)


@inside
def test_killed_in_collection_with_a_full_disk_elsewhere(machines, cluster, tmp_path, tmp_path_factory):
    mark, disk = tmp_path/"hangs", tmp_path_factory.getbasetemp().parent/"small"
    full, hanging = machines.add(DIGIQ_TEST_DISK=disk), machines.add(DIGIQ_TEST_HANGS=mark)
    killing = machines.remove_once(hanging, mark)
    assert collected(tmp_path/"there", cluster) == collected(tmp_path/"here")
    killing.join()
    assert mark.exists() and (disk/"visited").exists()
    machines.remove(full)


def embedded(path, workers=1):
    store, proposals = troubles.recorded(path)
    return names(embed_run(store, proposals, troubles.Troubled(), path/"embeddings", 2, workers).shards.path)


@inside
def test_killed_in_embedding(machines, cluster, tmp_path):
    mark = tmp_path/"hangs"
    killing = machines.remove_once(machines.add(DIGIQ_TEST_HANGS=mark), mark)
    assert embedded(tmp_path/"there", cluster) == embedded(tmp_path/"here")
    killing.join()
    assert mark.exists()


@inside
def test_another_version_is_refused(machines, cluster, tmp_path):
    other = tmp_path/"other"
    shutil.copytree(ROOT/"digiq", other/"digiq", ignore=shutil.ignore_patterns("*.safetensors"))
    (other/"digiq"/"__init__.py").write_text('__version__ = "0.0.9"\n')
    node = machines.add(PYTHONPATH=os.pathsep.join([str(other), str(ROOT/"tests")]))
    with pytest.raises(DigiqError, match=r"^node \w+ has digiq 0.0.9, and this run has [\d.]+: install the same on both$"): collected(tmp_path/"there", cluster)
    machines.remove(node)
    assert collected(tmp_path/"there", cluster) == collected(tmp_path/"here") # goes on


@inside
def test_policy_and_phones_elsewhere(machines, cluster, tmp_path):
    "A policy on one node, phones on others, of which one is lost while they are played on."
    policy = troubles.ThrownByTorch()
    assert collected(tmp_path/"served", cluster, serve(cluster, policy)) == collected(tmp_path/"near", 1, policy)
    nodes, cfg = [machines.add(cpus=0, resources={"phone": 2}) for _ in range(2)], Rollout(200, 2, 1., 4, 10)
    with far_phones(cluster, troubles.two_phones) as makers:
        assert len(makers) == 4
        killing = machines.remove_once(nodes[0], tmp_path/"far"/"unfinished"/"episodes")
        far = collect_fleet(Run(tmp_path/"far"), troubles.TASKS, troubles.Middle(), makers, cfg, FleetSettings(rest=.1, tries=3))
        killing.join()
    with troubles.two_phones() as makers: here = collect_fleet(Run(tmp_path/"here"), troubles.TASKS, troubles.Middle(), makers, cfg)
    assert far.episodes().equals(here.episodes()) and len(far) == 200
    machines.remove(nodes[1])
    with pytest.raises(DigiqError, match="no node of the cluster has a phone"):
        with far_phones(cluster, troubles.two_phones): pass


EMBEDS = """
import sys
from pathlib import Path
from digiq.cluster.nodes import Cluster
from digiq.core import DigiqError
from digiq.vlm.embedding import embed_run
from troubles import Troubled, recorded
path, address = Path(sys.argv[1]), sys.argv[2]
try: embed_run(*recorded(path), Troubled(), path/"embeddings", 2, Cluster(address))
except DigiqError as e: sys.exit(str(e))
"""


@inside
def test_head_restarted_while_embedding(machines, tmp_path):
    "The driver ends with the head; started again on another cluster, it embeds nothing that is stored. The last test: it takes the cluster away."
    import ray
    mark, there = tmp_path/"hangs", tmp_path/"there"
    machines.add(DIGIQ_TEST_HANGS=mark)
    start = lambda: subprocess.Popen([sys.executable, "-c", EMBEDS, there, machines.ray.address], stderr=subprocess.PIPE, text=True)
    driver, deadline, found = start(), time.monotonic() + 120, lambda: list((there/"embeddings").glob("[0-9]*.npy"))
    while not (mark.exists() and len(found()) > 1): assert driver.poll() is None and time.monotonic() < deadline; time.sleep(.05)
    ray.shutdown()
    machines.ray.shutdown()
    assert driver.wait(120) != 0
    stored = {f: f.stat().st_mtime_ns for f in found()}
    machines.__init__()
    machines.add()
    again = start()
    assert again.wait(240) == 0, again.stderr.read()[-2000:]
    assert names(there/"embeddings") == embedded(tmp_path/"here") and all(f.stat().st_mtime_ns == at for f, at in stored.items()) and len(stored) < len(found())
