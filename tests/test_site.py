"The documentation site: built once, without a warning; its links, its equations and its search, in a browser that may ask no other host."
import functools, http.server, importlib.util, os, re, shutil, subprocess, sys, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from notebooks import cells, paths, root

chromium = shutil.which("chromium")
if not os.environ.get("DIGIQ_CI"):
    for name in ("mkdocstrings", "material", "math_core", "ziamath"):
        if not importlib.util.find_spec(name): pytest.skip(f"{name} is missing: pip install -e '.[docs]'", allow_module_level=True)


class Page(HTMLParser):
    "Targets of links, what is loaded, anchors, and text by kind of element."
    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], {""}
        self.feed(re.sub(r'<span class="[^"]*">|</span>', "", text)) # most of the tags, without a target

    def handle_starttag(self, tag, attrs):
        attrs = {k: v or "" for k, v in attrs}
        self.anchors |= {attrs[k] for k in ("id", "name") if k in attrs}
        if tag == "a" and "href" in attrs: self.links.append(attrs["href"])
        if "src" in attrs: self.loaded.append(attrs["src"])
        if tag == "link" and "canonical" not in attrs.get("rel", ""): self.loaded.append(attrs["href"])


@pytest.fixture(scope="module")
def site():
    "The folder of the site, and its pages by their paths."
    done = subprocess.run([sys.executable, root/"tools"/"site.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, done.stderr # mkdocs, griffe and the others have nothing to warn of
    folder = root/"_docs"
    return folder, {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*.html")) if p.name != "404.html"}


@pytest.fixture(scope="module")
def parsed(site): return {name: Page(text) for name, text in site[1].items()}


def test_every_notebook_has_its_page(site):
    assert {str(p.relative_to(root/"nbs").with_suffix(".html")) for p in paths} <= site[1].keys()


def test_links_lead_somewhere(site, parsed):
    wrong, seen = [], 0
    for name, page in parsed.items():
        for target in page.links + page.loaded:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc: continue
            path = unquote(urljoin(f"/{name}", parts.path or f"/{name}"))[1:]
            if not path or path.endswith("/"): path += "index.html"
            there = (site[0]/path).is_file() and (path not in parsed or unquote(parts.fragment) in parsed[path].anchors)
            wrong, seen = wrong + [(name, target)]*(not there), seen + 1
    assert not wrong and seen > 1000


def test_nothing_is_loaded_from_elsewhere(site, parsed):
    assert not [(name, target) for name, page in parsed.items() for target in page.loaded if urlsplit(target).netloc]
    styles = [p.read_text(encoding="utf-8") for p in site[0].rglob("*.css")]
    assert styles and not [m for text in styles for m in re.findall(r"url\(['\"]?(?:https?:)?//[^)]*|@import[^;]*", text)]


def test_hidden_cells_and_directives_are_left_out(site):
    plain = lambda text: re.sub(r"\s+|<[^>]+>", "", text.replace("&gt;", ">").replace("&lt;", "<").replace("&quot;", '"').replace("&#39;", "'").replace("&amp;", "&"))
    for path in paths:
        shown = plain(site[1][str(path.relative_to(root/"nbs").with_suffix(".html"))])
        assert not re.search(r"#\|(export|hide|default_exp|echo)", shown) and "skip_exec:true" not in shown
        hidden = [plain(re.sub(r"^#\|.*$", "", c.source, flags=re.M).replace("<", "&lt;")) for c in cells(path) if re.search(r"^#\|\s*hide\b", c.source, re.M)]
        assert not [text for text in hidden if len(text) > 40 and text in shown], path


def test_comments_beside_parameters_are_in_the_api(site):
    text = re.sub(r"<[^>]+>", "", site[1]["api/method.html"])
    assert "smallest advantage worth learning from, epsilon; -1 or less for none" in text and "rows to imitate and their weights" in text


@pytest.mark.skipif(not chromium and not os.environ.get("DIGIQ_CI"), reason="Chromium is missing: apt-get install chromium")
def test_in_a_browser(site):
    from playwright.sync_api import sync_playwright
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site[0]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home, outside = f"http://127.0.0.1:{server.server_port}/", []
    def local(route):
        if route.request.url.startswith((home, "data:", "blob:")): return route.continue_()
        outside.append(route.request.url)
        route.abort()
    try:
        with sync_playwright() as p:
            chrome = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"])
            for width, scheme in ((1440, "light"), (400, "dark")):
                page = chrome.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
                page.set_default_timeout(120_000)
                page.route("**/*", local)
                for name in ("index.html", "method/14_extraction.html", "api/method.html", "papermill_runs/seed0.html"):
                    page.goto(home + name)
                    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than {width}"
                    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth)"), f"{name} lacks a picture"
                    if folder := os.environ.get("DIGIQ_SCREENSHOTS"): page.screenshot(path=Path(folder, f"site-{name.replace('/', '-')}-{width}.png"))
                page.goto(home + "method/14_extraction.html")
                block = page.locator("math[display=block]").first
                limit = block.locator("munder").first.evaluate("e => { const [over, under] = [...e.children].map(c => c.getBoundingClientRect()); return under.top - over.top }")
                assert limit > 3, "what is under `max` is not below it"
                assert page.evaluate("document.fonts.ready.then(f => [...f].some(e => e.family.includes('STIX') && e.status === 'loaded'))")
                if width < 600: page.click("label[for=__search] >> nth=0")
                page.locator(".md-search__input").press_sequentially("Best-of-N") # it listens to keys
                page.wait_for_function("document.querySelector('.md-search-result__list').textContent.includes('Extraction')")
            chrome.close()
    finally: server.shutdown()
    assert not outside
