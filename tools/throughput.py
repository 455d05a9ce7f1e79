"""Steps a second of 1 to 8 nodes of sleeping phones, on this machine, in a network of its own, and answers a second of the
built-in policy. Run it by hand, on an idle machine; it writes what chapters 57 and 58 show, and takes about seven minutes."""
import os, subprocess, sys, time
from functools import partial
from itertools import cycle
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root/"tests")]
from test_cluster import ALONE, Machines

from digiq.actions import decision, render
from digiq.cluster.nodes import Cluster
from digiq.cluster.phones import far_phones
from digiq.cluster.throughput import sleepy_phones, steps_per_second
from digiq.core import threads, write_json
from digiq.env import perform, prompt
from digiq.method.autoui import AutoUIPolicy, ImageEncoder
from digiq.phone import SimPhone, oracle
from digiq.tasks import load
from digiq.vlm.representation import model_path

PHONES, NODES, PASSES = 8, (1, 2, 3, 4, 6, 8), 2
STEPS = {1.: 10, .3: 20, .1: 30} # of each phone, by latency in seconds
SIZES = 1, 8, 64, 512 # of batches


def tell(*words): print(*words, file=sys.stderr, flush=True)


def phones():
    "Steps a second, by nodes and latency."
    machines = Machines()
    for _ in range(max(NODES)): machines.add(cpus=0, resources={"phone": PHONES})
    rates, busy = ({(n, latency): [] for latency in STEPS for n in NODES} for _ in range(2))
    with far_phones(Cluster(machines.ray.address), partial(sleepy_phones, PHONES, *STEPS)) as makers:
        a_node = PHONES * len(STEPS)
        assert len(makers) == max(NODES) * a_node
        of = {latency: [m for i, m in enumerate(makers) if i % a_node // PHONES == k] for k, latency in enumerate(STEPS)}
        steps_per_second(of[min(STEPS)], 4) # everybody has imported everything
        load = [os.getloadavg()[0]]
        tell(len(machines.ray.worker_nodes), "nodes are up")
        for _ in range(PASSES):
            for n, latency in rates:
                began = time.process_time()
                rates[n, latency].append(steps_per_second(of[latency][:n * PHONES], STEPS[latency]))
                busy[n, latency].append((time.process_time() - began) / (n * PHONES * STEPS[latency]))
                tell(n, "nodes,", latency, "s:", rates[n, latency][-1], "steps/s")
            load.append(os.getloadavg()[0])
    return dict(cpus=os.cpu_count(), load=[round(x, 2) for x in load], phones=PHONES,
        rates=[dict(nodes=n, latency=latency, rates=[round(r, 3) for r in found], busy=[round(b, 6) for b in busy[n, latency]]) for (n, latency), found in rates.items()])


def states(n):
    "Goals, last actions and screens on the way to goals."
    phone, found = SimPhone(), []
    for i, task in enumerate(cycle(load("webshop", "train"))):
        phone.reset(task, i)
        previous = ""
        for _ in range(4):
            found.append((task.goal, previous, phone.screenshot()))
            if len(found) == n: return found
            action = oracle(phone, task)
            previous = decision(render(action))
            perform(phone, action)


def policy():
    "Answers a second of processor time by the size of a batch; and what the size does to greedy answers and log-probabilities."
    agent, seen, rates = AutoUIPolicy.from_pretrained(model_path("tiny-autoui"), ImageEncoder.from_pretrained(model_path("tiny-vlm"))), states(max(SIZES)), {}
    def batches(n, size): return [list(zip(*seen[k:k + size])) for k in range(0, n, size)]
    def answers(n, size, **how): return [a for batch in batches(n, size) for (a,) in agent.act(*batch, **how)]
    for size in SIZES:
        for _ in range(2): # the first does not count
            agent.image_encoder.known.clear()
            began = time.process_time() # one thread: what others do on this machine does not count
            rates[size] = round(len(answers(max(size, 64), size)) / (time.process_time() - began), 1)
        tell("batches of", size, ":", rates[size], "answers/s")
    goals, histories, screens = zip(*seen[:64])
    prompts, features, greedy = [prompt(g, h) for g, h in zip(goals, histories)], agent.image_encoder(screens), answers(64, 64, temperature=0.)
    def log_probs(size): return [x for k in range(0, 64, size) for x in agent.log_prob(prompts[k:k + size], features[k:k + size], greedy[k:k + size]).tolist()]
    said = log_probs(64)
    return dict(answers=rates, rounding={size: dict(different_answers=sum(a != b for a, b in zip(answers(64, size, temperature=0.), greedy)),
        different_log_probs=sum(a != b for a, b in zip(log_probs(size), said)), largest_difference=max(abs(a - b) for a, b in zip(log_probs(size), said))) for size in (1, 8, 32)})


def write_answers():
    with threads(1): write_json(root/"nbs"/"cluster"/"answers.json", policy())


if __name__ == "__main__":
    if "DIGIQ_TEST_NETWORK" not in os.environ:
        environment = os.environ | dict(DIGIQ_TEST_NETWORK="1", PYTHONPATH=f"{root}:{root/'tests'}", OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0")
        sys.exit(subprocess.run([*ALONE, "sh", "-c", 'ip link set lo up && exec "$0" "$1"', sys.executable, __file__], env=environment).returncode)
    write_json(root/"nbs"/"cluster"/"throughput.json", phones())
    write_answers()
    os._exit(0) # what is left ends with the network
