"A fleet that is killed, refused, or loses its adb server: every episode is recorded once."
import os, random, shutil, signal, subprocess, sys, threading, time
from collections import Counter
from pathlib import Path

import pytest
from adbutils import AdbClient

from digiq.actions import render, tap
from digiq.core import Run, derive_seed
from digiq.data import EpisodeStore
from digiq.play.adb import AdbDevice, AdbSettings, ask_phone
from digiq.play.adbd import Adbd, adb_server
from digiq.play.android import Android
from digiq.env import DeviceEnv
from digiq.play.fleet import FleetSettings, collect_fleet
from digiq.phone import SimPhone
from digiq.play.rollout import Rollout
from digiq.tasks import load

root = Path(__file__).parent.parent
adb = shutil.which("adb")
if not adb and os.environ.get("DIGIQ_CI"): raise RuntimeError("adb is missing: apt-get install adb")

COLLECT = """
import random, sys, time
from pathlib import Path
from types import SimpleNamespace
from digiq.actions import press, render, tap
from digiq.core import DigiqError, Run
from digiq.env import DeviceEnv, DeviceError, ScriptedDevice
from digiq.play.fleet import FleetSettings, collect_fleet
from digiq.play.rollout import Rollout

class Frail(ScriptedDevice):
    "Fails now and then; hangs once in a while."
    def tap(self, x, y):
        time.sleep(float(sys.argv[2]))
        chance = random.random()
        if chance < .02: raise DeviceError("gone")
        if chance > .998: time.sleep(1000)
        super().tap(x, y)

class Random:
    def act(self, goals, histories, screens, before, n=1, temperature=1.):
        while Path(sys.argv[1], "hold").exists(): time.sleep(.05)
        return [[random.choice([render(tap(.5, .5))] * 5 + [render(press("back")), "tap it!"])] for _ in goals]

tasks = [SimpleNamespace(id=f"count-{n}", goal=f"Count to {n}", level=1) for n in (2, 3, 4, 5)]
try: collect_fleet(Run(sys.argv[1]), tasks, Random(), [lambda tasks, horizon: DeviceEnv(Frail(), tasks, horizon)] * 6, Rollout(episodes=60, horizon=8, shard=6), FleetSettings(limit=1., rest=.01, tries=50), seed=5)
except DigiqError as e: sys.exit(str(e))
"""


def start(folder, pause):
    return subprocess.Popen([sys.executable, "-c", COLLECT, str(folder), str(pause)], cwd=root, stderr=subprocess.PIPE, text=True)


def check(store, tasks, episodes):
    "Every episode once, from its first step to its last, and every task equally often."
    steps = store.episodes()
    assert steps.groupby("episode").step.apply(list).map(lambda s: s == list(range(len(s)))).all()
    assert sorted(steps.episode.unique()) == list(range(episodes))
    assert Counter(steps.groupby("episode").task_id.first()) == {t: episodes // len(tasks) for t in tasks}


def test_killed_and_continued(tmp_path):
    killed, hold = 0, tmp_path/"hold"
    hold.touch()
    for attempt in range(3):
        process, files = start(tmp_path, .01), len(list(tmp_path.glob("episodes/*.parquet")))
        if not attempt:
            while not (tmp_path/"stages"/"episodes.json").exists(): assert process.poll() is None
            assert "being worked on by another process" in start(tmp_path, 0).communicate()[1] # a second one is refused
            hold.unlink()
        while len(list(tmp_path.glob("episodes/*.parquet"))) <= files and process.poll() is None: time.sleep(.005)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    process = start(tmp_path, 0)
    assert process.wait() == 0, process.stderr.read()
    assert killed >= 2
    store = EpisodeStore(tmp_path/"episodes")
    check(store, [f"count-{n}" for n in (2, 3, 4, 5)], 60)
    seeds = store.episodes().groupby("episode").seed.first()
    assert seeds.tolist() == [derive_seed(5, "episodes", i) for i in range(60)]


class Wanders:
    "Taps anywhere; tells how often it was asked."
    asked = 0
    def act(self, goals, histories, screens, before, n=1, temperature=1.):
        self.asked += len(goals)
        return [[render(tap(random.random(), random.random()))] for _ in goals]


@pytest.mark.skipif(not adb, reason="adb is missing: apt-get install adb")
def test_adb_server_killed_and_links_cut_while_collecting(tmp_path):
    androids, policy = [Android(SimPhone(disturbance=0), f"simphone-{i}") for i in range(3)], Wanders()
    with adb_server(adb) as port, Adbd(androids) as phones:
        for address in phones.addresses: AdbClient().connect(address, timeout=60)
        done = threading.Event()
        def vandal():
            for at in (10, 30, 50):
                while policy.asked < at and not done.is_set(): time.sleep(.01)
                if at == 30: subprocess.run([adb, "-P", str(port), "kill-server"], timeout=30)
                else: subprocess.run([adb, "-P", str(port), "disconnect", phones.addresses[0]], timeout=30, stdout=subprocess.DEVNULL)
        trouble = threading.Thread(target=vandal)
        trouble.start()
        try:
            makers = [lambda tasks, horizon, serial=serial: DeviceEnv(AdbDevice(serial, AdbSettings(limit=20, settle=0)), tasks, horizon, ask_phone) for serial in phones.addresses]
            tasks = load("webshop", "train")[:3]
            store = collect_fleet(Run(tmp_path), tasks, policy, makers, Rollout(episodes=12, horizon=8, shard=4), FleetSettings(rest=.05, tries=20))
        finally:
            done.set()
            trouble.join()
            subprocess.run([adb, "-P", str(port), "kill-server"], timeout=30)
    assert policy.asked > 50 # all of the trouble came
    check(store, [t.id for t in tasks], 12)
