"Whole stages on phones over adb and on emulators, from Python and from the command line; and a judge that is compared with the truth."
import json, os, shutil, signal, subprocess, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path

import papermill
import pytest
from adbutils import AdbClient
from endpoint import Endpoint
from notebooks import root
from PIL import Image

from digiq.core import DigiqError, read_json
from digiq.data import EpisodeStore, encode_screen
from digiq.play import emulator
from digiq.play.adb import AdbSettings, Refused
from digiq.play.adbd import Adbd, adb_server
from digiq.play.android import Android
from digiq.play.emulator import Emulators, EmulatorSettings
from digiq.env import DeviceError, check_device
from digiq.play.judges import Judge, JudgeSettings, kappa
from digiq.phone import SimPhone
from digiq.runs import load_preset, open_run
from digiq.__main__ import main
from digiq.tasks import load

adb = shutil.which("adb")
if not adb:
    if os.environ.get("DIGIQ_CI"): raise RuntimeError("adb is missing: apt-get install adb")
    pytest.skip("adb is missing: apt-get install adb", allow_module_level=True)

small = dict(horizon=3, disturbance=0., evaluation=dict(episodes=4, shard=2, temperatures=(.8,)), threads=1)
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
        with pytest.raises(SystemExit) as ended: main(line)
        assert ended.value.code == 0
        with pytest.raises(SystemExit, match="other settings \\(preset.devices.judge.model was 'some-vlm', now 'another'\\)"): main([*line, "--judge", "another"])
    out = capsys.readouterr()
    assert "successes" in out.out
    assert len(EpisodeStore(tmp_path/"run"/"episodes")) == 10
    lines = (tmp_path/"run"/"judge"/"verdicts.jsonl").read_text().splitlines()
    assert len(lines) == EpisodeStore(tmp_path/"run"/"episodes").episodes().action.ne("").sum()
    assert key not in out.out + out.err and not any(key.encode() in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())


@pytest.fixture
def sdk(tmp_path, monkeypatch):
    "A stand-in for the emulator, and an adb server; temporary folders go to `tmp_path`."
    program = tmp_path/"sdk"/"emulator"/"emulator"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\n" + Path(__file__).with_name("emulator.py").read_text())
    program.chmod(0o755)
    monkeypatch.setenv("ANDROID_HOME", str(tmp_path/"sdk"))
    monkeypatch.setattr(emulator, "check_kvm", lambda path: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with adb_server(adb): yield program


def test_evaluates_on_emulators(sdk, tmp_path):
    devices = dict(kind="emulator", adb=dict(settle=0), emulator=dict(avd="slow", count=2, port=5620, stagger=.1))
    ended = open_run(tmp_path/"run", load_preset("smoke", **small, devices=devices)).evaluate("behaviour", repeats=None)
    assert len(ended) == 4


@contextmanager
def started(avd, port, **settings):
    with Emulators(EmulatorSettings(avd, count=1, port=port, restarts=0, **settings), kvm="/dev/null") as found: yield found


TRAITS = "displays", "landscape", "no_keyboard", "no_shell_v2" # each combination of them, over adb alone: tests/test_phones.py


@pytest.mark.parametrize("some", [TRAITS, *((trait,) for trait in TRAITS)], ids=".".join)
def test_emulators_of_every_kind_keep_the_contract(sdk, some):
    with started(".".join(some), 5640) as found:
        device = found.device(found.emulators[0], AdbSettings(settle=0))
        check_device(device, load("webshop", "train")[2])
        assert device.size == ((600, 270) if "landscape" in some else (270, 600))


def test_an_emulator_that_refuses_says_why(sdk):
    with started("refuses", 5640) as found, pytest.raises(Refused, match="pm clear: .*CLEAR_APP_USER_DATA.*devices.adb.packages"):
        found.device(found.emulators[0], AdbSettings(settle=0)).reset(load("webshop", "train")[2], 1)


@pytest.mark.parametrize("avd, why", [("unauthorised", "not authorised: unlock the phone"), ("offline", "offline: plug it in again")])
def test_an_emulator_that_never_comes_up_says_why(sdk, avd, why):
    with pytest.raises(DeviceError, match=f"emulator-.* is sick after .*, at last {why}"):
        with started(avd, 5640, boot=4.): pass


def running(program):
    "The stand-ins that run, and their watchers."
    return [p.name for p in Path("/proc").glob("[0-9]*") if str(program).encode() in words(p) and b"-avd" in words(p)]


def words(process): # of its command line; none where it has ended
    try: return (process/"cmdline").read_bytes().split(b"\0")
    except OSError: return []


def within(seconds, true):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end: time.sleep(.1)
    return true()


OWNER = """
import sys, time
from digiq.play.emulator import Emulators, EmulatorSettings
with Emulators(EmulatorSettings("slow", count=2, port=5640, stagger=.1), kvm="/dev/null"):
    print("up", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_emulators_do_not_outlive_their_owner(sdk, number):
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"up\n" and len(running(sdk)) == 4
        owner.send_signal(number)
        assert owner.wait(10) == -number
    assert within(5, lambda: not running(sdk))


COMMAND = """
import runpy, sys
from digiq.play import emulator
emulator.check_kvm = lambda path: None
sys.argv[1:] = ["collect", sys.argv[1], "--preset", "smoke", "--device", "emulator", "--avd", "loop", "--emulators", "1"]
runpy.run_module("digiq", run_name="__main__", alter_sys=True)
"""


def test_command_line_that_is_terminated_ends_its_emulators(sdk, tmp_path):
    (tmp_path/"tmp").mkdir()
    with subprocess.Popen([sys.executable, "-c", COMMAND, str(tmp_path/"run")], stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path/"tmp")}) as process:
        assert within(60, lambda: len(running(sdk)) == 2) and list((tmp_path/"tmp").glob("digiq-emulators-*"))
        process.terminate()
        assert process.wait(30) == 143, process.stderr.read()
    assert not running(sdk) and not list((tmp_path/"tmp").glob("digiq-emulators-*"))


def test_emulators_are_left_while_one_is_healed(sdk):
    raised = []
    def heal():
        try: emulators.device(one)
        except DigiqError as e: raised.append(e)
    with Emulators(EmulatorSettings("stubborn", count=1, port=5660), kvm="/dev/null") as emulators:
        one, = emulators.emulators
        one.state = lambda: "sick"
        thread = threading.Thread(target=heal)
        thread.start()
        time.sleep(.5) # it takes 3 s to end
        assert running(sdk)
    assert not running(sdk) and not emulators.folder.exists()
    thread.join(10)
    assert type(raised[0]) is DigiqError and "has been left" in str(raised[0]) and not running(sdk)


def test_judge_is_compared_with_the_truth(tmp_path, monkeypatch):
    lab = open_run(tmp_path/"run", load_preset("smoke", disturbance=0., threads=1, evaluation=dict(episodes=20, shard=10, temperatures=[1.])))
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


def test_a_judge_waits_for_a_line_that_is_being_written_and_drops_one_that_never_will_be(tmp_path):
    log, (red, blue, green) = tmp_path/"verdicts.jsonl", [Image.new("RGB", (20, 40), c) for c in ("red", "blue", "green")]
    with Endpoint(lambda goal, picture, request: {"reasoning": "why not", "success": True}, "none") as endpoint:
        cfg = JudgeSettings("some-vlm", endpoint.url, "")
        judge = Judge(cfg, tmp_path)
        judge.ask("Be red", red)
        line = log.read_bytes()
        with ThreadPoolExecutor() as pool, open(log, "ab") as f: # as another process does
            flock(f, LOCK_EX)
            f.write(line[:50])
            f.flush()
            another = pool.submit(Judge, cfg, tmp_path)
            with pytest.raises(TimeoutError): another.result(.5)
            f.write(line[50:])
            f.close()
            assert another.result(10).asked == 2
        with open(log, "ab") as f: f.write(line[:50]) # killed
        judge.ask("Be blue", blue)
        assert judge.asked == 3 and [json.loads(l)["goal"] for l in log.read_text().splitlines()] == ["Be red", "Be red", "Be blue"]
        with open(log, "ab") as f: f.write(line[:50] + b"\n")
        with pytest.raises(DigiqError, match="line 4 is damaged"): judge.ask("Be green", green)
    assert len(endpoint.requests) == 2


def test_processes_share_the_verdicts_and_the_budget_of_a_judge(tmp_path):
    program = """import sys
from PIL import Image
from digiq.play.judges import DigiqError, Judge, JudgeSettings
first, url, log = int(sys.argv[1]), *sys.argv[2:]
judge = Judge(JudgeSettings("some-vlm", url, "", budget=12), log)
try:
    for n in [*range(5), *range(first, first + 20)]: judge.ask("Be red", Image.new("RGB", (20, 40), (n, 0, 0)))
except DigiqError as e: print(e)"""
    with Endpoint(lambda goal, picture, request: {"reasoning": "why not", "success": True}, "none") as endpoint:
        def play(first): return subprocess.run([sys.executable, "-c", program, str(first), endpoint.url, str(tmp_path)], cwd=root, capture_output=True, text=True, check=True).stdout
        with ThreadPoolExecutor() as pool: said = list(pool.map(play, (100, 200)))
        judge = Judge(JudgeSettings("some-vlm", endpoint.url, ""), tmp_path)
    assert all("budget of 12 answers is spent" in s for s in said)
    assert 12 <= len(endpoint.requests) == judge.asked <= 13


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
