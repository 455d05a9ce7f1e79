"The notebook that makes the shipped models, run as a whole at a small size."
import papermill
from notebooks import root

from digiq.method.autoui import AutoUIPolicy
from digiq.vlm.policy import VLMPolicy
from digiq.vlm.representation import VLM


def test_base_models_are_made_and_load(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = dict(screens=60, sight_steps=4, vlm_steps=4, demos=20, steps=8, episodes=6)
    papermill.execute_notebook(root/"nbs"/"base_models.ipynb", tmp_path/"out.ipynb", small | {"out": 2025}, progress_bar=False, cwd=tmp_path) # as papermill makes a number of `-p out 2025`
    for name, load, said in ("tiny-vlm", lambda p: VLM.load(str(p), 160), "| screens | 60 |"), ("tiny-autoui", AutoUIPolicy.from_pretrained, "| demos | 20 |"), ("tiny-vlm-agent", VLMPolicy.from_pretrained, "| batch | 64 |"):
        folder = tmp_path/"2025"/name
        assert load(folder).model.num_parameters() > 500_000
        assert said in (folder/"README.md").read_text()
