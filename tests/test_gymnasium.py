"Gymnasium from outside: a fresh interpreter, processes that share nothing but memory, a window, any text."
import subprocess, sys
from multiprocessing import Array

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, strategies as st

from digiq.actions import render
from digiq.env import AnyText, SharedTexts
from digiq.phone import oracle
from digiq import NAMES
from notebooks import root

NAME = next(iter(NAMES))
small = dict(scale=.05, disturbance=0)


def fresh(code):
    "What a new interpreter prints, to which nothing of ours is known but the path."
    code = f"import sys; sys.path.insert(0, {str(root)!r})\n{code}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd="/", capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_by_name_alone():
    "The name imports what registers it; without the module gymnasium knows no such namespace."
    made = "import gymnasium as gym; print(gym.make({!r}, scale=.05).reset(seed=1)[1]['task_id'])"
    assert fresh(made.format(f"digiq:{NAME}")).startswith("webshop-train-")
    assert "NamespaceNotFound" in fresh(made.format(NAME))
    assert fresh("import digiq\n" + made.format(NAME)).startswith("webshop-train-")


def same(a, b):
    "Whether two answers of vector environments are equal, but for what they are kept in."
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


@pytest.mark.parametrize("how", [dict(context="spawn"), dict(shared_memory=False), dict(copy=False)], ids=str)
def test_processes_of_their_own(how):
    "The same lives in one process and in several, over the end of an episode, and what was handed out stays as it was."
    one = gym.make_vec(NAME, 2, "sync", **small)
    several = gym.make_vec(NAME, 2, "async", vector_kwargs=how, **small)
    kept, ended = [(one.reset(seed=1), several.reset(seed=1))], False
    for _ in range(8):
        said = tuple(render(oracle(env.unwrapped.device, env.unwrapped.task)) for env in one.envs)
        mine, theirs = one.step(said), several.step(said)
        assert {k: tuple(v) for k, v in mine[0].items() if k != "screen"} == {k: tuple(v) for k, v in theirs[0].items() if k != "screen"}
        kept.append((mine, theirs))
        ended = ended or mine[2].any()
    several.close()
    assert ended
    if how != dict(copy=False):
        for mine, theirs in kept: assert all(same(a, b) for a, b in zip(mine, theirs))


def test_window(monkeypatch):
    "Gymnasium's own window shows the screens."
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    pytest.importorskip("pygame")
    with pytest.warns(UserWarning, match="HumanRendering wrapper is being applied"): env = gym.make(NAME, render_mode="human", **small)
    env.metadata["render_fps"] = 1000 # or it waits a second for each
    env.reset(seed=1)
    env.step("")
    assert env.get_wrapper_attr("window").get_size() == (54, 120)
    env.close()


@given(st.lists(st.text(st.characters(), max_size=8), min_size=1, max_size=4), st.data())
def test_any_text_is_shared(texts, data):
    space = AnyText(8, min_length=0)
    assert all(text in space for text in texts)
    shared = SharedTexts(Array("i", len(texts) * 9), len(texts))
    for i in data.draw(st.permutations(range(len(texts)))): shared[i] = texts[i]
    assert list(shared) == texts
