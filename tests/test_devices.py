"Whole stages on phones over adb and on emulators, from Python and from the command line; and a judge that is compared with the truth."
import os, shutil, sys
from pathlib import Path

import papermill
import pytest
from adbutils import AdbClient
from endpoint import Endpoint
from notebooks import root

from digiq.core import DigiqError, read_json
from digiq.data import EpisodeStore, encode_screen
from digiq.devices import emulator
from digiq.devices.adbd import Adbd, adb_server
from digiq.devices.android import Android
from digiq.judges import JudgeSettings, kappa
from digiq.phone import SimPhone
from digiq.pipeline import load_preset, open_run
from digiq.rollout.__main__ import main
from digiq.tasks import load

adb = shutil.which("adb")
if not adb:
    if os.environ.get("DIGIQ_CI"): raise RuntimeError("adb is missing: apt-get install adb")
    pytest.skip("adb is missing: apt-get install adb", allow_module_level=True)

small = dict(horizon=3, disturbance=0., evaluation=dict(episodes=4, shard=2), threads=1)
key = "sk-a-key-that-nobody-may-see"


@pytest.fixture
def phones():
    androids = [Android(SimPhone(disturbance=0), f"simphone-{i}") for i in range(2)]
    with adb_server(adb), Adbd(androids) as served:
        for address in served.addresses: AdbClient().connect(address, timeout=60)
        yield served.addresses


def test_evaluates_over_adb_in_order(phones, tmp_path):
    def lab(serials, seed=0): return open_run(tmp_path/"run", load_preset("smoke", **small, devices=dict(kind="adb", serials=serials, adb=dict(settle=0))), seed)
    ended = lab(phones).evaluate("behaviour", sequential=True)
    assert ended.task_id.tolist() == [t.id for t in load("webshop", "test")[:4]]
    store = EpisodeStore(tmp_path/"run"/"evaluations"/"behaviour")
    assert store.screen(3, 0).size == (270, 600) and read_json(tmp_path/"run"/"metrics.json")["success"]["behaviour"]["episodes"] == 4
    assert len(lab(["127.0.0.1:1"]).evaluate("behaviour", sequential=True)) == 4 # finished: no phone is asked for
    with pytest.raises(DigiqError, match="other settings"): open_run(tmp_path/"run", load_preset("smoke", **small)).evaluate("behaviour", sequential=True)
    with pytest.raises(DigiqError, match="truth is known on built-in phones only"): lab(phones).judge_agreement(JudgeSettings("m", key=""))


def test_collects_over_adb_from_the_command_line(phones, tmp_path, capsys, monkeypatch):
    preset = tmp_path/"brief.yaml"
    preset.write_text("{horizon: 2, threads: 1, collection: {episodes: 10, shard: 5}, devices: {adb: {settle: 0}}}")
    monkeypatch.setenv("JUDGE_KEY", key)
    with Endpoint(lambda goal, picture, request: {"reasoning": "why not", "success": len(endpoint.requests) % 3 == 0}, key) as endpoint:
        line = ["collect", str(tmp_path/"run"), "--preset", str(preset), "--device", "adb", "--serials", " ".join(phones), "--temperature", "1.3", "--judge", "some-vlm", "--judge-url", endpoint.url, "--judge-key", "JUDGE_KEY"]
        assert main(line) == 0
        assert main([*line, "--judge", "another"]) == 1
    out = capsys.readouterr()
    assert "successes" in out.out and "other settings (preset.devices.judge.model was 'some-vlm', now 'another')" in out.out
    assert len(EpisodeStore(tmp_path/"run"/"episodes")) == 10
    lines = (tmp_path/"run"/"judge"/"verdicts.jsonl").read_text().splitlines()
    assert len(lines) == EpisodeStore(tmp_path/"run"/"episodes").episodes().action.ne("").sum()
    assert key not in out.out + out.err and not any(key.encode() in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())


def test_evaluates_on_emulators(tmp_path, monkeypatch):
    program = tmp_path/"sdk"/"emulator"/"emulator"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\n" + Path(__file__).with_name("emulator.py").read_text())
    program.chmod(0o755)
    monkeypatch.setenv("ANDROID_HOME", str(tmp_path/"sdk"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.setattr(emulator, "check_kvm", lambda path: None)
    with adb_server(adb):
        devices = dict(kind="emulator", adb=dict(settle=0), emulator=dict(avd="slow", count=2, port=5620, stagger=.1))
        ended = open_run(tmp_path/"run", load_preset("smoke", **small, devices=devices)).evaluate("behaviour", repeats=None)
    assert len(ended) == 4


def test_judge_is_compared_with_the_truth(tmp_path, monkeypatch):
    lab = open_run(tmp_path/"run", load_preset("smoke", disturbance=0., threads=1, evaluation=dict(episodes=20, shard=10)))
    lab.evaluate("behaviour")
    store = EpisodeStore(tmp_path/"run"/"evaluations"/"behaviour")
    steps = store.episodes()
    won = steps[steps.reward.shift(1, fill_value=0) >= 1] # the screens after a success
    true = {encode_screen(store.screen(r.episode, r.step)) for r in won.itertuples()}
    monkeypatch.setenv("JUDGE_KEY", key)
    def answer(goal, picture, request): # wrong every fourth time
        return {"reasoning": "as I see it", "success": (encode_screen(picture) in true) != (len(endpoint.requests) % 4 == 0)}
    with Endpoint(answer, key) as endpoint:
        table = lab.judge_agreement(JudgeSettings("counting", endpoint.url, "JUDGE_KEY", gate=-1.), most=40)
        asked = len(endpoint.requests)
        assert lab.judge_agreement(JudgeSettings("counting", endpoint.url, "JUDGE_KEY", gate=-1.), most=40).equals(table) and len(endpoint.requests) == asked # all remembered
    found = read_json(tmp_path/"run"/"metrics.json")["judge"]["counting"]
    assert found["counts"] == table.to_numpy().tolist() and found["kappa"] == kappa(table)["kappa"] and found["n"] == table.to_numpy().sum()
    assert table.to_numpy()[1].sum() == len(won) and .6 < found["agreement"] < .9 and len(won)
    assert not any(key.encode() in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())


def execute(name, tmp_path, **parameters):
    "Run a run notebook; the texts of its outputs."
    done = papermill.execute_notebook(root/"nbs"/f"{name}.ipynb", tmp_path/"out.ipynb", parameters | {"run_dir": str(tmp_path/"run")}, progress_bar=False, cwd=root)
    return "".join(str(o.get("data", o.get("text", ""))) for cell in done.cells for o in cell.get("outputs", []))


def test_the_page_about_devices_ends_in_a_film(tmp_path):
    out = execute("devices", tmp_path, episodes=2, horizon=3)
    assert "data:image/webp;base64," in out and "evaluations/behaviour/00000" in out


def test_notebooks_collect_and_evaluate_over_adb(phones, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", key)
    (tmp_path/"brief.yaml").write_text("{horizon: 2, threads: 1, devices: {adb: {settle: 0}}}")
    tasks = (tmp_path/"few_train.txt", tmp_path/"few_val.txt")
    for path in tasks: path.write_text("Go to velmora.com\nSearch for red lamp on velmora.com\n")
    where = dict(preset=str(tmp_path/"brief.yaml"), task_set=str(tmp_path/"few"), device="adb", serials=" ".join(phones), temperature=.9, judge="some-vlm", judge_key="JUDGE_KEY")
    with Endpoint(lambda goal, picture, request: {"reasoning": "why not", "success": len(endpoint.requests) % 3 == 0}, key) as endpoint:
        out = execute("collect", tmp_path, repeats=5, judge_url=endpoint.url, **where)
        execute("evaluate", tmp_path, repeats=2, split="val", order="sequential", judge_url=endpoint.url, **where)
    assert "data:image/webp;base64," in out
    assert EpisodeStore(tmp_path/"run"/"episodes").episodes().groupby("task_id").episode.nunique().tolist() == [5, 5]
    ended = EpisodeStore(tmp_path/"run"/"evaluations"/"behaviour").episodes().drop_duplicates("episode")
    assert ended.task_id.tolist() == ["few_val-0000", "few_val-0001"]*2


def test_evaluate_notebook_reports_the_judge(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", key)
    with Endpoint(lambda goal, picture, request: {"reasoning": "never", "success": False}, key) as endpoint:
        out = execute("evaluate", tmp_path, preset="smoke", eval_episodes=10, order="sequential", judge="no-sayer", judge_url=endpoint.url, judge_key="JUDGE_KEY", judge_screens=20)
    assert "'kappa'" in out and "no success" in out and read_json(tmp_path/"run"/"metrics.json")["judge"]["no-sayer"]["n"] == 20
    assert not any(key.encode() in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())
