"""Over all apps and templates that are registered: solved, judged, refused; screens, states and copies of users without a plan.

Every chapter checks its own templates; DIGIQ_WHOLE=1 checks them again, with 200 users each, and takes a million actions of the
monkey."""
import json, os, random, re
from itertools import islice

import pytest
from digiq import actions as A
from digiq.env import perform
from digiq.phone import SimPhone, distance, oracle, ui
from digiq.phone.apps import APPS
from digiq.phone.device import diff
from digiq.phone.general import SIZES, check_template, monkey, solve, tasks, wander
from digiq.phone.templates import beginning, changes, templates
from digiq.tasks import load
from notebooks import cells, library

WHOLE = "DIGIQ_WHOLE" in os.environ
USERS, STEPS = 400 if WHOLE else 40, 25 # episodes of users without a plan, and their steps


def some(of, n, seed=0):
    "A few, always the same ones; or all."
    return of if WHOLE or n >= len(of) else random.Random(seed).sample(of, n)


def wandering(seed, disturbance=1.):
    "Phones in the middle of aimless episodes, which begin in every app in turn."
    rng, phone, apps = random.Random(seed), SimPhone(disturbance=disturbance), [a for a in APPS if a not in ("launcher", "browser")]
    pool = [t for s in SIZES for t in load("general", s)]
    for i in range(USERS):
        task = rng.choice(pool)
        phone.reset(task, seed + i)
        phone.put(phone.with_app(apps[i % len(apps)]))
        for _ in range(STEPS):
            yield phone, task
            if rng.random() < .1 and not phone.judge(task): perform(phone, oracle(phone, task))
            else: wander(phone, rng)


def test_every_template_is_checked_by_a_chapter():
    checked = re.findall(r'check_template\("(.+?)"\)', "\n".join(cell.source for path in library for cell in cells(path)))
    assert {t.name for t in templates()} <= set(checked)


@pytest.mark.parametrize("template", templates() if WHOLE else [], ids=lambda t: t.name)
def test_template(template): check_template(template.name, users=200)


@pytest.mark.parametrize("split", SIZES)
def test_every_task_of_a_split_is_solved(split):
    calm, rough, asked = SimPhone(disturbance=0), SimPhone(), some(tasks(split), 50)
    assert [t.goal for t in asked if solve(calm, t, 1) is None] == []
    assert sum(solve(rough, t, i) is not None for i, t in enumerate(asked)) >= .98 * len(asked)


def test_goals_are_complete_sentences_and_differ():
    for split in SIZES:
        goals = [t.goal for t in tasks(split)]
        assert len(set(goals)) == len(goals)
        assert not any("{" in g or "  " in g or g != g.strip() for g in goals)


def test_states_are_json_and_screens_a_function_of_them():
    for i, (phone, task) in enumerate(wandering(2)):
        state = phone.state()
        assert json.loads(json.dumps(state)) == phone.now and not diff(state, phone.snapshot())
        if i % 9: continue
        other = SimPhone()
        other.restore(state)
        assert other.screenshot().tobytes() == phone.screenshot().tobytes() and other.dump() == phone.dump()


def test_home_leads_home_and_what_was_there_at_first_is_unchanged():
    for phone, task in wandering(3):
        start, before = beginning(task), json.dumps(beginning(task))
        copy = phone.fork()
        copy.press("home")
        assert copy.now["app"] == "launcher" and copy.data == phone.data
        assert json.dumps(start) == before and (phone.data != start or not changes(start, phone.data))


def test_what_is_listed_as_clickable_is_hit():
    for i, (phone, task) in enumerate(wandering(4)):
        for e in phone.elements() if i % 3 == 0 and phone.now["app"] != "browser" else []:
            y0, x0, y1, x1 = e.box
            assert 0 <= y0 <= y1 <= 1 and 0 <= x0 <= x1 <= 1
            node = ui.hit(phone.screen().root, (x0 + x1) / 2 * ui.SIZE[0], (y0 + y1) / 2 * ui.SIZE[1])
            if e.clickable: assert node is not None and node.on == e.on, (phone.now["app"], e)


def test_the_oracle_brings_the_goal_one_step_nearer():
    for phone, task in islice(wandering(5), 0, None, 7):
        here = distance(phone, task)
        if not 0 < here < 30: continue # damage that cannot be undone is out of reach
        copy = phone.fork().reseed(None)
        perform(copy, oracle(copy, task))
        assert distance(copy, task) == here - 1, (task.goal, phone.now["apps"].get(phone.now["app"]))


def test_the_oracle_knows_a_way_from_anywhere():
    for phone, task in wandering(6):
        if not phone.judge(task): A.render(oracle(phone, task))


def test_random_actions_do_no_harm():
    seen = monkey(1_000_000 if WHOLE else 2_000)
    assert len({app for app, page in seen}) > 12
