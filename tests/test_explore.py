"The explorers: in a real browser, in Voila and in JupyterLab; on a run that is being written; over adb. $DIGIQ_SCREENSHOTS is where pictures and times go, $DIGIQ_RUN a run of the smoke preset, if there is one."
import asyncio, json, os, secrets, shutil, signal, socket, subprocess, sys, time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pytest
from adbutils import AdbClient
from digiq.actions import render, swipe, tap, type_text
from digiq.play.adb import AdbDevice, AdbSettings, ask_phone
from digiq.play.adbd import Adbd, adb_server
from digiq.play.android import Android
from digiq.env import perform
from digiq.explore import ActionExplorer, LivePhone, TrajectoryExplorer
from digiq.explore.run import RunView
from digiq.phone import SimPhone, oracle
from digiq.runs import load_preset, open_run
from digiq.runs.plots import fixed
from notebooks import root

chromium = shutil.which("chromium") or shutil.which("chromium-browser")
if not chromium and os.environ.get("DIGIQ_CI"): raise RuntimeError("Chromium is missing: apt-get install chromium")
in_browser = pytest.mark.skipif(not chromium, reason="Chromium is missing: apt-get install chromium")
WAIT = 120_000 # ms, on a busy machine
PRESSED = 60 # ms that a finger stays on the button
HOSTILE = "<img src=x onerror='window.hacked=1'>"


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    "A small run with everything, made once, or a copy of one that is there. Its name is hostile, too."
    path = tmp_path_factory.mktemp("explore")/"a run <b>'\" #1"
    if os.environ.get("DIGIQ_RUN"): return Path(shutil.copytree(os.environ["DIGIQ_RUN"], path))
    lab = open_run(path, load_preset("smoke"))
    lab.collect(), lab.featurise(), lab.propose(), lab.finetune(), lab.embed(), lab.train_critic(), lab.score()
    for agent in ("behaviour", "behaviour_rerank"): lab.evaluate(agent)
    return path


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(command, log, **kwargs):
    with open(log, "w") as f:
        process = subprocess.Popen(command, stdout=f, stderr=f, start_new_session=True, **kwargs)
        try: yield process
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try: process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Show:
    "A page of a browser; `times` is how long things took, in ms, from an input to the frame that shows its result, by the page's own clock."
    def __init__(self, page, name): self.page, self.name, self.times, self.outside = page, name, {}, []

    async def local(self, route): # nothing may be fetched from elsewhere
        here = route.request.url.startswith(("http://127.0.0.1:", "data:", "blob:"))
        if not here: self.outside.append(route.request.url)
        await (route.continue_() if here else route.abort())

    def part(self, title): return self.page.locator(f".dq[aria-label='{title}']")

    async def bring(self, title): # into sight, as a reader has it before touching it
        await self.part(title).first.evaluate("e => e.scrollIntoView({block: 'start'})")
        await self.page.wait_for_timeout(300)
        return self.part(title)

    async def until(self, what, script): # script: of `e`, the explorer's element. How long after the last input that reached the page did a frame show it?
        title, _, what = what.partition(": ")
        try: seen = await self.page.wait_for_function(f"(() => {{ const e = document.querySelector(`.dq[aria-label='{title}']`); return e && ({script}) && {{ms: performance.now() - window.began}}; }})()", polling="raf")
        except Exception as e: raise AssertionError(f"{title}, {what}: {script}; it shows {(await self.part(title).first.inner_text())[-1500:]!r}") from e
        self.times[f"{title}: {what}"] = round((await seen.json_value())["ms"])

    async def took(self, what, do, script): # do something, and wait for its result
        await self.page.evaluate("window.began = null")
        await do
        await self.until(what, script)

    async def picture(self, name):
        if folder := os.environ.get("DIGIQ_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            await self.page.screenshot(path=f"{folder}/{name}-{self.name}.png")
            Path(folder, f"times-{self.name}.json").write_text(json.dumps(self.times, indent=1))


@asynccontextmanager
async def show(url, name, width=1300, height=1000):
    from playwright.async_api import async_playwright
    async with async_playwright() as p:
        chrome = await p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"])
        page = await chrome.new_page(viewport=dict(width=width, height=height))
        page.set_default_timeout(WAIT)
        it = Show(page, name)
        await page.route("**/*", it.local)
        page.on("console", lambda m: it.outside.append(m.text) if "Content Security Policy" in m.text else None) # nor asked for
        await page.add_init_script("for (const kind of ['pointerup', 'keydown', 'input']) addEventListener(kind, e => { window.began = e.timeStamp; }, true)")
        for _ in range(240):
            try: await page.goto(url); break
            except Exception: await asyncio.sleep(.5)
        try: yield it
        except Exception:
            await it.picture("failed")
            raise
        print(name, json.dumps(it.times, indent=1))
        assert not it.outside, it.outside
        assert not await page.evaluate("window.hacked"), "text was read as HTML"
        assert not await page.evaluate("[...document.querySelectorAll('.dq input, .dq select, .dq button, .dq svg[tabindex]')].filter(e => !(e.closest('label') || e.getAttribute('aria-label') || e.textContent.trim())).length"), "every control has a label"
        await chrome.close()


def long_pair(view):
    "The first of two neighbouring episodes with four steps or more."
    n = view.episodes().steps.tolist()
    return next(e for e in range(1, len(n) - 1) if min(n[e:e + 2]) >= 4)


async def first_sight(it, view):
    "It opens on the episode that teaches most, and the step is in sight."
    part, (episode, step) = await it.bring("Trajectory explorer"), view.opening()
    await it.page.wait_for_selector(f".film[data-episode='{episode}'] .frame:nth-child({step + 1})[aria-current=true]")
    assert await part.locator(".facts b").nth(1).inner_text() == fixed(view.values("episodes", episode)[1][step])
    assert await part.locator(".list [aria-current=true]").get_attribute("data-key") == str(episode)
    frame, film = [await part.locator(s).bounding_box() for s in (".frame[aria-current=true]", ".film")]
    assert film["x"] <= frame["x"] and frame["x"] + frame["width"] <= film["x"] + film["width"] + 1
    await it.picture("first_sight")


async def trajectory(it, view, e):
    part, shown = await it.bring("Trajectory explorer"), "e.querySelector('.film').dataset.episode"
    await it.took("Trajectory explorer: choose an episode", part.locator(f".list button:nth-child({e + 1})").click(delay=PRESSED), f"{shown} === '{e}'")
    assert await part.locator(".frame").count() == len(view.steps("episodes", e))
    chosen = lambda k: f"e.querySelectorAll('.frame')[{k}].getAttribute('aria-current') === 'true'"
    await it.took("Trajectory explorer: choose a step", part.locator(".frame:nth-child(2)").click(delay=PRESSED), chosen(1))
    await it.until("Trajectory explorer: value of the step", f"e.querySelectorAll('.facts b')[1].innerText === '{fixed(view.values('episodes', e)[1][1])}'")
    if await it.part("Action explorer").count(): await it.until("Action explorer: follows", f"e.querySelector('[data-state]').dataset.state === '{e}/1'") # what follows before that may be undone
    await it.took("Trajectory explorer: next step by key", it.page.keyboard.press("ArrowRight"), chosen(2))
    v = view.values("episodes", e)[1][2]
    await it.until("Trajectory explorer: value of the next step", f"e.querySelectorAll('.facts b')[1].innerText === '{fixed(v)}'")
    await it.took("Trajectory explorer: next episode by key", it.page.keyboard.press("ArrowDown"), f"{shown} === '{e + 1}'")
    await part.locator("input[type=search]").fill(HOSTILE)
    assert await part.locator(".list button").count() == 0
    await part.locator("input[type=search]").fill("")
    for step in (1, 2):
        await part.locator(f".frame:nth-child({step + 1})").click(delay=PRESSED)
        if await it.part("Action explorer").count(): await it.until("Action explorer: follows", f"e.querySelector('[data-state]').dataset.state === '{e + 1}/{step}'")


async def actions(it, view, e):
    await it.until("Action explorer: there", f"e.querySelector('[data-state]').dataset.state === '{e}/2'")
    part = (await it.bring("Action explorer")).first
    found, rows = view.candidates("episodes", e, 2)[0], part.locator("tbody tr")
    assert await rows.count() == len(found)
    place = await rows.first.get_attribute("data-candidate")
    await it.page.mouse.move(0, 0) # a row under the pointer is lit, too
    await rows.first.focus()
    assert await part.locator("tr.on").get_attribute("data-candidate") == place
    await rows.first.click()
    taps = found[found.words.str.startswith("tap")]
    if len(taps): assert await part.locator(".screen .mark").count() >= len(taps)
    await it.took("Action explorer: next step", part.locator("[aria-label='next step']").click(delay=PRESSED), f"e.querySelector('[data-state]').dataset.state === '{e}/3'")


async def field(it, view, e):
    part, judged = await it.bring("Field of Q"), "e.querySelectorAll('table td:first-child').length"
    await it.until("Field of Q: all coarse taps", "+e.querySelector('canvas')?.dataset.judged >= 180")
    box = await part.locator(".screen .over").bounding_box()
    click = lambda x, y: it.page.mouse.click(box["x"] + box["width"]*x, box["y"] + box["height"]*y)
    await it.took("Field of Q: judge a tap while the field is computed", click(.5, .25), f"{judged} === 1")
    await it.until("Field of Q: fine taps", "e.querySelector('canvas').dataset.done === 'true'")
    await it.took("Field of Q: judge a tap", click(.3, .3), f"{judged} === 2")
    before = await part.locator("tbody").inner_text()
    await part.locator("[aria-label='text to type']").fill(HOSTILE)
    await it.took("Field of Q: judge a typed text", it.page.keyboard.press("Enter"), f"{judged} === 3")
    goal = f"Go to {HOSTILE}"
    await it.took("Field of Q: another goal", part.locator("label input[type=text]").first.fill(goal), f"e.querySelector('canvas').dataset.goal === {json.dumps(goal)}")
    after = await part.locator("tbody").inner_text()
    assert HOSTILE in after and before not in after
    q = view.combine(view.score(view.state("episodes", e, 3), [render(type_text(HOSTILE))], goal)[0])[0]
    said = await part.locator("tbody tr:first-child td:nth-child(4)").inner_text()
    assert abs(float(said.replace("−", "-").lstrip("<> ")) - q) < max(.001, .05*abs(q)), (said, q)
    await it.took("Field of Q: back to the recorded goal", part.locator("button:has-text('Back to the recorded goal')").click(delay=PRESSED), f"e.querySelector('canvas').dataset.goal === {json.dumps(view.state('episodes', e, 3).goal)}")


async def live(it, view):
    "Play an episode to its end, as the oracle would, by mouse and keyboard."
    part, taken = await it.bring("Live phone"), len(view.store("demonstrations")) if "demonstrations" in view.sets() else 0
    phone, task = SimPhone(disturbance=view.lab.preset.disturbance), view.lab.tasks("test")[0]
    phone.reset(task, 0)
    await it.until("Live phone: first advice", "e.dataset.advice === '0'")
    for step in range(40):
        if await part.get_attribute("data-running") == "false": break
        action = oracle(phone, task)
        if action.is_tap or action.is_swipe:
            box = await part.locator(".screen.live .over").bounding_box()
            at = lambda p: (box["x"] + p[1]*box["width"], box["y"] + p[0]*box["height"])
            await it.page.mouse.move(*at(action.touch)); await it.page.mouse.down()
            await it.page.mouse.move(*at(action.lift))
            do = it.page.mouse.up()
        elif action.kind == "TYPE":
            await part.locator("[aria-label='text to type']").fill(action.text)
            do = it.page.keyboard.press("Enter")
        else: do = part.locator(f"button:has-text('{action.kind.removeprefix('PRESS_').lower()}')").click(delay=PRESSED)
        await it.took(f"Live phone: {action.kind.lower()} {step}", do, f"+e.dataset.step === {step + 1}")
        perform(phone, action)
    assert await part.get_attribute("data-reward") == "1"
    assert len(view.store("demonstrations")) == taken + 1


async def compare(it):
    part = await it.bring("Compare agents")
    await it.until("Compare agents: screens of the first pair", "e.querySelector('[data-screens=\"0\"]')")
    last = await part.locator(".list button").count() - 1
    for what, k in (("the next pair", 1), ("a pair further down", last)):
        await it.took(f"Compare agents: {what}", part.locator(".list button").nth(k).click(delay=PRESSED), f"e.querySelector('[data-chosen=\"{k}\"] .frame')")
        await it.until(f"Compare agents: screens of {what}", f"e.querySelector('[data-screens=\"{k}\"]')")


async def diagnostics(it):
    part = await it.bring("Diagnostics")
    await it.until("Diagnostics: first figure", "e.querySelector('.card img')")
    for name in ("Map of f(s, a)", "ROC of V"):
        there = f"e.querySelector('[data-name={json.dumps(name)}]')"
        await it.took(f"Diagnostics: {name}, answer", part.locator(f"[role=tab]:has-text('{name}')").click(delay=PRESSED), there)
        await it.until(f"Diagnostics: {name}, drawn", f"{there}?.querySelector('img')")


async def see_all(url, view, name, width):
    e = long_pair(view)
    async with show(url, name, width) as it:
        async def tab(title, explorer, selector):
            await it.took(f"{explorer}: first picture", it.page.click(f".lm-TabBar-tab:has-text('{title}')", delay=PRESSED), f"e.querySelector('{selector}')")
        await it.page.wait_for_selector(".dq .frame")
        await first_sight(it, view)
        await trajectory(it, view, e)
        await it.picture("trajectory")
        await tab("Actions", "Action explorer", "tbody tr")
        await actions(it, view, e + 1)
        await it.picture("actions")
        await tab("Field of Q", "Field of Q", "canvas[data-judged]")
        await field(it, view, e + 1)
        await it.picture("field")
        await tab("Live phone", "Live phone", ".screen.live .over")
        await it.until("Live phone: first advice", "e.dataset.advice === '0'")
        await it.picture("live")
        await live(it, view)
        await tab("Compare", "Compare agents", ".frame")
        await compare(it)
        await it.picture("compare")
        await tab("Diagnostics", "Diagnostics", "[data-name]")
        await diagnostics(it)
        await it.picture("diagnostics")
        assert await it.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing is cut off at the right"


@in_browser
@pytest.mark.parametrize("theme, width", [("light", 1600), ("dark", 900)])
def test_voila(run_dir, tmp_path, theme, width):
    number, log = port(), tmp_path/"log"
    with server([sys.executable, "-u", "-m", "digiq", "explore", str(run_dir), "--no-browser", "--port", str(number), "--theme", theme], log):
        while "token=" not in log.read_text(): time.sleep(.2)
        url = next(line for line in log.read_text().splitlines() if "token=" in line).strip()
        asyncio.run(see_all(url, RunView(run_dir), f"voila-{theme}-{width}", width))


MANY = """import numpy as np
from digiq.actions import press, render, swipe, tap, type_text
rng = np.random.default_rng(0)
many = [tap(*rng.random(2)) for _ in range(52)] + [swipe(*rng.random(4)) for _ in range(8)] + [press("back"), press("home"), type_text("<b>lamp</b>"), type_text("a long text " * 9)]
other = RunView(run.path) # of its own: what it proposes is nothing to the other explorers
other.proposed = lambda *where: [*map(render, many)]
ActionExplorer(other, set=[s for s in other.sets() if s.startswith("evaluations")][0])"""


async def run_notebook(url, view):
    "The first explorers on a wide page in dark colours, the others on a narrow one in light colours."
    e = long_pair(view)
    async with show(url, "dark-1600", 1600) as it:
        page = it.page
        await page.wait_for_selector(".jp-Notebook .jp-Cell")
        await page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.connectionStatus === 'connected'") # before that, it runs nothing
        await page.wait_for_function("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'")
        await page.wait_for_timeout(5000) # JupyterLab asks a new kernel for widgets that it may have, for up to four seconds; answers that come later may undo what is chosen
        await page.click(".lm-MenuBar-itemLabel:text-is('Run')")
        await page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
        await page.wait_for_selector(".jp-RenderedImage img >> nth=2", state="attached")
        await page.wait_for_selector(".dq >> nth=6", state="attached")
        found = await page.evaluate("[...document.querySelectorAll('.dq')].map(e => e.getAttribute('aria-label'))")
        assert found == ["Trajectory explorer", "Action explorer", "Field of Q", "Live phone", "Compare agents", "Diagnostics", "Action explorer"]
        assert await it.part("Action explorer").nth(1).locator("tbody tr").count() == 64
        for drawn in (".dq[aria-label='Field of Q'] [data-done=true]", ".dq[aria-label='Diagnostics'] img"): await page.wait_for_selector(drawn, state="attached") # it has come to rest
        await page.wait_for_function("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'")
        await trajectory(it, view, e)
        await actions(it, view, e + 1)
        await field(it, view, e + 1)
        await it.picture("jupyterlab")
        it.name, it.times = "light-900", {}
        await page.set_viewport_size(dict(width=900, height=1000))
        await page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})")
        await page.wait_for_selector("body[data-jp-theme-light=true]", state="attached")
        await live(it, view)
        await compare(it)
        await diagnostics(it)
        await it.picture("jupyterlab")


@in_browser
def test_jupyterlab(run_dir, tmp_path):
    "nbs/explore.ipynb, all cells, and one of 64 candidates: the explorers follow each other, and JupyterLab's own keys stay out."
    nb = nbformat.read(root/"nbs"/"explore.ipynb", 4)
    cell = next(c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = cell.source.replace('"papermill_runs/train"', repr(str(run_dir.resolve())))
    nb.cells.append(nbformat.v4.new_code_cell(MANY))
    for c in nb.cells:
        if c.cell_type == "code": c.outputs = []
    nbformat.write(nb, tmp_path/"explore.ipynb")
    for name, value in {"apputils-extension/themes": dict(theme="JupyterLab Dark"), "apputils-extension/notification": dict(fetchNews="false"), "notebook-extension/tracker": dict(windowingMode="none")}.items(): # cells that are out of sight are drawn, too
        file = tmp_path/"settings"/"@jupyterlab"/f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    number, token = port(), secrets.token_urlsafe()
    command = [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={number}", f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={tmp_path}", "--LabApp.news_url=None", "--LabApp.expose_app_in_browser=True", f"--LabApp.user_settings_dir={tmp_path/'settings'}",
        f"--LabApp.workspaces_dir={tmp_path/'workspaces'}"] # or it opens as it was left, in a window of another width
    with server(command, tmp_path/"log", cwd=tmp_path):
        asyncio.run(run_notebook(f"http://127.0.0.1:{number}/lab/tree/explore.ipynb?token={token}", RunView(run_dir)))


def test_a_run_that_is_being_written(tmp_path):
    "An explorer opens as soon as there is an episode, says what is missing, and finds the rest later."
    make = "import sys; from digiq.runs import load_preset, open_run; lab = open_run(sys.argv[1], load_preset('smoke', collection=dict(shard=8))); lab.collect(); lab.featurise(); lab.propose(); lab.finetune()"
    writer = subprocess.Popen([sys.executable, "-c", make, str(tmp_path/"run")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not any((tmp_path/"run"/"episodes").glob("00000*.parquet")): # two processes write: the second shard may come first
            assert writer.poll() is None
            time.sleep(.02)
        explorer = TrajectoryExplorer(tmp_path/"run")
        early = len(explorer.rows)
        assert 0 < early < 40 and "episodes is still being written" in explorer.note and "no finished stage critic" in explorer.note
        assert ActionExplorer(explorer.run).state["rows"]
        log, seen = tmp_path/"run"/"logs"/"representation.jsonl", set()
        while writer.poll() is None: # the curve grows
            if log.exists() and explorer.run.lab.curves(): seen.add(len(explorer.run.lab.curves()["representation"]))
            time.sleep(.02)
        assert writer.returncode == 0 and len(seen) > 2 and max(seen) == 20
    finally: writer.kill(), writer.wait()
    explorer.do_refresh()
    assert len(explorer.rows) == 40 and "still being written" not in explorer.note


def test_many_candidates(run_dir):
    "64 and more, on a state whose candidates nobody has embedded."
    view, rng = RunView(run_dir), np.random.default_rng(0)
    many = [render(a) for a in [tap(*rng.random(2)) for _ in range(60)] + [swipe(*rng.random(4)) for _ in range(12)] + [type_text(HOSTILE)]]
    view.proposed = lambda *where: many
    explorer = ActionExplorer(view, set=next(s for s in view.sets() if s.startswith("evaluations")))
    rows = explorer.state["rows"]
    assert len(rows) == 73 and sum(r["chosen"] for r in rows) == 1 and all(np.isfinite(r["advantage"]) for r in rows)


def test_live_phone_over_adb(tmp_path):
    "The same widget on a phone that is reached by adb."
    adb = shutil.which("adb")
    if not adb:
        if os.environ.get("DIGIQ_CI"): raise RuntimeError("adb is missing: apt-get install adb")
        pytest.skip("adb is missing: apt-get install adb")
    android = Android(SimPhone(disturbance=0))
    with adb_server(adb), Adbd([android]) as served:
        AdbClient().connect(served.addresses[0], timeout=60)
        phone = LivePhone(tmp_path, AdbDevice(served.addresses[0], AdbSettings(settle=0, pause=.01)), ask_phone)
        for _ in range(20):
            if not phone.env.running: break
            a = oracle(android.phone, phone.env.task)
            if a.is_tap: phone.ask({"do": "tap", "y": a.touch[0], "x": a.touch[1]})
            elif a.is_swipe: phone.ask({"do": "swipe", "y": a.touch[0], "x": a.touch[1], "y1": a.lift[0], "x1": a.lift[1]})
            elif a.kind == "TYPE": phone.ask({"do": "type", "text": a.text})
            else: phone.ask({"do": "press", "key": a.kind.removeprefix("PRESS_").lower()})
            assert not phone.note
        assert phone.frame["reward"] == 1 and "Recorded as episode 0" in phone.frame["message"]
    phone.ask({"do": "begin", "task": 0, "seed": 1}) # the phone is gone
    assert served.addresses[0] in phone.note
    steps = RunView(tmp_path).steps("demonstrations", 0)
    assert steps.reward.max() == 1 and steps.action.iloc[-1] == ""
