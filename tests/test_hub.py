"""What a run has made goes to the Hub and comes back by its name, against a stand-in of the Hub on loopback.

From a process of its own, since the Hub's address is read when a process starts."""
import os, subprocess, sys
from pathlib import Path

import pytest
from hub import TOKEN, Hub
from huggingface_hub import ModelCard
from notebooks import root

SCRIPT = """
import os, shutil, sys
from pathlib import Path
import datasets, torch
from PIL import Image
from huggingface_hub import constants
from digiq import actions as A
from digiq.__main__ import main
from digiq.core import DigiqError, Run, to_dict
from digiq.data import EpisodeStore
from digiq.foreign import fetch
from digiq.method.critic import Critic, CriticConfig
from digiq.runs import evaluation, load_preset, open_run
from digiq.runs.hub import push
from digiq.vlm.representation import VLM, model_path
folder = Path(sys.argv[1])

def what_is_said(wrong):
    try: wrong()
    except DigiqError as e: return print(e)
    print("nothing")

def behaviour(run, policy): return open_run(folder/run, load_preset("smoke", policy=policy)).base_policy()

# a run, as its stages leave it
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

# back again
lab = open_run(folder/"new", load_preset("smoke", policy="me/digiq"))
weights, old = lab.behaviour.model.state_dict(), behaviour("old", "tiny-autoui").model.state_dict()
assert all(torch.equal(x, old[k]) for k, x in weights.items())
critic = Critic.from_pretrained("me/critic")
again = Critic.load(folder/"run"/"checkpoints"/"critic", None)
assert all(torch.equal(x, again.state_dict()[k]) for k, x in critic.state_dict().items())
vlm, known = VLM.load("me/vlm", 160), VLM.load("tiny-vlm", 160)
assert all(torch.equal(x, known.model.state_dict()[k]) for k, x in vlm.model.state_dict().items())
critic.push_to_hub("me/critic-again")
vlm.push_to_hub("me/vlm-again")
lab.behaviour.push_to_hub("me/digiq-again")
for kind in ("critic", "vlm", "digiq"):
    files = [{f.name: f.read_bytes() for f in Path(fetch(f"me/{kind}{end}")).rglob("*") if f.name in ("model.safetensors", "config.json")} for end in ("", "-again")]
    assert set(files[0]) == set(files[1]) == {"model.safetensors", "config.json"}
    if kind == "critic": assert files[0] == files[1]
here, there = EpisodeStore(folder/"run"/"episodes"), EpisodeStore.from_hub("me/episodes")
assert here.episodes().equals(there.episodes()) and here.picture(1, 1) == there.picture(1, 1)
steps = datasets.load_dataset("me/episodes", split="train")
assert len(steps) == 4 and steps[3]["screen"].convert("RGB").getpixel((0, 0)) == (0, 128, 0) and steps[0]["goal"] == "find a lamp"

# what goes wrong
print("--")
what_is_said(lambda: behaviour("a", "me/nobody"))
what_is_said(lambda: Critic.from_pretrained("me/nobody"))
what_is_said(lambda: EpisodeStore.from_hub("me/digiq"))
what_is_said(lambda: Critic.from_pretrained("me/digiq"))
what_is_said(lambda: behaviour("b", "me/pickles"))
del os.environ["HF_TOKEN"]
what_is_said(lambda: Critic.from_pretrained("me/private"))
what_is_said(lambda: push(run.path, "me/again"))
constants.ENDPOINT = "http://127.0.0.1:9" # where nobody listens
what_is_said(lambda: behaviour("c", "me/other"))
what_is_said(lambda: Critic.from_pretrained("me/other"))
what_is_said(lambda: push(run.path, "me/digiq"))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with Hub() as hub:
        model = {f.name: f.read_bytes() for f in (root/"digiq"/"models"/"tiny-autoui").iterdir() if f.suffix == ".json"}
        hub.repos["model", "me/pickles"] = dict(private=False, files=model | {"pytorch_model.bin": b"a pickle"}, commit="0"*40)
        hub.repos["model", "me/private"] = dict(private=True, files={}, commit="1"*40)
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | dict(HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HOME=str(folder/"cache"), HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1", NO_PROXY="127.0.0.1")
        done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], env=env, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert TOKEN not in done.stdout + done.stderr
        addresses, _, said = done.stdout.partition("--\n")
        yield hub, addresses.split(), said.splitlines()


def test_push_sends_data_and_cards_and_nothing_else(pushed):
    hub, addresses, _ = pushed
    assert addresses == [f"{hub.url}/me/digiq", f"{hub.url}/me/critic", f"{hub.url}/me/vlm", f"{hub.url}/datasets/me/episodes", f"{hub.url}/me/digiq"]
    assert {name for (_, name), repo in hub.repos.items() if not repo["private"]} == {"me/episodes", "me/pickles"} # the one that was said to be public, and somebody else's
    names = {name for (_, repo), found in hub.repos.items() for name in found["files"] if repo != "me/pickles"}
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".parquet", ".txt", ".jinja", ".md"}
    assert "report.json" not in names
    assert [name.rpartition("/")[0] for name in hub.repos["dataset", "me/episodes"]["files"]].count("data") == 1


def test_card_has_rates_with_intervals(pushed):
    hub, *_ = pushed
    card = ModelCard(hub.repos["model", "me/digiq"]["files"]["README.md"].decode())
    first, level = card.data.eval_results
    assert (first.metric_type, first.metric_value, level.dataset_config, level.metric_value) == ("success_rate", .6133, "level 1", .95)
    assert first.metric_args["low"] < .6133 < first.metric_args["high"] and first.metric_args["episodes"] == 300
    assert "61.3 [" in card.text and "38.7 [" in card.text and "gamma: 0.8" in card.text and 'load_policy("me/digiq"' in card.text
    assert ModelCard(hub.repos["model", "me/critic"]["files"]["README.md"].decode()).data.eval_results[0].metric_value == .79


def test_one_line_says_what_to_do(pushed):
    hub, _, (nobody, critic, episodes, other, pickle, private, token, policy, offline, unsent) = pushed
    choose = "cannot be loaded: give a built-in model's name, a directory written by save_pretrained, or a hub id"
    assert nobody.startswith(f"the policy 'me/nobody' {choose}") and policy.startswith(f"the policy 'me/other' {choose}")
    assert "shows you no repository me/nobody: check the name" in critic and "shows you no repository me/private" in private
    assert "shows you no repository me/digiq" in episodes # it is one of a model
    assert other == "me/digiq holds no critic of digiq"
    assert "the policy 'me/pickles' cannot be loaded" in pickle and ("GET", "/me/pickles/resolve/" + "0"*40 + "/pytorch_model.bin") not in hub.asked
    assert "run `hf auth login` with a token that may write, or set HF_TOKEN" in token and ("model", "me/again") not in hub.repos
    assert "cannot be reached for me/other" in offline and "cannot be reached for me/digiq" in unsent
