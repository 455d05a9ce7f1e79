"What programs that tests start can import, and the order of the files."
import os
from pathlib import Path

tests = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(tests.parent), str(tests)])
LONG = ("explore", "pipeline", "devices", "served", "cluster", "vllm", "vlm_policy", "released", "several", "sweep", "base_models", "site")


def pytest_collection_modifyitems(items):
    "In the order of `LONG`, so that no worker is left with a long one at the end; others behind, as they were."
    place = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
