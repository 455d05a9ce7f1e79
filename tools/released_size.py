"""Write a synthetic data set of the released size, a piece at a time, then train a critic on it and score all of it.

    python tools/released_size.py FOLDER [--episodes 1296 --steps 20 --proposals 64 --width 4096 --critic-steps 200]

Prints JSON: seconds of each part and the most memory that was resident, in GB. FOLDER takes 14 GB at the released
size; delete it afterwards.
"""
import argparse, json, re, time
from pathlib import Path

import numpy as np

from digiq import actions as A
from digiq.core import Run, progress
from digiq.method.critic import CriticConfig
from digiq.data import Embeddings, EpisodeStore, Proposals
from digiq.method.autoui import tiny_tokenizer
from digiq.tasks import load
from digiq.method.training import fit_critic, load_transitions, score

SCREEN = 1408 # width of a pooled image feature


def write(
    run, # where
    episodes, steps, proposals, width, # how much
    shard=8, # episodes a file
):
    "Write episodes, image features, proposals and embeddings, shard after shard. Shards that are there are kept."
    tasks, parts = load("webshop", "train"), dict(episodes=EpisodeStore(run.path/"episodes"), screens=Embeddings(run.path/"screens"), proposals=Proposals(run.path/"proposals"), embeddings=Embeddings(run.path/"embeddings"))
    for i in progress(range(-(-episodes//shard)), desc="write"):
        if i in parts["embeddings"].shards.found(): continue
        rng, numbers = np.random.default_rng(i), range(i*shard, min(episodes, (i + 1)*shard))
        rows, some, states = [], [], [(e, s) for e in numbers for s in range(steps)]
        for e in numbers:
            task, won = tasks[e % len(tasks)], rng.random() < .3
            for s in range(steps + 1):
                last = s == steps - 1
                rows.append(dict(episode=e, step=s, task_id=task.id, goal=task.goal, level=task.level, prompt="", previous="", screen=None, action=A.render(A.tap(*rng.random(2))) if s < steps else "",
                    reward=float(last and won), terminated=bool(last and won), truncated=bool(last and not won), error="", seed=e))
        first = {(r["episode"], r["step"]): r["action"] for r in rows}
        for e, s in states: some.append(dict(episode=e, step=s, actions=[first[e, s], *(A.render(A.tap(y, x)) for y, x in rng.random((proposals - 1, 2)))]))
        pairs = [dict(episode=r["episode"], step=r["step"], action=a) for r in some for a in dict.fromkeys(r["actions"])]
        parts["episodes"].write_shard(i, rows)
        parts["screens"].write_shard(i, [dict(episode=r["episode"], step=r["step"], action="") for r in rows], rng.standard_normal((len(rows), SCREEN), np.float32))
        parts["proposals"].write_shard(i, some)
        parts["embeddings"].write_shard(i, pairs, rng.standard_normal((len(pairs), width), np.float32))


def resident(): # GB at most so far; ru_maxrss would count the process that started this one, too
    return round(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])/2**20, 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    for name, default in dict(episodes=1296, steps=20, proposals=64, width=4096, critic_steps=200).items(): parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args, seconds = parser.parse_args(), {}
    run, start = Run(args.folder), time.perf_counter()
    def note(name):
        nonlocal start
        seconds[name], start = round(time.perf_counter() - start, 1), time.perf_counter()
        print(name, seconds[name], "s, resident", resident(), "GB", flush=True)
    write(run, args.episodes, args.steps, args.proposals, args.width)
    note("write")
    data = load_transitions(run, (1, 1), SCREEN)
    note("read")
    critic, history = fit_critic(data, CriticConfig(screen_cells=(1, 1), steps=args.critic_steps), tiny_tokenizer([t.goal for t in load("webshop", "train")]))
    note("critic")
    scores = score(critic, data)
    note("score")
    print(json.dumps(dict(pairs=len(scores), finite=bool(np.isfinite(scores.q).all()), gb=round(sum(f.stat().st_size for f in run.path.rglob("*.npy"))/1e9, 2), seconds=seconds,
        rss_gb=resident())))


if __name__ == "__main__": main()
