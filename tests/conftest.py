"Files that take long come first, so that no worker is left with one of them at the end."
LONG = ("explore", "pipeline", "devices", "served", "cluster", "vllm", "vlm_policy", "released", "several", "sweep", "base_models", "site")


def pytest_collection_modifyitems(items):
    "In the order of `LONG`; others behind, as they were."
    place = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
