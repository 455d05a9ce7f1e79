"Modules import only from modules of earlier notebooks, rooms only from rooms below, and what comes before the models loads no deep-learning library."
import ast, subprocess, sys
from importlib.util import resolve_name

import pytest
from notebooks import library, module, number, root

order = {module(path): number(path) for path in library}
rooms = ["", "method", "vlm", "phone", "play", "released", "exchange", "cluster", "runs", "explore", "workshop", "__main__"] # from the ground floor up
light = [name for path in library if (name := module(path)) and path.parent.name in ("nbs", "phone", "play")]


def room(name):
    "The package of a module; the ground floor has none."
    first = name.split(".")[1:2]
    return first[0] if first and first[0] in rooms else ""


def source(name):
    "The file of a module."
    path = root.joinpath(*name.split("."))
    return path/"__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(node, package):
    "Full names that an import statement takes from this package."
    if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
    else:
        base = resolve_name("."*node.level + (node.module or ""), package)
        inner = [f"{base}.{alias.name}" for alias in node.names]
        names = [name for name in inner if name in order] or [base]
    return [name for name in names if name.split(".")[0] == "digiq"]


def arrows(name):
    "Modules of this package that a module imports, at its top or inside a function."
    path = source(name)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]
    return {target for node in nodes for target in imported(node, package)} - {"digiq"}


@pytest.mark.parametrize("name", order)
def test_imports_only_from_earlier_notebooks(name):
    earlier = {module for module, place in order.items() if place < order[name]}
    assert arrows(name) <= earlier, f"{name} imports {sorted(arrows(name) - earlier)}, which no earlier notebook exports"


def test_folders_are_rooms():
    "A chapter's folder is its module's package; no room imports from one above it, and few arrows lead from room to room."
    for path in library: assert room(module(path)).strip("_") in ("main", "" if path.parent.name == "nbs" else path.parent.name), path
    between = {(room(name), room(other)) for name in order for other in arrows(name) if room(name) != room(other)}
    assert {(a, b) for a, b in between if rooms.index(a) < rooms.index(b)} == set()
    assert len(between) <= 36, sorted(between)


def test_every_module_has_its_notebook():
    files = {p for p in (root/"digiq").rglob("*.py") if p.name != "_modidx.py"}
    packages = {p for p in files if p.name == "__init__.py" and len(p.read_text().splitlines()) <= 1}
    assert files - packages == {source(name) for name in order}


EACH = """import os, sys
import gymnasium, numpy, pandas, PIL.Image, pyarrow.parquet # not to be read anew by each of the processes
for name in sys.argv[1:]:
    if not os.fork():
        __import__(name)
        print(name, *sorted({"torch", "transformers", "accelerate"} & set(sys.modules)), flush=True)
        os._exit(0)
    if os.wait()[1]: sys.exit(f"{name} cannot be imported on its own")
"""


def test_load_no_deep_learning_library():
    "Each module in a process that has no other of this package."
    names = ["digiq", *light]
    done = subprocess.run([sys.executable, "-c", EACH, *names], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == names
