"Pickles that would like to run something, a page of traces in a browser, and exports that are killed."
import gzip, json, os, pickle, random, shutil, signal
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest
from PIL import Image

from digiq.__main__ import main
from digiq.actions import complete, render, swipe, tap
from digiq.core import DataError
from digiq.data import EpisodeStore
from digiq.env import prompt
from digiq.exchange import android_world, export, minari, web
from digiq.exchange.importing import read_episode

chromium = shutil.which("chromium") or shutil.which("chromium-browser")
if not chromium and os.environ.get("DIGIQ_CI"): raise RuntimeError("Chromium is missing: apt-get install chromium")
in_browser = pytest.mark.skipif(not chromium, reason="Chromium is missing: apt-get install chromium")
HOSTILE = "</script><img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
ACTIONS = [render(tap(.25, .5)), render(swipe(.8, .5, .2, .5)), "tap <b>it!", render(complete())]


class Evil:
    "Runs something when it is unpickled."
    def __init__(self, call, *args): self.how = call, args
    def __reduce__(self): return self.how


class Object:
    "A class of ours, which no file of AndroidWorld has."


def rows(episode, won, goal="Find a lamp"):
    "An episode of all kinds of actions."
    last = len(ACTIONS) - 1
    return [dict(episode=episode, step=i, task_id=f"task-{episode}", goal=goal, level=1, prompt=prompt(goal, ""), previous="",
                 screen=Image.new("RGB", (90, 160), (i*30, 90, 160)), action=a, reward=float(won and i == last), terminated=won and i == last,
                 truncated=not won and i == last, error="no action" if a.startswith("tap") else "", seed=0) for i, a in enumerate([*ACTIONS, ""])]


@pytest.fixture
def run(tmp_path):
    "A run's directory with two episodes, whose goals are hostile."
    store = EpisodeStore(tmp_path/"run"/"episodes")
    store.write_shard(0, rows(0, True, f"Find {HOSTILE}"))
    store.write_shard(1, rows(1, False, "Buy a \u2028 teapot & <b>"))
    return tmp_path/"run"


def packed(path, episodes, **kwargs):
    "A file as AndroidWorld writes it."
    path.write_bytes(gzip.compress(pickle.dumps(episodes, **kwargs)))
    return path


def plain_episode():
    steps = dict(raw_screenshot=[np.zeros((8, 6, 3), np.uint8)], step_number=[0], summary=["Done."],
                 action_output=['Reason: .\nAction: {"action_type": "status", "goal_status": "complete"}'])
    return dict(goal="Go", task_template="Wifi", instance_id=0, is_successful=1., episode_data=steps, exception_info=None)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("thing", [Evil(os.system, "touch {}/ran"), Evil(eval, "open('{}/ran', 'w')"), Object(), Evil(getattr, "{}", "format"), Evil(__import__, "this")],
                         ids=["system", "eval", "object", "getattr", "import"])
def test_hostile_pickles_are_refused_by_name(tmp_path, protocol, thing):
    if isinstance(thing, Evil): thing = Evil(thing.how[0], *(a.format(tmp_path) for a in thing.how[1]))
    for hidden in (thing, plain_episode() | dict(aux_data={"a": (thing,)}), [np.array([thing], object)]):
        with pytest.raises(DataError, match="refused") as error: android_world.load(packed(tmp_path/"a.pkl.gz", [hidden], protocol=protocol))
        assert "\n" not in str(error.value)
    assert not (tmp_path/"ran").exists()


def test_packages_that_are_passed_over_are_not_called(tmp_path):
    "Functions of a client library are as little called as those of others."
    calls = (b"crequests.api\nget\n(Vhttp://127.0.0.1:9/\ntR.", b"ccollections\nnamedtuple\n(VA\nVx\ntR.", b"chttp.server\ntest\n)R.", b"\x80\x04crequests\nsessions.Session\n)}\x92.")
    for code in calls:
        (tmp_path/"p").write_bytes(code)
        assert type(android_world.ForeignMachine(tmp_path/"p").value()) is android_world.Foreign


def test_damaged_pickles_are_refused_in_words(tmp_path):
    "Whatever bytes change: an episode, or a reason in one line."
    draw, whole = random.Random(0), pickle.dumps([plain_episode()])
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 3))): data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path/"p").write_bytes(data[:draw.choice((len(data), draw.randrange(len(data))))])
        try: found = android_world.ForeignMachine(tmp_path/"p").value()
        except DataError as e: assert "\n" not in str(e)
        else:
            if isinstance(found, list) and all(isinstance(e, dict) for e in found):
                for e in found: read_episode(0, "p", partial(android_world.episode_of, "p", e), "android-world")


@pytest.mark.parametrize("action", ['{"action_type": ["click"]}', '{"action_type": "scroll", "direction": {}}', '{"action_type": "click", "index": 1e400}', '{"action_type": "click", "x": NaN, "y": 1}',
    '{"action_type": "status", "goal_status": []}', '{"action_type": "click", "x": 1' + "0"*400 + ', "y": 1}', "[" * 9999, '{"a": ' * 9999, '{"action_type": "input_text"}', '{"action_type": "click", "index": "7"}',
    '{"action_type": "open_app", "app_name": [1]}', '{"action_type": "long_press", "x": {}, "y": 1}', '{"action_type": "long_press"}'])
def test_answers_that_mean_nothing_are_kept_as_text(action):
    episode = plain_episode()
    episode["episode_data"] |= dict(raw_screenshot=[None], action_output=[f"Reason: .\nAction: {action}"])
    found = android_world.episode_of("a", episode).steps[0]
    assert isinstance(found.action, str) and found.odd or action == '{"action_type": "input_text"}'


def test_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(android_world, "MOST", 1 << 20)
    (tmp_path/"a.pkl.gz").write_bytes(gzip.compress(bytes(3 << 20)))
    with pytest.raises(DataError, match="unpacked: it is refused"): android_world.load(tmp_path/"a.pkl.gz")


def test_command_line(run, tmp_path, capsys):
    "Every kind by its command; what is written can be read."
    from fastcore.xtras import modified_env
    import minari as library
    for kind, *more in (("web",), ("llama-factory", "--which", "successful"), ("verl",), ("minari", "--name", "digiq/a/b-v0", "--screen", "30x50")):
        with pytest.raises(SystemExit) as end: main(["export", kind, str(run), str(tmp_path/kind), *more])
        assert end.value.code == 0, capsys.readouterr()
    assert "left out: 2 steps with a malformed action" in capsys.readouterr().out
    assert len(json.loads((tmp_path/"llama-factory"/"digiq.json").read_text())) == 3
    with modified_env(MINARI_DATASETS_PATH=str(tmp_path/"minari")): assert library.load_dataset("digiq/a/b-v0")[1].observations["screen"].shape == (5, 50, 30, 3)
    packed(tmp_path/"Wifi_0.pkl.gz", [plain_episode()])
    with pytest.raises(SystemExit) as end: main(["convert", "android-world", str(tmp_path/"Wifi_0.pkl.gz"), str(tmp_path/"taken"), "--marked"])
    assert end.value.code == 0 and len(export.open_store(tmp_path/"taken")) == 1
    with pytest.raises(SystemExit) as end: main(["export", "web", str(run), str(tmp_path/"web")])
    assert "is not overwritten" in end.value.code


def killed_at(n, module, name):
    "The process is killed when a function is called for the n-th time."
    original, calls = getattr(module, name), []
    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == n: os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(module, name, dying)


@pytest.mark.parametrize("write, out, module, name", [
    (web.to_web, "page", web, "save_picture"), (export.to_llama_factory, "llama", export, "save_picture"),
    (export.to_verl, "verl", export, "_verl_row"), (minari.to_minari, "digiq/phone/episodes-v0", minari, "_pixels")], ids=["web", "llama-factory", "verl", "minari"])
def test_killed_exports_leave_nothing_under_the_final_name(run, tmp_path, write, out, module, name):
    store, where = export.open_store(run), tmp_path if write is minari.to_minari else tmp_path/out
    def work():
        killed_at(4, module, name)
        write(store, where)
    process = get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path/out).exists()
    write(store, where)
    assert (tmp_path/out).is_dir() and not [p for p in (tmp_path/out).parent.iterdir() if p.name.endswith(".partial")]


@in_browser
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (380, "dark")])
def test_page_of_traces_opens_from_disk(run, tmp_path, width, scheme):
    "Screens, marks and filters; goals are text, and nothing but files is asked for."
    from playwright.sync_api import expect, sync_playwright
    out = tmp_path/"a page <b>'#1"
    web.to_web(export.open_store(run), out, name=HOSTILE)
    with sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = chrome.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
        page.set_default_timeout(120_000)
        expect.set_options(timeout=120_000)
        asked, errors = [], []
        page.on("request", lambda r: asked.append(r.url))
        page.on("console", lambda m: errors.append(m.text))
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.goto((out/"index.html").as_uri())
        expect(page.locator(".film").first.locator("svg")).to_have_count(2) # a tap and a swipe
        expect(page.locator("article")).to_have_count(2)
        assert page.locator("h2").first.inner_text() == f"Find {HOSTILE}" and page.evaluate("window.hacked === undefined")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ring, screen = (page.locator(f".film >> nth=0 >> {what} >> nth=0").bounding_box() for what in ("circle", "img"))
        assert abs(ring["x"] + ring["width"]/2 - screen["x"] - .5*screen["width"]) < 2
        assert abs(ring["y"] + ring["height"]/2 - screen["y"] - .25*screen["height"]) < 2
        back = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
        assert back < 60 if scheme == "dark" else back > 200
        page.select_option("#outcome", "true")
        expect(page.locator("#count")).to_have_text("1 of 2 episodes, 1 successful")
        page.select_option("#outcome", "")
        page.fill("#words", "TEAPOT")
        expect(page.locator("article:visible")).to_have_count(1)
        page.locator("article:visible .step button").nth(2).click()
        expect(page.locator("dialog .what")).to_have_text("malformed: tap <b>it!")
        page.keyboard.press("ArrowRight")
        expect(page.locator("dialog .what")).to_have_text("say that the task is complete")
        page.keyboard.press("Escape")
        expect(page.locator("dialog")).to_be_hidden()
        assert not errors and all(url.startswith("file:") for url in asked), (errors, asked)
        chrome.close()
