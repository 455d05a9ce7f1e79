"What cannot be told as a lesson: random users on the phone, all tasks, several processes."
import json, os, random, subprocess, sys

import pytest
from digiq.actions import parse, press, render, swipe, tap, type_text
from digiq.env import perform
from digiq.phone import SimPhone, distance, judge, oracle, ui
from digiq.phone.device import diff
from digiq.tasks import load

SWIPES = [(.7, .5, .3, .5), (.3, .5, .7, .5), (.5, .2, .5, .8), (.5, .8, .5, .2)]
TEXTS = ["x", "blue lamp", "nonsense ' \" \\ <image>", "日本 🛒", ""]

def anything(phone, task, rng):
    "An action of a user without a plan, mostly on something that can be tapped."
    r = rng.random()
    if r < .65:
        boxes = [e.box for e in phone.elements() if e.clickable] or [(.4, .4, .6, .6)]
        y0, x0, y1, x1 = rng.choice(boxes)
        return tap((y0 + y1) / 2, (x0 + x1) / 2)
    if r < .8: return swipe(*rng.choice(SWIPES))
    if r < .93: return type_text(rng.choice([task.query, task.site, task.site[:4], *TEXTS]))
    return press(rng.choice(["back", "home", "enter", "enter"]))

def wandering(episodes, seed, disturbance=1.0):
    "Phones in the middle of aimless episodes."
    rng, phone, tasks = random.Random(seed), SimPhone(disturbance=disturbance), load("webshop", "train")
    for i in range(episodes):
        task = rng.choice(tasks)
        phone.reset(task, seed + i)
        for _ in range(25):
            yield phone, task
            perform(phone, oracle(phone, task) if rng.random() < .15 else anything(phone, task, rng))

def solve(phone, task, seed, horizon=20):
    phone.reset(task, seed)
    for _ in range(horizon):
        if judge(phone, task): break
        perform(phone, parse(render(oracle(phone, task))))
    return judge(phone, task)

@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_task_is_solved_without_disturbance(split):
    phone = SimPhone(disturbance=0)
    assert all(solve(phone, task, i) for i, task in enumerate(load("webshop", split)))

@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_tasks_are_solved_under_disturbance(split):
    phone, tasks = SimPhone(), load("webshop", split)
    assert sum(solve(phone, task, i) for i, task in enumerate(tasks)) >= .98 * len(tasks)

def test_the_oracle_is_never_lost_and_its_ruler_is_exact():
    "From wherever a user got to, each step of the oracle brings the goal exactly one step nearer."
    for phone, task in wandering(60, 1):
        here = distance(phone, task)
        assert here <= 14
        if here:
            copy = phone.fork().reseed(None)
            perform(copy, parse(render(oracle(copy, task))))
            assert distance(copy, task) == here - 1

def test_states_are_json_and_screens_a_function_of_them():
    for i, (phone, task) in enumerate(wandering(12, 2)):
        state = phone.state()
        assert json.loads(json.dumps(state)) == phone.now and not diff(state, phone.snapshot())
        if i % 5: continue
        other = SimPhone()
        other.restore(state)
        assert other.screenshot().tobytes() == phone.screenshot().tobytes() and other.dump() == phone.dump()

def test_what_is_listed_as_clickable_is_hit():
    for i, (phone, task) in enumerate(wandering(12, 3)):
        for e in phone.elements() if i % 3 == 0 else []:
            y0, x0, y1, x1 = e.box
            assert 0 <= y0 <= y1 <= 1 and 0 <= x0 <= x1 <= 1
            node = ui.hit(phone.screen().root, (x0 + x1) / 2 * ui.SIZE[0], (y0 + y1) / 2 * ui.SIZE[1])
            if e.clickable: assert node is not None and (node.on == e.on or e.role in ("tab card", "banner")), e

SCRIPT = """
import hashlib
from digiq.phone import SimPhone, oracle
from digiq.env import perform
from digiq.tasks import load
h = hashlib.sha256()
for i, task in enumerate(load("webshop", "test")[:6]):
    phone = SimPhone()
    phone.reset(task, i)
    while not phone.judge(task):
        perform(phone, oracle(phone, task))
        h.update(phone.screenshot().tobytes() + phone.dump().encode())
print(h.hexdigest())
"""

def test_pictures_are_the_same_in_every_process():
    run = lambda seed: subprocess.run([sys.executable, "-c", SCRIPT], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout
    assert run("1") == run("2")
