"Work without any model for the nodes of a cluster, and what may be wrong with a node."
import os, random, time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from digiq.actions import press, render, tap
from digiq.data import EpisodeStore, Proposals
from digiq.env import DeviceEnv, ScriptedDevice
from digiq.vlm.embedding import HashEmbedder

TASKS = [SimpleNamespace(id=f"count-{n}", goal=f"Count to {n}", level=1) for n in (2, 3)]


def trouble():
    "What is wrong with the node where this is called, if anything; a file tells that somebody was here."
    if mark := os.environ.get("DIGIQ_TEST_HANGS"):
        Path(mark).touch()
        time.sleep(3600)
    if disk := os.environ.get("DIGIQ_TEST_DISK"):
        Path(disk, "visited").touch()
        Path(disk, "spilt").write_bytes(bytes(1 << 20))


def counting(tasks, horizon):
    "A counting device on a node."
    trouble()
    return DeviceEnv(ScriptedDevice(), tasks, horizon)


@contextmanager
def two_phones():
    "The phones of a node."
    yield [lambda tasks, horizon: DeviceEnv(ScriptedDevice(), tasks, horizon)] * 2


class Thrown:
    "A policy that tosses a coin."
    def toss(self): return random.random() < .5
    def act(self, goals, *seen, n, temperature): return [[render(tap(.5, .5) if self.toss() else press("back"))] for _ in goals]


class Waiting(Thrown):
    "Tosses its coin once a file is there."
    def __init__(self, mark): self.mark = mark
    def act(self, goals, *seen, n, temperature):
        while not self.mark.exists(): time.sleep(.05)
        return super().act(goals, *seen, n=n, temperature=temperature)


class ThrownByTorch(Thrown):
    def toss(self):
        import torch
        return bool(torch.rand(()) < .5)


class Middle:
    "A policy that taps the middle of the screen."
    def act(self, goals, *seen, n, temperature): return [[render(tap(.5, .5))] for _ in goals]


class Troubled(HashEmbedder):
    "An embedder that a node's trouble stops."
    def embed(self, pairs):
        trouble()
        time.sleep(.2)
        return super().embed(pairs)


def recorded(path, episodes=12):
    "Episodes of three steps with screens of many colours, and their proposals."
    store, proposals = EpisodeStore(f"{path}/episodes"), Proposals(f"{path}/proposals")
    actions = [render(tap(.5, .5)), render(press("back"))]
    base = dict(task_id="t", goal="g", level=1, prompt="", previous="", reward=0., terminated=False, truncated=False, error="", seed=0)
    if not store.shards.found():
        store.write_shard(0, [base | dict(episode=e, step=s, screen=Image.new("RGB", (27, 60), (9 * e, 60 * s, 0)), action=actions[0] if s < 3 else "") for e in range(episodes) for s in range(4)])
        proposals.write_shard(0, [dict(episode=e, step=s, actions=actions) for e in range(episodes) for s in range(3)])
    return store, proposals
