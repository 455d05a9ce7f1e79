"Work shared by processes: the same files, errors that come home, and nobody left behind."
import os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from digiq.core import DataError, DigiqError, Run, share, threads
from digiq.data import Shards
from digiq.env import DeviceEnv, ScriptedDevice
from digiq.play.rollout import Rollout, collect

TASKS = [SimpleNamespace(id="count-3", goal="Count to 3", level=1)]


def products(path, workers):
    "Shards of products of matrices."
    shards, a = Shards(path, ".npy"), torch.rand(500, 500, generator=torch.Generator().manual_seed(0))
    def make(i, told):
        assert torch.get_num_threads() == 1
        told(1)
        return (a @ a * (i + 1)).numpy().tobytes()
    shards.fill([1] * 6, int, make, shards.write, "products", workers)
    return [f.name for f in shards.paths()]


def test_after_work_on_two_threads(tmp_path):
    "OpenMP has threads in the parent that a forked process does not have."
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        big = torch.rand(1500, 1500)
        assert torch.isfinite(big @ big).all()
        names = [products(tmp_path/str(workers), workers) for workers in (1, 2, 3)]
        assert names[0] == names[1] == names[2] and torch.get_num_threads() == 2
        assert torch.isfinite(big @ big).all()
    finally: torch.set_num_threads(before)


class Fails:
    "A policy that goes wrong."
    def __init__(self, how): self.how = how
    def act(self, goals, *others, n, temperature): self.how()


def killed(): os.kill(os.getpid(), signal.SIGKILL)
def refuses(): raise DataError("no such screen: look again")
def breaks(): np.zeros(3)[7]


@pytest.mark.parametrize("how, kind, told", [(refuses, DataError, "no such screen: look again"), (breaks, IndexError, "index 7 is out of bounds"), (killed, DigiqError, "exit code -9.*start again, what is finished is kept")])
def test_errors_come_home(tmp_path, how, kind, told):
    began = time.monotonic()
    with pytest.raises(kind, match=told) as e:
        collect(Run(tmp_path), TASKS, Fails(how), lambda tasks, horizon: DeviceEnv(ScriptedDevice(), tasks, horizon), Rollout(episodes=8, phones=2, shard=2), workers=2)
    assert type(e.value) is kind and "\n" not in str(e.value) and time.monotonic() - began < 30
    assert "np.zeros(3)[7]" in "".join(getattr(e.value, "__notes__", [])) or how is not breaks


def test_error_without_a_way_home():
    def work(item, told):
        class Local(Exception): "Cannot be pickled."
        raise Local
    with pytest.raises(DigiqError, match="exit code 1"): share([1, 2], int, work, print, 2)


ENDLESS = """
import os, signal, sys, time
from digiq.core import share
signal.signal(signal.SIGINT, signal.default_int_handler) # ignored where the tests were started in the background

def work(item, told):
    open(f"{sys.argv[1]}/{os.getpid()}", "w").close()
    time.sleep(60)

share([1, 2, 3], int, work, print, 2)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(tmp_path, sent):
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2: assert process.poll() is None and time.monotonic() < deadline
    process.send_signal(sent)
    assert process.wait(10) != 0 and ("KeyboardInterrupt" in process.stderr.read()) == (sent == signal.SIGINT)
    alive = lambda f: Path(f"/proc/{f.name}/stat").exists() and Path(f"/proc/{f.name}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    while any(map(alive, tmp_path.iterdir())): assert time.monotonic() < deadline
    assert len(list(tmp_path.iterdir())) == 2


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError):
        with threads(1): raise KeyError
    assert torch.get_num_threads() == before
