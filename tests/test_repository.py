"Notebooks are clean, small and shaped as papermill and nbdev need them."
import ast, json, re

import pytest
import yaml
from execnb.nbio import nb2str
from nbdev.clean import clean_nb
from notebooks import cells, clusters, formats, library, module, page, paths, root, runs, tree, troubles

from digiq.exchange.kinds import KINDS

every = pytest.mark.parametrize("path", paths, ids=lambda p: p.stem)
each_library = pytest.mark.parametrize("path", library, ids=lambda p: p.stem)
each_run = pytest.mark.parametrize("path", runs, ids=lambda p: p.stem)


@every
def test_clean(path):
    text = path.read_text(encoding="utf-8")
    nb = json.loads(text)
    clean_nb(nb, allowed_cell_metadata_keys=["tags"], clean_ids=False)
    assert nb2str(nb) == text, "run nbdev_clean"


@every
def test_small(path):
    assert path.stat().st_size < 400_000, "outputs in git stay small: keep only those that teach"


@each_library
def test_library_notebook_exports_a_module(path):
    assert module(path)


@each_library
def test_imports_have_their_own_cells(path):
    for cell in cells(path):
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree(cell)}
        assert len(kinds) < 2, f"imports share a cell with other code:\n{cell.source}"


@each_run
def test_run_notebook_is_skipped_by_nbdev_test(path):
    front = cells(path, "raw")[0].source
    assert yaml.safe_load(front.strip().strip("-")) == {"skip_exec": True}


@each_run
def test_run_notebook_has_one_parameters_cell_of_literals(path):
    found = [cell for cell in cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(found) == 1
    for node in tree(found[0]):
        assert isinstance(node, ast.Assign) and len(node.targets) == 1, ast.unparse(node)
        ast.literal_eval(node.value)


@each_run
def test_run_notebook_exports_nothing(path):
    assert not [cell for cell in cells(path) if re.search(r"^#\|\s*(default_exp|export)", cell.source, re.MULTILINE)]


def test_page_stands_alone_and_stays_short():
    sources = [cell.source for cell in cells(page)]
    nodes = [node for cell in cells(page) for top in tree(cell) for node in ast.walk(top)]
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= {"copy", "collections", "matplotlib", "numpy", "torch"}
    assert sum(bool(line.strip()) for source in sources for line in source.splitlines()) <= 250
    assert module(page) is None and page.stat().st_size < 250_000


def test_page_of_troubles_shows_what_its_cells_check():
    tables = [cell for cell in cells(troubles) if cell.source.startswith("table(")]
    assert len(tables) == 4
    for cell in tables:
        rows = [[ast.literal_eval(part) for part in row.elts[:3]] for row in tree(cell)[0].value.args]
        shown = cell.outputs[0]["data"]["text/markdown"].splitlines()[2:]
        assert shown == [f"| {' | '.join(row)} |" for row in rows], "run the page again"


def test_page_of_formats_lists_every_kind():
    text = "\n".join(cell.source for cell in cells(formats, "markdown"))
    assert set(re.findall(r"`digiq convert ([a-z-]+) ", text)) == {*KINDS, "released"}


def test_page_of_clusters_shows_the_examples():
    folder = root/"nbs"/"cluster"/"examples"
    shown = {ast.literal_eval(cell.source[5:-1]): cell.outputs[0]["data"]["text/markdown"] for cell in cells(clusters) if cell.source.startswith("show(")}
    assert module(clusters) is None and shown.keys() == {p.name for p in folder.iterdir()}
    for name, text in shown.items(): assert text.partition("\n")[2] == (folder/name).read_text() + "```", "run the page again"


def test_presets_travel_with_the_package():
    assert {p.stem for p in (root/"digiq"/"presets").glob("*.yaml")} == {"smoke", "tiny", "webshop", "general", "qwen-vl", "ui-tars", "tiny-vlm-agent"}
