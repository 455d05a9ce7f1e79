"The notebooks under nbs/ and what the tests ask about them."
import ast, re
from functools import cache, partial
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parent.parent
paths = sorted(p for p in (root/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
page = root/"nbs"/"00_digiq.ipynb" # the method on one page: it exports nothing, and nothing imports it
troubles = root/"nbs"/"90_when_something_fails.ipynb" # errors and what to do: it exports nothing either
formats = root/"nbs"/"92_bring_your_data.ipynb" # what can be taken over and given to others: nor does this
clusters = root/"nbs"/"93_clusters.ipynb" # a page that shows the examples of clusters
authors = root/"nbs"/"95_your_own_app.ipynb" # makes an app that no module has
vlms = root/"nbs"/"96_bring_your_vlm.ipynb" # a page that trains a stand-in
library = [p for p in paths if p.name[0].isdigit() and p not in (page, troubles, formats, clusters, authors, vlms)]
runs = [p for p in paths if not p.name[0].isdigit() and p.stem != "index"]


def number(path):
    "Place of a library notebook in the book: `43a_embed.hf` -> (43, 'a')."
    digits, letter = re.match(r"(\d+)([a-z]*)", path.stem).groups()
    return int(digits), letter


read = cache(partial(nbformat.read, as_version=4)) # many tests ask


def cells(path, kind="code"):
    "The cells of one kind, in order."
    return [cell for cell in read(path).cells if cell.cell_type == kind]


def module(path):
    "Full name of the module that a library notebook exports, or None."
    found = [re.search(r"^#\|\s*default_exp\s+(\S+)", cell.source, re.MULTILINE) for cell in cells(path)]
    names = [m[1] for m in found if m]
    return f"digiq.{names[0]}".removesuffix(".__init__") if names else None


def tree(cell):
    "Statements of a code cell; magics and shell lines count as none."
    return ast.parse(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.MULTILINE)).body
