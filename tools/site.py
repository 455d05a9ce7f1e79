"""Build the documentation site from the notebooks into _docs/. With --serve show it on this machine afterwards.

Every notebook becomes a page, in the order of the book: markdown as it stands, code without nbdev's directives, the
outputs that are kept. Hidden cells and front matter are left out. Equations become MathML at build time, and the font
for them comes from a package, so that a page asks no other host for anything. The API's pages are made from the
package's source; parameters are described by the comments beside them.

mkdocs loads this file as a hook, and griffe as an extension.
"""
import argparse, ast, base64, functools, html, http.server, io, json, logging, os, re, shutil, sys, tokenize
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parent.parent
NBS, RUNS, SITE, WORK = ROOT/"nbs", ROOT/"papermill_runs", ROOT/"_docs", ROOT/"build"/"site"
FENCE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)
TARGET = re.compile(r"(\]\(|\ssrc=\")([^)\"\s]+)")
BEHIND = "---\nsearch:\n  boost: 0.2\n---\n\n" # a page that comes after the chapters among what a search finds
FIRST_PAGE, ONE_PAGE = "index.ipynb", "00_digiq.ipynb"


# Which pages there are

def number(path): # `nbs/00a_foreign.ipynb` -> (0, "a"); None for a notebook without a number
    "A chapter's place in the book."
    found = re.match(r"(\d+)([a-z]*)_", path.name)
    return found and (int(found[1]), found[2])


@functools.cache
def read(path):
    "A notebook's cells, with their sources as text."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def title(path):
    "The first heading of a notebook."
    return next(m[1].replace("`", "") for cell in read(path) if (m := re.match(r"# (.+)", cell["source"])))


def module(path):
    "Full name of the module that a notebook exports, or None."
    found = next((m[1] for cell in read(path) if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", cell["source"], re.M))), None)
    return found and f"digiq.{found}".removesuffix(".__init__")


def notebooks():
    "Chapters by room, in the order of the book, and the notebooks that are run with papermill."
    paths = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    rooms = {}
    for path in sorted((p for p in paths if number(p) and p.name != ONE_PAGE), key=number):
        room = "help" if number(path)[0] >= 90 else path.parent.name if path.parent != NBS else "ground floor"
        rooms.setdefault(room, []).append(path)
    return rooms, [p for p in paths if not number(p) and p.name != FIRST_PAGE]


def place(path): # of a notebook, or of another file that a notebook shows
    "Where a file's page or copy is, relative to the site."
    inside = path.relative_to(NBS if path.is_relative_to(NBS) else ROOT)
    if inside.suffix == ".ipynb": return inside.with_suffix(".md")
    return inside if inside.suffix else inside.with_suffix(".txt")


# From a notebook to a page

def relink(
    target, # as written in a notebook
    path, # the notebook
):
    "The same target from the notebook's page. A file is copied along; one that is not there raises `SystemExit`."
    if re.match(r"[a-z]+:|#", target): return target
    name, anchor, fragment = target.partition("#")
    found = [(path.parent/name).resolve()]
    if path.parent == RUNS: # made from a notebook elsewhere, at a time when chapters had other numbers
        found += [NBS/name, *NBS.rglob("*_" + Path(name).name.partition("_")[2])]
    full = next((p for p in found if p.is_file() and p.is_relative_to(ROOT)), None)
    if not full: sys.exit(f"{path.relative_to(ROOT)} links to {target}, which is not there: correct the link or add the file")
    if full.suffix != ".ipynb":
        copy = WORK/"pages"/place(full)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(full, copy)
    return os.path.relpath(place(full), place(path).parent) + anchor + fragment


def markdown(source, path):
    "Markdown with its links made those of the site; code stays as it is."
    parts = FENCE.split(source)
    parts[::2] = [TARGET.sub(lambda m: m[1] + relink(m[2], path), part) for part in parts[::2]]
    return "".join(parts)


def fenced(text, language):
    "A code block that no line of `text` can end."
    ticks = "`"*max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{{.{language}}}\n{text}\n{ticks}"


def output(
    out, # one output of a code cell
    path, # the notebook
    name, # for its picture, without a suffix
):
    "An output as markdown. Of a widget, and of a progress bar, nothing is left."
    data = {mime: "".join(value) for mime, value in out.get("data", {}).items() if not mime.endswith("+json")}
    if len(data) < len(out.get("data", {})): return "" # a widget: its text says nothing
    if out["output_type"] == "error": sys.exit(f"{path.relative_to(ROOT)} holds a cell that failed: run it again")
    if out.get("name") == "stderr": return ""
    if "text/html" in data and "<script" not in data["text/html"]:
        table = re.sub(r"<style.*?</style>|\n\s*", "", data["text/html"], flags=re.DOTALL)
        return f'<div class="output">{re.sub(r"<table[^>]*>", "<table>", table)}</div>'
    if "text/markdown" in data: return markdown(data["text/markdown"], path)
    if mime := min((m for m in data if m in ("image/png", "image/jpeg")), key=lambda m: len(data[m]), default=None):
        picture = (WORK/"pages"/place(path)).with_suffix("")/f"{name}.{mime.removeprefix('image/')}"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(base64.b64decode(data[mime]))
        return f'<p class="output"><img src="{path.stem}/{picture.name}" alt="What the cell shows"></p>'
    text = "".join(out.get("text") or data.get("text/plain", "")).rstrip()
    if not text.strip() or re.search(r"\d%\|", text): return ""
    return fenced(re.sub(r"\x1b\[[\d;]*m", "", text), "text .output")


def page(path):
    "A notebook as markdown."
    blocks = []
    for k, cell in enumerate(read(path)):
        if cell["cell_type"] == "markdown": blocks.append(markdown(cell["source"], path))
        if cell["cell_type"] != "code" or re.search(r"^#\|\s*hide\b", cell["source"], re.M): continue
        code = re.sub(r"^#\|.*\n?", "", cell["source"], flags=re.M).strip()
        if code and not re.search(r"^#\|\s*echo:\s*false", cell["source"], re.M): blocks.append(fenced(code, "python"))
        blocks += [output(out, path, f"{k}-{i}") for i, out in enumerate(cell["outputs"])]
    if name := module(path):
        blocks.append(f"---\n\nFrom this chapter is made `{name}`: [its API]({os.path.relpath(Path('api', room(name)), place(path).parent)}.md#{anchor(name)})")
    return "\n\n".join(block.strip("\n") for block in blocks if block.strip()) + "\n"


def room(name):
    "The package of a module."
    return parts[1] if len(parts := name.split(".")) > 2 or (ROOT/"digiq"/parts[-1]).is_dir() else "digiq"


def anchor(name): return name.replace("__", "") # underscores would be read as bold


def api(chapters): # chapters of one room that export a module
    "The page on the modules of a room."
    name = room(module(chapters[0]))
    blocks = [BEHIND + f"# {'digiq.' if name != 'digiq' else ''}{name}"]
    for path in chapters:
        link = f"[{title(path)}]({os.path.relpath(place(path), 'api')})"
        blocks += [f"## `{module(path)}` {{ #{anchor(module(path))} }}", f"Chapter {path.name.partition('_')[0]}, {link}", f"::: {module(path)}"]
    return "\n\n".join(blocks) + "\n"


# mkdocs

def write(name, text):
    "A page, and its name for the navigation."
    path = WORK/"pages"/name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(name)


def add(path, numbered=True):
    "A notebook's page, and its line in the navigation."
    first = f"{path.name.partition('_')[0]} · " if numbered else ""
    return {first + title(path): write(place(path), page(path))}


def config():
    "Write all pages; return the configuration of mkdocs."
    rooms, runs = notebooks()
    nav = [{"Start": write(place(NBS/FIRST_PAGE), page(NBS/FIRST_PAGE))}, add(NBS/ONE_PAGE, False)]
    heading = lambda name: "VLM" if name == "vlm" else name.capitalize()
    nav += [{heading(name): [add(path) for path in chapters]} for name, chapters in rooms.items()]
    nav.append({"Run it": [add(path, False) for path in runs]})
    executed = [{path.stem: write(place(path), BEHIND + page(path))} for path in sorted(RUNS.glob("*.ipynb")) if (RUNS/path.stem/"metrics.json").is_file() or path.stem == "base_models"]
    nav.append({"Executed runs": [{"What they are": write("papermill_runs/index.md", (RUNS/"README.md").read_text(encoding="utf-8"))}, *executed]})
    modules = {}
    for path in (p for chapters in rooms.values() for p in chapters if module(p)): modules.setdefault(room(module(path)), []).append(path)
    nav.append({"API": [{name if name == "digiq" else f"digiq.{name}": write(f"api/{name}.md", api(chapters))} for name, chapters in modules.items()]})
    write("assets/site.css", (ROOT/"tools"/"site.css").read_text(encoding="utf-8"))
    palette = [dict(media=f"(prefers-color-scheme: {kind})", scheme=scheme, primary="teal", accent="teal", toggle=dict(icon=f"material/weather-{now}", name=f"Switch to {other}"))
               for kind, scheme, now, other in (("light", "default", "sunny", "dark"), ("dark", "slate", "night", "light"))]
    python = dict(docstring_style=None, filters=["!^_"], group_by_category=False, members_order="source", heading_level=3, show_root_heading=False, show_root_toc_entry=False, show_source=False,
                  separate_signature=True, show_signature_annotations=True, show_symbol_type_heading=True, docstring_section_style="table", show_bases=False, signature_crossrefs=False,
                  show_submodules=False, show_docstring_modules=False, extensions=[str(Path(__file__).resolve())])
    return dict(
        site_name="digiq", docs_dir=str(WORK/"pages"), site_dir=str(SITE), use_directory_urls=False, strict=True, nav=nav, copyright="Apache 2.0", hooks=[str(Path(__file__).resolve())],
        theme=dict(name="material", font=False, palette=palette, icon=dict(logo="material/cellphone"), features=["navigation.footer", "navigation.top", "navigation.prune", "search.highlight", "content.code.copy", "toc.follow"]),
        extra=dict(generator=False), extra_css=["assets/site.css"],
        plugins=[dict(search=dict(separator=r"[\s\-()\[\]{}.,:;=*/\"'`]+")), dict(mkdocstrings=dict(handlers=dict(python=dict(paths=[str(ROOT)], options=python))))],
        markdown_extensions=["attr_list", "md_in_html", "pymdownx.superfences", "pymdownx.highlight", dict(toc=dict(permalink=True, toc_depth=3)), {"pymdownx.arithmatex": dict(generic=True)}],
        validation=dict(omitted_files="warn", absolute_links="warn", unrecognized_links="warn", anchors="warn"))


def build():
    "Write the site. What mkdocs warns of raises `mkdocs.exceptions.Abort`."
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    import yaml
    from mkdocs.commands.build import build as run
    from mkdocs.config import load_config
    shutil.rmtree(WORK, ignore_errors=True)
    settings = config()
    (WORK/"mkdocs.yml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    run(load_config(str(WORK/"mkdocs.yml")))


# Equations

signs = set() # what the equations are made of, for the font


@functools.cache
def mathml(source, block):
    "An equation as MathML. One that is not understood raises `math_core.LatexError`."
    from math_core import LatexToMathML
    done = LatexToMathML().convert_with_local_state(source, displaystyle=block)
    signs.update(html.unescape(re.sub(r"<[^>]+>", "", done)))
    return done


def on_page_content(content, page, config, files):
    "Called by mkdocs: the equations of a page, its headings among them."
    equation = lambda m: mathml(html.unescape(m[1]).strip(), m[0].startswith("<div"))
    return re.sub(r"<(?:span|div) class=\"arithmatex\">\\[(\[](.*?)\\[)\]]</(?:span|div)>", equation, content, flags=re.DOTALL)


def on_post_build(config):
    "Called by mkdocs: of STIX Two Math (SIL Open Font Licence, in the package ziamath) what the equations need."
    import ziamath
    from fontTools import subset
    options = subset.Options(flavor="woff", notdef_outline=True, layout_features=["*"], name_IDs=["*"])
    font = subset.load_font(Path(ziamath.__file__).parent/"fonts"/"STIXTwoMath-Regular.ttf", options)
    part = subset.Subsetter(options)
    part.populate(text="".join(signs) + "√") # a root has no text
    part.subset(font)
    subset.save_font(font, SITE/"assets"/"math.woff", options)


# API

class Docments(griffe.Extension):
    "Comments beside parameters and fields become their descriptions, patched functions methods of their classes."
    def __init__(self): self.comments, self.patched = {}, []

    def said(self, agent): # {line: its comment} of the module that is read
        if agent.filepath not in self.comments:
            tokens = tokenize.generate_tokens(io.StringIO(agent.code).readline)
            self.comments[agent.filepath] = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        return self.comments[agent.filepath]

    def describe(self, it, section): # the docstring's text, then tables
        if not it.docstring and not section: return
        if not it.docstring: it.docstring = griffe.Docstring("", parent=it)
        text = [griffe.DocstringSectionText(it.docstring.value)] if it.docstring.value else []
        it.docstring.parsed = text + section

    def on_function_instance(self, *, node, func, agent, **kwargs):
        if isinstance(node, griffe.ObjectNode): return
        if any(str(d.value).startswith("patch") for d in func.decorators): self.patched.append(func)
        said, args, first = self.said(agent), node.args, node.body[0].lineno
        every = [a for a in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg) if a]
        lines = {a.lineno: a for a in every if a.lineno in said and a.lineno < first} # of several on a line the last
        rows = [griffe.DocstringParameter(a.arg, description=said[line], annotation=func.parameters[a.arg].annotation, value=func.parameters[a.arg].default) for line, a in lines.items()]
        end = max((line for line in said if node.lineno <= line < first), default=0)
        back = [griffe.DocstringReturn("", description=said[end], annotation=func.returns)] if node.returns and end >= node.returns.end_lineno and end not in lines else []
        self.describe(func, [griffe.DocstringSectionParameters(rows)]*bool(rows) + [griffe.DocstringSectionReturns(back)]*bool(back))

    def on_class_instance(self, *, node, cls, agent, **kwargs):
        if isinstance(node, griffe.ObjectNode): return
        said = self.said(agent)
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and n.end_lineno in said and not n.target.id.startswith("_")]
        rows = [griffe.DocstringParameter(n.target.id, description=said[n.end_lineno], annotation=ast.unparse(n.annotation), value=n.value and ast.unparse(n.value)) for n in fields]
        self.describe(cls, [griffe.DocstringSectionParameters(rows, title="Fields:")]*bool(rows))

    def on_package(self, *, pkg, loader, **kwargs):
        for func in self.patched:
            home = func.parent
            for name in str(func.parameters[0].annotation).strip("()").replace(",", "|").split("|"):
                try: cls = loader.modules_collection[home.resolve(name.strip())]
                except (KeyError, griffe.NameResolutionError): continue # a class of another package
                if home.members.get(func.name) is func: home.del_member(func.name)
                cls.set_member(func.name, func)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--serve", action="store_true", help="show it at http://127.0.0.1:8000 afterwards")
    serve = parser.parse_args().serve
    build()
    print(f"{SITE.relative_to(ROOT)}/index.html is the first page")
    if serve:
        print("http://127.0.0.1:8000 until interrupted")
        http.server.ThreadingHTTPServer(("127.0.0.1", 8000), functools.partial(http.server.SimpleHTTPRequestHandler, directory=SITE)).serve_forever()


if __name__ == "__main__": main()
