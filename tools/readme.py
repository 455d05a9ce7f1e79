"""Write README.md from nbs/index.ipynb. With --check write nothing and fail when the two differ.

Markdown cells are copied, with links made relative to the repository; code cells are fenced, with their text output.
A cell marked `#| hide` is left out. Pictures are files under docs/, shown from markdown.
"""
import argparse, difflib, json, os, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT/"nbs"/"index.ipynb"
HEADER = "<!-- Written from nbs/index.ipynb by tools/readme.py. -->\n"
FENCE = re.compile(r"(```.*?```)", re.DOTALL)
TARGET = re.compile(r"(\]\(|\ssrc=\")([^)\"\s]+)")


def relink(
    target, # link target as written in the notebook, relative to nbs/
):
    "The same target relative to the repository. A target that is not there raises `SystemExit`."
    if re.match(r"[a-z]+:|#", target): return target
    path, anchor, fragment = target.partition("#")
    full = (INDEX.parent/path).resolve()
    if not full.exists(): sys.exit(f"nbs/index.ipynb links to {target}, which is not there: correct the link or add the file")
    return os.path.relpath(full, ROOT) + anchor + fragment


def markdown(
    source, # markdown of one cell
):
    "`source` with its links relative to the repository; fenced blocks stay as they are."
    parts = FENCE.split(source)
    parts[::2] = [TARGET.sub(lambda m: m[1] + relink(m[2]), part) for part in parts[::2]]
    return "".join(parts)


def output(
    out, # one output of a code cell
):
    "The text of an output. A picture or an error raises `SystemExit`."
    data = out.get("data", {})
    if out["output_type"] == "error": sys.exit("nbs/index.ipynb holds a cell that failed: run it again")
    if any(mime.startswith("image/") for mime in data):
        sys.exit("nbs/index.ipynb holds a picture as an output: save it under docs/ and show it from a markdown cell")
    if "text/markdown" in data: return "".join(data["text/markdown"])
    text = "".join(out.get("text") or data.get("text/plain", ""))
    return f"```\n{text.rstrip()}\n```" if text.strip() else ""


def render(
    nb, # notebook as read from JSON
):
    "The README's text."
    blocks = []
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": blocks.append(markdown(source))
        if cell["cell_type"] != "code" or re.search(r"^#\|\s*hide\b", source, re.MULTILINE): continue
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip()
        blocks += [f"```python\n{code}\n```"] + [output(o) for o in cell["outputs"]]
    return HEADER + "\n" + "\n\n".join(b.strip() for b in blocks if b.strip()) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    check, readme = parser.parse_args().check, ROOT/"README.md"
    new = render(json.loads(INDEX.read_text(encoding="utf-8")))
    if not check: return readme.write_text(new, encoding="utf-8")
    old = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if old == new: return
    sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "README.md", "nbs/index.ipynb"))
    sys.exit("README.md differs from nbs/index.ipynb: run `python tools/readme.py`")


if __name__ == "__main__": main()
