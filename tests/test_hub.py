"What a run has made goes to the Hub and comes back by its name: against a stand-in of the Hub on loopback, from processes of their own, as the address is read when a process starts."
import os, subprocess, sys
from pathlib import Path

import pytest
from hub import TOKEN, Hub
from huggingface_hub import ModelCard
from notebooks import root

PUSH = """
import sys, torch
from pathlib import Path
from PIL import Image
from digiq import actions as A
from digiq.__main__ import main
from digiq.core import DigiqError, Run, to_dict
from digiq.data import EpisodeStore
from digiq.method.critic import Critic, CriticConfig
from digiq.runs import evaluation, load_preset
from digiq.runs.hub import push
from digiq.vlm.representation import model_path
import shutil
folder = Path(sys.argv[1])
run = Run(folder/"run")
row = dict(task_id="1", goal="find a lamp", level=1, prompt="Goal: find a lamp", previous="", truncated=False, error="", seed=1)
colours = "navy", "white", "green"
EpisodeStore(run.path/"episodes").write_shard(0, [row | dict(episode=e, step=s, screen=Image.new("RGB", (8, 16), colours[s + e]), action=A.render(A.press("home")) if s == 0 else "",
    reward=float(s == 0), terminated=s == 0) for e in range(2) for s in range(2)])
torch.manual_seed(0)
(run.path/"checkpoints").mkdir()
Critic(CriticConfig(), torch.zeros(1, 1, dtype=torch.long), vocab=10, screen_dim=4, rep_dim=3).save(run.path/"checkpoints"/"critic")
shutil.copytree(model_path("tiny-autoui"), run.path/"checkpoints"/"digiq")
shutil.copytree(model_path("tiny-vlm"), run.path/"checkpoints"/"representation")
(run.path/"checkpoints"/"digiq"/"optimizer.pt").write_bytes(b"a pickle")
for name in ("episodes", "critic", "digiq", "representation"):
    with run.stage(name, {"preset": {"critic": to_dict(load_preset("tiny", critic=dict(gamma=.8)).critic)}}): pass
rate = evaluation.wilson
run.update_metrics(success=dict(behaviour=rate(116, 300) | dict(levels={"1": rate(75, 100)}), digiq=rate(184, 300) | dict(levels={"1": rate(95, 100)})), critic=dict(pairwise=.79))
try: main(["push", str(run.path), "me/digiq"])
except SystemExit: pass
for what in ("critic", "vlm", "episodes"): print(push(run.path, f"me/{what}", what, private=what != "episodes"))
print(push(run.path, "me/digiq"))
"""

LOAD = """
import sys, torch
from pathlib import Path
import datasets
import digiq.runs
from digiq.core import DigiqError
from digiq.data import EpisodeStore
from digiq.method.critic import Critic
from digiq.runs import load_preset, open_run
from digiq.vlm.representation import VLM, model_path
folder = Path(sys.argv[1])
lab = open_run(folder/"new", load_preset("smoke", policy="me/digiq"))
weights = lab.base_policy().model.state_dict()
old = open_run(folder/"old", load_preset("smoke")).base_policy().model.state_dict()
assert all(torch.equal(x, old[k]) for k, x in weights.items())
critic = Critic.from_pretrained("me/critic")
again = Critic.load(folder/"run"/"checkpoints"/"critic", None)
assert all(torch.equal(x, again.state_dict()[k]) for k, x in critic.state_dict().items())
vlm, known = VLM.load("me/vlm", 160), VLM.load("tiny-vlm", 160)
assert all(torch.equal(x, known.model.state_dict()[k]) for k, x in vlm.model.state_dict().items())
here, there = EpisodeStore(folder/"run"/"episodes"), EpisodeStore.from_hub("me/episodes")
assert here.episodes().equals(there.episodes()) and here.picture(1, 1) == there.picture(1, 1)
steps = datasets.load_dataset("me/episodes", split="train")
assert len(steps) == 4 and steps[3]["screen"].convert("RGB").getpixel((0, 0)) == (0, 128, 0) and steps[0]["goal"] == "find a lamp"
for wrong in (lambda: open_run(folder/"a", load_preset("smoke", policy="me/nobody")).behaviour, lambda: Critic.from_pretrained("me/nobody"), lambda: EpisodeStore.from_hub("me/digiq"),
              lambda: Critic.from_pretrained("me/digiq"), lambda: open_run(folder/"b", load_preset("smoke", policy="me/pickles")).behaviour):
    try: wrong()
    except DigiqError as e: print("SAID", e)
    else: print("SAID nothing")
"""

ALONE = """
import sys
from pathlib import Path
from digiq.core import DigiqError
from digiq.method.critic import Critic
from digiq.runs import load_preset, open_run
from digiq.runs.hub import push
folder = Path(sys.argv[1])
for wrong in (lambda: open_run(folder/"c", load_preset("smoke", policy="me/other")).behaviour, lambda: Critic.from_pretrained("me/other"), lambda: push(folder/"run", "me/digiq")):
    try: wrong()
    except DigiqError as e: print("SAID", e)
    else: print("SAID nothing")
"""


def run(code, folder, url, token=TOKEN):
    "A process whose Hub is at an address."
    keys = {"HF_TOKEN": token} if token else {}
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | keys | dict(HF_ENDPOINT=url, HF_HOME=str(folder/f"cache{len(token)}"), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1",
        PYTHONPATH=f"{root}", NO_PROXY="127.0.0.1")
    done = subprocess.run([sys.executable, "-c", code, str(folder)], env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with Hub() as hub: yield hub, folder, run(PUSH, folder, hub.url)


def test_push_sends_data_and_cards_and_nothing_else(pushed):
    hub, folder, said = pushed
    assert said.split() == [f"{hub.url}/me/digiq", f"{hub.url}/me/critic", f"{hub.url}/me/vlm", f"{hub.url}/datasets/me/episodes", f"{hub.url}/me/digiq"]
    assert {name: repo["private"] for (_, name), repo in hub.repos.items()} == {"me/digiq": True, "me/critic": True, "me/vlm": True, "me/episodes": False}
    names = {name for repo in hub.repos.values() for name in repo["files"]}
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".parquet", ".txt", ".jinja", ".md"}
    assert "report.json" not in names
    assert [name.rpartition("/")[0] for name in hub.repos["dataset", "me/episodes"]["files"]].count("data") == 1


def test_card_has_rates_with_intervals(pushed):
    hub, *_ = pushed
    card = ModelCard(hub.repos["model", "me/digiq"]["files"]["README.md"].decode())
    first, level = card.data.eval_results
    assert (first.metric_type, first.metric_value, level.dataset_config, level.metric_value) == ("success_rate", .6133, "level 1", .95)
    assert first.metric_args["low"] < .6133 < first.metric_args["high"] and first.metric_args["episodes"] == 300
    assert "61.3 [" in card.text and "38.7 [" in card.text and "gamma: 0.8" in card.text and 'Policy.from_pretrained("me/digiq"' in card.text
    assert ModelCard(hub.repos["model", "me/critic"]["files"]["README.md"].decode()).data.eval_results[0].metric_value == .79


def test_everything_comes_back_by_name(pushed):
    hub, folder, _ = pushed
    pickles = {k: v for k, v in hub.repos["model", "me/digiq"]["files"].items() if not k.endswith(".safetensors")}
    hub.repos["model", "me/pickles"] = dict(private=False, files=pickles | {"pytorch_model.bin": b"a pickle"}, commit="0" * 40)
    said = run(LOAD, folder, hub.url).splitlines()
    nobody, critic, episodes, other, pickle = [line.removeprefix("SAID ") for line in said if line.startswith("SAID")]
    assert nobody.startswith("the policy 'me/nobody' cannot be loaded: give a built-in model's name, a directory written by save_pretrained, or a hub id")
    assert "shows you no repository me/nobody: check the name" in critic
    assert "me/digiq" in episodes and "no repository" in episodes
    assert other == "me/digiq holds no critic of digiq"
    assert "the policy 'me/pickles' cannot be loaded" in pickle and "safetensors" in pickle


def test_without_token_or_network(pushed):
    hub, folder, _ = pushed
    private, critic, push = run(ALONE, folder, hub.url, token="").splitlines()
    assert "shows you no repository me/other" in critic and "run `hf auth login` with a token that may write, or set HF_TOKEN" in push
    policy, critic, push = run(ALONE, folder, "http://127.0.0.1:9").splitlines()
    assert "the policy 'me/other' cannot be loaded" in policy
    assert "cannot be reached for me/other" in critic and "cannot be reached for me/digiq" in push
