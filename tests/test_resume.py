"Processes killed with -9 while they collect: started again, they end with the same files, and leave no other."
import json, random, signal, subprocess, sys, time
from pathlib import Path

import pytest

from digiq.core import DataError, Run, read_json
from digiq.data import EpisodeStore

COLLECT = """
import random, sys, time
from types import SimpleNamespace
from digiq.actions import complete, press, render, swipe, tap
from digiq.core import Run
from digiq.env import DeviceEnv, ScriptedDevice
from digiq.play.rollout import Rollout, collect

class Slow:
    "A random policy that takes its time."
    moves = [render(a) for a in (tap(.5, .5), press("back"), swipe(.8, .5, .2, .5), complete())] + ["", "tap it!"]
    def act(self, goals, histories, screens, before, n=1, temperature=1.):
        time.sleep(float(sys.argv[2]))
        return [random.choices(self.moves, [6, 1, 1, .3, .3, 1], k=n) for _ in goals]

tasks = [SimpleNamespace(id=f"count-{n}", goal=f"Count to {n}", level=1) for n in (3, 4, 12, 15)]
collect(Run(sys.argv[1]), tasks, Slow(), lambda tasks, horizon: DeviceEnv(ScriptedDevice(), tasks, horizon),
        Rollout(episodes=60, phones=4, horizon=8, shard=6), seed=5, workers=int(sys.argv[3]))
"""


def start(folder, pause, workers=1):
    root = Path(__file__).parent.parent
    return subprocess.Popen([sys.executable, "-c", COLLECT, str(folder), str(pause), str(workers)], cwd=root, stderr=subprocess.PIPE, text=True)


def contents(folder):
    "What is in a run directory, time aside."
    stage = read_json(folder/"stages"/"episodes.json")
    return sorted(f.name for f in (folder/"episodes").iterdir()), {k: v for k, v in stage.items() if k != "seconds"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")/"run"
    process = start(folder, 0)
    assert process.wait() == 0, process.stderr.read()
    return contents(folder)


def running(folder):
    "Processes that name a run directory on their command line."
    return sum(str(folder).encode() in f.read_bytes() for f in Path("/proc").glob("[0-9]*/cmdline") if f.exists())


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment(whole, tmp_path, workers):
    rng, killed = random.Random(0), 0
    for _ in range(4):
        process = start(tmp_path, .005, workers)
        deadline, files = time.monotonic() + 60, len(list(tmp_path.glob("episodes/*.parquet")))
        while len(list(tmp_path.glob("episodes/*.parquet"))) <= files and process.poll() is None: assert time.monotonic() < deadline
        time.sleep(rng.uniform(0, .1))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        while running(tmp_path): assert time.monotonic() < deadline # its workers end with it
        EpisodeStore(tmp_path/"episodes").shards.verify()
    process = start(tmp_path, 0, workers)
    assert process.wait() == 0, process.stderr.read()
    assert killed >= 2 and contents(tmp_path) == whole


def test_half_written_shard_is_no_shard(whole, tmp_path):
    (tmp_path/"episodes").mkdir()
    (tmp_path/"episodes"/f".{whole[0][0]}.partial").write_bytes(b"PAR1 and no more")
    assert start(tmp_path, 0).wait() == 0
    assert contents(tmp_path) == whole


def test_damaged_shard_is_named_and_kept(whole, tmp_path):
    assert start(tmp_path, 0).wait() == 0
    victim = tmp_path/"episodes"/whole[0][3]
    data = victim.read_bytes()
    for damaged in (data[:len(data) // 2], data[:99] + bytes([data[99] ^ 4]) + data[100:], b""):
        victim.write_bytes(damaged)
        process = start(tmp_path, 0)
        assert process.wait() == 1
        told = process.stderr.read().strip().splitlines()[-1]
        assert str(victim) in told and "delete it and run" in told
        assert victim.read_bytes() == damaged
    victim.unlink()
    assert start(tmp_path, 0).wait() == 0
    assert contents(tmp_path) == whole


def test_two_processes_do_not_share_a_stage(tmp_path):
    first = start(tmp_path, .05)
    while not (tmp_path/"stages"/"episodes.json").exists(): assert first.poll() is None
    second = start(tmp_path, 0)
    assert second.wait() == 1 and "another process" in second.stderr.read().strip().splitlines()[-1]
    first.kill()
    first.wait()


def test_seconds_add_up(tmp_path):
    for _ in range(2):
        try:
            with Run(tmp_path).stage("slow", {}) as stage:
                time.sleep(.05)
                raise KeyboardInterrupt
        except KeyboardInterrupt: pass
    assert .1 <= json.loads((tmp_path/"stages"/"slow.json").read_text())["seconds"] < 5
    (tmp_path/"stages"/"slow.json").write_text('{"config": ')
    with pytest.raises(DataError, match="slow.json is damaged"):
        with Run(tmp_path).stage("slow", {}): pass
