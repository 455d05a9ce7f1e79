"The explorers in a real browser, in Voila and in JupyterLab. Screenshots go to $DIGIQ_SCREENSHOTS where that is set; how long things took is printed."
import asyncio, json, os, secrets, shutil, signal, socket, subprocess, sys, time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import nbformat
import pytest
from digiq.env import perform
from digiq.explore.run import RunView
from digiq.phone import SimPhone, oracle
from digiq.pipeline import load_preset, open_run
from notebooks import root

chromium = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT = 120_000 # ms, on a busy machine
HOSTILE = "<img src=x onerror='window.hacked=1'>"
pytestmark = pytest.mark.skipif(not (chromium and os.environ.get("DIGIQ_BROWSER")), reason="needs Chromium and minutes: set DIGIQ_BROWSER=1")


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    "A small run with everything, made once; $DIGIQ_RUN names one that is there already."
    if os.environ.get("DIGIQ_RUN"): return Path(os.environ["DIGIQ_RUN"])
    path = tmp_path_factory.mktemp("explore")/"a run <b>'\" #1"
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
        process = subprocess.Popen(command, stdout=f, stderr=f, start_new_session=True, env=dict(os.environ, PYTHONPATH=str(root)), **kwargs)
        try: yield process
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


@asynccontextmanager
async def browser(url, width=1300, height=1000):
    from playwright.async_api import async_playwright
    async with async_playwright() as p:
        chrome = await p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"])
        page = await chrome.new_page(viewport=dict(width=width, height=height))
        page.set_default_timeout(WAIT)
        async def local(route): await (route.continue_() if "//127.0.0.1:" in route.request.url or route.request.url.startswith(("data:", "blob:")) else route.abort())
        await page.route("**/*", local)
        for _ in range(240):
            try: await page.goto(url); break
            except Exception: await asyncio.sleep(.5)
        yield page
        await chrome.close()


async def took(page, what, do, script):
    "Do something, and wait until a script finds its result on the page; prints the time between."
    began = time.perf_counter()
    await do
    await page.wait_for_function(script, polling="raf")
    print(f"{what}: {1000*(time.perf_counter() - began):.0f} ms")


async def picture(page, name):
    if folder := os.environ.get("DIGIQ_SCREENSHOTS"): await page.screenshot(path=f"{folder}/{name}.png")


async def tab(page, name, selector):
    began = time.perf_counter()
    await page.click(f".lm-TabBar-tab:has-text('{name}')")
    await page.wait_for_selector(selector)
    print(f"{name}, first picture: {1000*(time.perf_counter() - began):.0f} ms")


async def see_all(url, view, name, width):
    ended, shown = view.episodes(), "document.querySelector('.film').dataset.episode"
    async with browser(url, width) as page:
        await page.wait_for_selector(".dq .frame")
        await took(page, "choose an episode", page.click(".dq .list button:nth-child(3)"), f"{shown} === '2'")
        assert await page.locator(".dq .frame").count() == len(view.steps("episodes", 2))
        await took(page, "choose a step", page.click(".dq .frame:nth-child(2)"), "document.querySelectorAll('.dq .frame')[1].getAttribute('aria-current') === 'true'")
        await took(page, "next step by key", page.keyboard.press("ArrowRight"), "document.querySelectorAll('.dq .frame')[2].getAttribute('aria-current') === 'true'")
        v = view.values("episodes", 2)[1][2]
        assert f"{v:.3f}" in await page.locator(".dq .facts").first.inner_text()
        await took(page, "next episode by key", page.keyboard.press("ArrowDown"), f"{shown} === '3'")
        await page.fill(".dq input[type=search]", HOSTILE)
        assert await page.locator(".dq .list button").count() == 0
        await page.fill(".dq input[type=search]", "")
        await picture(page, f"trajectory-{name}")

        await tab(page, "Actions", ".dq tbody tr")
        found, _ = view.candidates("episodes", 3, 2)
        rows = page.locator(".dq tbody tr")
        assert await rows.count() == len(found)
        place = await rows.first.get_attribute("data-candidate")
        await rows.first.focus()
        assert await page.locator(".dq tr.on").get_attribute("data-candidate") == place
        await rows.first.click()
        await picture(page, f"actions-{name}")
        await took(page, "next step of candidates", page.click("[aria-label='next step']:visible"), "document.querySelector('[data-state]').dataset.state === '3/3'")

        await tab(page, "Field of Q", "canvas[data-judged]")
        began = time.perf_counter()
        await page.wait_for_function("+document.querySelector('canvas').dataset.judged >= 180")
        print(f"coarse field, after its first piece: {1000*(time.perf_counter() - began):.0f} ms")
        judged = "[...document.querySelectorAll('.phone table td:first-child')].filter(e => e.offsetParent).length"
        box = await page.locator(".screen .over:visible").bounding_box()
        await took(page, "judge a tap", page.mouse.click(box["x"] + box["width"]/2, box["y"] + box["height"]/4), f"{judged} === 1")
        await page.wait_for_function("document.querySelector('canvas').dataset.done === 'true'")
        await took(page, "judge another tap", page.mouse.click(box["x"] + box["width"]/3, box["y"] + box["height"]/3), f"{judged} === 2")
        before = await page.locator(".phone .scroll:visible tbody").inner_text()
        await page.fill("[aria-label='text to type']:visible", HOSTILE)
        await took(page, "judge a typed text", page.keyboard.press("Enter"), f"{judged} === 3")
        goal = f"Go to {HOSTILE}"
        await took(page, "another goal", page.fill(".phone label input[type=text]:visible >> nth=0", goal), f"document.querySelector('canvas').dataset.goal === {json.dumps(goal)}")
        after = await page.locator(".phone .scroll:visible tbody").inner_text()
        assert HOSTILE in after and before not in after
        await picture(page, f"field-{name}")

        await tab(page, "Live phone", ".dq[data-advice]")
        await picture(page, f"live-{name}")
        await play(page, view)

        await tab(page, "Compare", ".dq .frame:visible")
        await took(page, "compare another pair", page.locator(".dq .list:visible button").nth(1).click(), "[...document.querySelectorAll('[data-chosen]')].some(e => e.dataset.chosen === '1')")
        await picture(page, f"compare-{name}")
        await tab(page, "Diagnostics", ".dq .card img:visible")
        for figure in ("ROC of V", "Map of f(s, a)"): await took(page, figure, page.click(f"[role=tab]:has-text('{figure}'):visible"), f"[...document.querySelectorAll('[data-name]')].some(e => e.dataset.name === {json.dumps(figure)} && e.querySelector('img'))")
        await picture(page, f"diagnostics-{name}")
        assert not await page.evaluate("window.hacked"), "text was read as HTML"
        assert not await page.evaluate("[...document.querySelectorAll('.dq input, .dq select, .dq button, .dq svg[tabindex]')].filter(e => !(e.closest('label') || e.getAttribute('aria-label') || e.textContent.trim())).length"), "every control has a label"
        assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing is cut off at the right"


async def play(page, view):
    "Play an episode of the live phone to its end, as the oracle would, by mouse and keyboard."
    where, taken = "[...document.querySelectorAll('.dq[data-step]')].find(e => e.offsetParent)", len(view.store("demonstrations")) if "demonstrations" in view.sets() else 0
    phone, task = SimPhone(disturbance=view.lab.preset.disturbance), view.lab.tasks("test")[0]
    phone.reset(task, 0)

    for step in range(40):
        if await page.evaluate(f"{where}.dataset.running") == "false": break
        action = oracle(phone, task)
        if action.is_tap or action.is_swipe:
            box = await page.locator(".screen.live .over").bounding_box()
            at = lambda p: (box["x"] + p[1]*box["width"], box["y"] + p[0]*box["height"])
            await page.mouse.move(*at(action.touch)); await page.mouse.down()
            await page.mouse.move(*at(action.lift))
            do = page.mouse.up()
        elif action.kind == "TYPE":
            await page.fill(".phone [aria-label='text to type']:visible", action.text)
            do = page.keyboard.press("Enter")
        else: do = page.click(f".phone button:visible:has-text('{action.kind.removeprefix('PRESS_').lower()}')")
        await took(page, f"live {action.kind.lower()}", do, f"+{where}.dataset.step === {step + 1}")
        perform(phone, action)
    assert await page.evaluate(f"{where}.dataset.reward") == "1"
    assert len(view.store("demonstrations")) == taken + 1


@pytest.mark.parametrize("theme, width", [("light", 1600), ("dark", 900)])
def test_voila(run_dir, tmp_path, theme, width):
    number, log = port(), tmp_path/"log"
    with server([sys.executable, "-u", "-m", "digiq.explore", str(run_dir), "--no-browser", "--port", str(number), "--theme", theme], log):
        while "token=" not in log.read_text(): time.sleep(.2)
        url = next(line for line in log.read_text().splitlines() if "token=" in line).strip()
        asyncio.run(see_all(url, RunView(run_dir), f"{theme}-{width}", width))


async def run_notebook(url):
    async with browser(url, 1400, 8000) as page: # cells that are out of sight are not drawn
        await page.wait_for_selector(".jp-Notebook .jp-Cell")
        await page.wait_for_timeout(3000)
        await page.click(".lm-MenuBar-itemLabel:text-is('Run')")
        await page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
        await page.wait_for_selector(".dq .frame")
        await page.wait_for_selector(".jp-RenderedImage img >> nth=1", state="attached")
        found = await page.evaluate("[...document.querySelectorAll('.dq')].map(e => e.querySelector('h3').textContent)")
        await page.locator(".dq .frame").nth(1).click()
        await page.keyboard.press("ArrowRight")
        await page.wait_for_function("document.querySelectorAll('.dq .frame')[2].getAttribute('aria-current') === 'true'")
        await page.wait_for_function("[...document.querySelectorAll('[data-state]')].some(e => e.dataset.state === '0/2')")
        await picture(page, "jupyterlab")
        return found


def test_jupyterlab(run_dir, tmp_path):
    "nbs/explore.ipynb, all cells: the explorers follow each other, and JupyterLab's own keys stay out."
    nb = nbformat.read(root/"nbs"/"explore.ipynb", 4)
    cell = next(c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = cell.source.replace('"papermill_runs/train"', repr(str(run_dir.resolve())))
    nbformat.write(nb, tmp_path/"explore.ipynb")
    number, token = port(), secrets.token_urlsafe()
    command = [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={number}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={tmp_path}", "--LabApp.news_url=None"]
    with server(command, tmp_path/"log", cwd=tmp_path):
        found = asyncio.run(run_notebook(f"http://127.0.0.1:{number}/lab/tree/explore.ipynb?token={token}"))
    assert found[:3] == ["Trajectory explorer", "Action explorer", "Field of Q"]


@pytest.mark.skipif(not os.environ.get("CI"), reason="asked in CI only")
def test_ci_has_a_browser():
    assert chromium, "CI must install Chromium"
