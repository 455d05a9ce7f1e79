"The whole pipeline, on stand-in models: killed at any moment, damaged, misused."
import json, multiprocessing, os, random, shutil, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import standins
import yaml

from digiq.core import ConfigError, DataError, DigiqError, read_json, to_dict
from digiq.data import Embeddings, EpisodeStore
from digiq.runs import Experiment

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    standins.make(folder)
    return folder


forks = multiprocessing.get_context("forkserver") # imports torch once for all processes
forks.set_forkserver_preload(["standins"])


@pytest.fixture(scope="module", autouse=True)
def threads():
    "One thread for each process."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def start(models, run_dir, *changes):
    "Run every stage in a process of its own, which can be killed."
    run_dir.mkdir(exist_ok=True)
    process = forks.Process(target=standins.run_and_tell, args=(models, run_dir, run_dir/"told.txt", *changes))
    process.start()
    return process


def finish(process, run_dir):
    "What went wrong in a process, or nothing."
    process.join()
    assert process.exitcode == 0
    return (run_dir/"told.txt").read_text()


def figures(run_dir):
    "metrics.json, seconds aside."
    metrics = read_json(run_dir/"metrics.json")
    assert all(s >= 0 for s in metrics.pop("seconds").values())
    return metrics


def weights(run_dir):
    "The bytes of everything that was trained or stored."
    kinds = ".safetensors", ".npy", ".parquet"
    return {str(f.relative_to(run_dir)): f.read_bytes() for f in sorted(run_dir.rglob("*")) if f.suffix in kinds}


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")/"run"
    assert finish(start(models, run_dir), run_dir) == ""
    return run_dir


def test_metrics(whole):
    metrics = figures(whole)
    assert metrics["preset"] == "smoke" and metrics["seed"] == 0
    trained = {"behaviour", "filtered_bc", "digiq"}
    assert set(metrics["success"]) == trained | {"filtered_bc_rerank", "digiq_rerank"} == set(metrics["temperatures"])
    again = {name: {"1 support 0", "1 support 1"} for name in ("filtered_bc_rerank", "digiq_rerank")} # samples at 0 are all alike
    assert {name: {"0", "1"} for name in trained} | again == {name: set(rates) for name, rates in metrics["tuning"].items()}
    assert metrics["supports"].keys() == again.keys()
    for name, rates in metrics["tuning"].items(): assert metrics["temperatures"][name] == float(max(sorted(rates), key=rates.get).split()[0])
    for rate in metrics["success"].values():
        assert 0 <= rate["low"] <= rate["mean"] <= rate["high"] <= 1 and rate["episodes"] == 16
        assert [sum(part["episodes"] for part in rate[group].values()) for group in ("levels", "shop")] == [16, 16]
    for critic in metrics["critic"], metrics["critic_without_representation"]:
        assert 0 <= critic["argmax_optimal"] <= 1 and 0 <= critic["pairwise"] <= 1 and 0 < critic["states"] <= 6
    assert set(metrics["versions"]) == {"python", "torch", "transformers", "digiq"}
    assert metrics["counts"]["episodes"]["episodes"] == 24
    json.dumps(metrics, allow_nan=False)


def test_killed_at_many_moments(models, whole, tmp_path):
    rng, killed = random.Random(0), 0
    for landmark in ("episodes/*.parquet", "proposals/*.parquet", "embeddings/*.npy", "checkpoints/critic", "stages/digiq.json", "evaluations/digiq/*.parquet", "results/check/critic.json"):
        process = start(models, tmp_path)
        while not list(tmp_path.glob(landmark)) and process.is_alive(): time.sleep(.01)
        time.sleep(rng.uniform(0, .3))
        process.kill()
        process.join()
        killed += process.exitcode < 0
    assert finish(start(models, tmp_path), tmp_path) == ""
    assert killed >= 5 and figures(tmp_path) == figures(whole) and weights(tmp_path) == weights(whole)


def test_number_of_workers_does_not_matter(models, whole, tmp_path):
    lab = standins.experiment(models, tmp_path, "workers=1")
    lab.collect(); lab.featurise(); lab.propose(); lab.finetune(); lab.embed()
    made, wanted = weights(tmp_path), weights(whole)
    assert len(made) > 10 and made == {name: wanted[name] for name in made}


@pytest.mark.parametrize("changes", [[], ["workers=1"]])
def test_again_changes_nothing(models, whole, changes):
    before = {f: f.stat().st_mtime_ns for f in whole.rglob("*") if f.suffix in (".parquet", ".npy", ".safetensors")}, figures(whole)
    assert finish(start(models, whole, *changes), whole) == ""
    assert before == ({f: f.stat().st_mtime_ns for f in before[0]}, figures(whole))


@pytest.mark.parametrize("change, told", [
    ("collection.episodes=32", "already holds stage episodes with other settings (episodes was 24, now 32): choose another run_dir"),
    ("collection.temperature=0.5", "temperature was 1.0, now 0.5"),
    ("evaluation.temperatures=[0.0, 0.5]", "already holds stage tuning/behaviour with other settings (settings was ['0', '1'], now ['0', '0.5']): choose another run_dir"),
    ("representation.steps=4", "already holds stage representation with other settings (preset.representation.steps was 3, now 4)"),
    ("critic.gamma=0.5", "already holds stage critic with other settings (preset.critic.gamma was 0.9, now 0.5)"),
    ("collection.episodes=3", "collection.episodes is 3: it must be at least 10"),
    ("critic.gama=0.5", "critic.gama is not a setting of CriticConfig; the nearest one is gamma"),
    ("evaluation.rerank=3", "tuning/filtered_bc_rerank with other settings (preset.evaluation.rerank was 2, now 3)"),
])
def test_one_line_says_what_is_wrong(models, whole, change, told):
    before = figures(whole)
    with pytest.raises(DigiqError) as e: standins.run(standins.experiment(models, whole, change))
    assert told in str(e.value) and "\n" not in str(e.value) and figures(whole) == before


def test_upstream_is_not_exchanged(models, whole):
    "A stage whose own settings are as before is refused where what it was made from has changed."
    lab = standins.experiment(models, whole, "proposals.temperature=2.0")
    for call in lab.embed, lab.train_critic, lab.score, lambda: lab.train_policy("digiq"), lambda: lab.evaluate("digiq"), lab.check_critic:
        with pytest.raises(DigiqError, match=r"preset.proposals.temperature was 1.2, now 2.0\): choose another run_dir"): call()


def test_vectors_of_another_run(models, whole, tmp_path, monkeypatch):
    "What a run with the same VLM has embedded is not embedded again."
    asked = []
    class Counting:
        def __init__(self, lab): self.real = Experiment.embedder(lab)
        def embed(self, pairs): asked.extend(pairs); return self.real.embed(pairs)
    monkeypatch.setattr(standins.Easy, "embedder", lambda lab: Counting(lab))
    runs = {}
    for name, known in dict(alone=[], lent=[tmp_path/"alone"]).items():
        for part in "episodes", "screens", "checkpoints/representation", "stages/episodes.json", "stages/screens.json", "stages/representation.json":
            copy = shutil.copytree if (whole/part).is_dir() else shutil.copy
            (tmp_path/name/part).parent.mkdir(parents=True, exist_ok=True)
            copy(whole/part, tmp_path/name/part)
        lab = standins.experiment(models, tmp_path/name, "proposals.n=6", "workers=1")
        lab.propose()
        asked.clear()
        runs[name] = lab.embed(known), len(asked), Embeddings(lab.path/"embeddings")
    (counts, n, vectors), (counts_lent, n_lent, lent) = runs.values()
    assert counts == counts_lent and 0 < n == counts["different"] < counts["pairs"] and n_lent == 0
    rows = np.arange(len(vectors))
    np.testing.assert_allclose(vectors[rows].astype(float), lent[rows], atol=2e-2)
    other = standins.experiment(models, tmp_path/"other", "representation.steps=4", "workers=1")
    other.collect(); other.featurise(); other.propose(); other.finetune()
    with pytest.raises(ConfigError, match="was embedded by another VLM: leave it out"): other.embed([whole])
    with pytest.raises(ConfigError, match="has no finished stage embeddings"): other.embed([tmp_path])


def test_diagnoses(models, whole, tmp_path):
    "Ceilings need no critic; nothing is played twice; what the method learned from stays as it is."
    run_dir = tmp_path/"run"
    shutil.copytree(whole, run_dir)
    before = weights(run_dir)
    lab = standins.experiment(models, run_dir)
    call = lambda: (lab.habits(), lab.ceiling(), lab.samples("digiq", 2), lab.interpolations(alphas=(0., 1.)), lab.right_labels(), lab.evaluate_at_collection("behaviour"), lab.evaluate_at_collection("digiq_rerank"))
    call()
    metrics = figures(run_dir)
    assert set(metrics["ceiling"]) == {"oracle_labels", "perfect_extraction", "perfect_rerank"}
    assert all(0 <= c["low"] <= c["mean"] <= c["high"] <= 1 and c["episodes"] == 16 and c["temperature"] in (0., 1.) for c in metrics["ceiling"].values())
    assert 0 <= metrics["habits"]["most_proposed_wrong"] <= metrics["habits"]["right_among"] <= 1 and 0 < metrics["habits"]["states"] <= 6
    assert metrics["samples"]["digiq"]["learnt"]["1"] == metrics["samples"]["digiq"]["perfect"]["1"] and set(metrics["samples"]["digiq"]["perfect"]) == {"1", "2"}
    assert all(0 <= right <= 1 for right in metrics["right_labels"].values()) and "0.1" in metrics["right_labels"]
    assert set(metrics["interpolations"]["digiq"]) == {"0", "1"} and all(r["episodes"] == 16 for r in metrics["interpolations"]["digiq"].values())
    assert metrics["success_at_collection"]["digiq_rerank"] == metrics["success"]["digiq_rerank"] and not (run_dir/"evaluations"/"digiq_rerank_at_collection").exists()
    made = {f: f.stat().st_mtime_ns for f in run_dir.rglob("*") if f.suffix in (".parquet", ".safetensors")}
    call()
    assert figures(run_dir) == metrics and made == {f: f.stat().st_mtime_ns for f in made} and before.items() <= weights(run_dir).items()
    early = standins.experiment(models, tmp_path/"early")
    early.collect(); early.featurise(); early.propose()
    assert list(early.ceiling().index) == list(metrics["ceiling"]) and early.metrics()["ceiling"] == metrics["ceiling"]


def test_several_processes_as_users_start_them(models, whole, tmp_path):
    "torchrun and notebook_launcher are one training by two processes, not two by one."
    preset = tmp_path/"preset.yaml"
    preset.write_text(yaml.safe_dump(to_dict(standins.experiment(models, whole).preset)))
    starts = dict(torchrun=[f"{Path(sys.executable).parent}/torchrun", "--nproc-per-node", "2", "-m", "digiq", "train", "--preset", preset],
                  notebook=[sys.executable, "-c", "import sys; from accelerate import notebook_launcher; from digiq.runs.experiment import train; notebook_launcher(train, sys.argv[1:], num_processes=2)", preset])
    found = {}
    for name, command in starts.items():
        run = tmp_path/name
        for part in "episodes", "screens", "proposals", "embeddings", "stages", "checkpoints/representation": shutil.copytree(whole/part, run/part)
        for f in [*(run/"stages").glob("critic*"), *(run/"stages").glob("scores*"), *(run/"stages").glob("digiq*"), *(run/"stages").glob("filtered_bc*")]: f.unlink()
        done = subprocess.run([*map(str, command), str(run)], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"})
        assert done.returncode == 0, done.stderr[-3000:]
        assert "digiq: 100%" in done.stderr and len({line.split("|")[0] for line in done.stderr.replace("\r", "\n").splitlines() if "100%" in line}) == 3, done.stderr # a bar a stage
        found[name] = [(run/"checkpoints"/n/"model.safetensors").read_bytes() for n in ("critic", "digiq", "filtered_bc")]
    alone = [(whole/"checkpoints"/n/"model.safetensors").read_bytes() for n in ("critic", "digiq", "filtered_bc")]
    assert found["torchrun"] == found["notebook"] and found["torchrun"][0] != alone[0] # each process has dropout of its own


@pytest.mark.parametrize("field, told", [("policy", "the policy '/no/such'"), ("image_encoder", "the VLM of the image encoder '/no/such'"), ("representation.model", "no VLM at '/no/such'")])
def test_missing_model(models, tmp_path, field, told):
    lab = standins.experiment(models, tmp_path, f"{field}=/no/such")
    with pytest.raises(DigiqError) as e:
        lab.collect()
        lab.finetune()
    assert told in str(e.value) and "save_pretrained" in str(e.value) and "\n" not in str(e.value)


def test_models_that_do_not_fit(models, tmp_path):
    lab = standins.experiment(models, tmp_path, "image_encoder=tiny-vlm")
    with pytest.raises(DigiqError, match="expects image features of width 48, but the image encoder 'tiny-vlm' gives 144"): lab.collect()
    lab = standins.experiment(models, tmp_path/"b", "representation.side=200")
    lab.collect()
    with pytest.raises(DigiqError, match="reads pictures of 160 pixels, but representation.side is 200: set it to 160"): lab.finetune()


def test_order(models, tmp_path):
    lab = standins.experiment(models, tmp_path)
    for call, first in ((lab.propose, "featurise()"), (lab.embed, "propose()"), (lab.finetune, "collect()"), (lab.train_critic, "embed()"), (lab.score, "train_critic()"), (lambda: lab.train_policy("digiq"), "score()"),
                        (lambda: lab.evaluate("digiq"), r"train_policy\('digiq'\)"), (lab.check_critic, "train_critic()"), (lab.table, r"evaluate\('behaviour'\)")):
        with pytest.raises(DigiqError, match=f"call {first} first".replace("()", r"\(\)")): call()
    with pytest.raises(DigiqError, match="there is no agent 'didiq'"): lab.evaluate("didiq")
    with pytest.raises(DigiqError, match="there is no policy 'bc'"): lab.train_policy("bc")


def test_nothing_succeeded(models, tmp_path):
    lab = standins.experiment(models, tmp_path, "horizon=1", "collection.episodes=10", "collection.temperature=0")
    lab.make_env = lambda tasks, horizon: standins.DeviceEnv(standins.SimPhone(), tasks, horizon)
    with pytest.raises(DigiqError, match="none of 10 episodes succeeded, so there is nothing to learn from: collect more episodes"): lab.collect()


def test_too_few_steps_for_a_minibatch(models, tmp_path):
    lab = standins.experiment(models, tmp_path, "collection.episodes=10", "critic.batch=4096", "representation.rarest_class=0.0")
    lab.collect(); lab.featurise(); lab.propose(); lab.finetune(); lab.embed()
    with pytest.raises(DataError, match="too few for minibatches of 4096: collect more episodes"): lab.train_critic()


@pytest.mark.parametrize("victim, again", [("proposals/00001-*.parquet", "delete it"), ("embeddings/00000-*.npy", "delete it"), ("episodes/00002-*.parquet", "delete it"),
    ("checkpoints/critic/model.safetensors", "delete it"), ("checkpoints/representation/model.safetensors", "delete it"), ("checkpoints/digiq/model.safetensors", "delete it"), ("scores.parquet", "delete it"), ("stages/digiq.json", "delete it"), ("metrics.json", "delete it")])
def test_damaged_file_is_named(models, whole, tmp_path, victim, again):
    run_dir = tmp_path/"run"
    shutil.copytree(whole, run_dir)
    file, = run_dir.glob(victim)
    data = file.read_bytes()
    file.write_bytes(data[:len(data) // 2])
    lab = standins.experiment(models, run_dir)
    with pytest.raises(DataError) as e:
        lab.collect(); lab.featurise(); lab.propose(); lab.embed(); lab.score(); lab.train_policy("digiq"); lab.evaluate("behaviour"); lab.evaluate("digiq"); lab.scorer()
    assert str(file if file.suffix != ".safetensors" else file.parent) in str(e.value) and again in str(e.value) and "\n" not in str(e.value)
    assert file.read_bytes() == data[:len(data) // 2]


def test_papermill_shows_the_line(tmp_path):
    command = [sys.executable, "-m", "papermill", str(ROOT/"nbs"/"train.ipynb"), str(tmp_path/"out.ipynb"), "-p", "preset", "smok", "-p", "run_dir", str(tmp_path/"run"), "--no-progress-bar"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "ConfigError: there is no preset 'smok': choose" in done.stderr.strip().splitlines()[-1]


def test_papermill_takes_names_for_numbers(tmp_path):
    (tmp_path/"2025_test.txt").write_text("Go to velmora.com\nSearch for red lamp on velmora.com\n")
    names = dict(preset="smoke", task_set=2025, run_dir=20250101, order="sequential", eval_episodes=2, temperature=.8)
    command = [sys.executable, "-m", "papermill", str(ROOT/"nbs"/"evaluate.ipynb"), "out.ipynb", *(w for k, v in names.items() for w in ("-p", k, str(v))), "--no-progress-bar"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert EpisodeStore(tmp_path/"20250101"/"evaluations"/"behaviour").episodes().task_id.unique().tolist() == ["2025_test-0000", "2025_test-0001"]
