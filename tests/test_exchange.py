"Data sets of others: damaged files, killed conversions, bounded memory, and nothing dropped in silence."
import gzip, io, json, os, signal, subprocess, sys, time, tracemalloc
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from tensorboard.summary.writer.record_writer import RecordWriter

from digiq.__main__ import main
from digiq.core import DataError, read_json
from digiq.data import EpisodeStore
from digiq.exchange.aitw import aitw, read_examples
from digiq.exchange.aitz import aitz
from digiq.exchange.android_control import android_control, read_example
from digiq.exchange.gui_odyssey import gui_odyssey
from digiq.exchange.importing import UNREADABLE, convert, read_episode
from digiq.exchange.tfrecord import Example, as_example, crc32c, masked, records, write_records

ROOT = Path(__file__).resolve().parent.parent
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def picture(t, size=(6, 8)):
    out = io.BytesIO()
    Image.new("RGB", size, (t % 256, 90, 160)).save(out, "PNG")
    return out.getvalue()


CONTROL = [dict(action_type="click", x=3, y=4), dict(action_type="scroll", direction="up"), dict(action_type="input_text", text="lamp"), dict(action_type="navigate_back"),
    dict(action_type="open_app", app_name="Clock"), dict(action_type="wait"), dict(action_type="long_press", x=1, y=1), dict(action_type="type", x=1, y=1, text="a"), dict(action_type="click", x=99, y=4)]


def control(k, actions):
    "An episode of AndroidControl."
    n = len(actions) + 1
    return as_example(dict(episode_id=k, goal=f"Task {k}", screenshots=[picture(t) for t in range(n)], accessibility_trees=[b""]*n, screenshot_widths=[6]*n, screenshot_heights=[8]*n,
        actions=[json.dumps(a) for a in actions], step_instructions=["do it"]*len(actions)))


WILD = [(4, [.5, .5], [.5, .5], ""), (4, [.8, .5], [.2, .5], ""), (3, [-1., -1.], [-1., -1.], "lamp"), (5, [-1., -1.], [-1., -1.], ""), (2, [-1., -1.], [-1., -1.], ""), (4, [.5, 1.5], [.5, 1.5], "")]
DONE = (10, [-1., -1.], [-1., -1.], "")


def wild(k, actions, pixels=bytes(8*6*3), size=(8, 6)):
    "The examples of an episode of Android in the Wild."
    return [as_example({"episode_id": str(k), "episode_length": len(actions), "step_id": t, "goal_info": f"Task {k}", "image/encoded": pixels, "image/height": size[0], "image/width": size[1], "image/channels": 3,
        "results/action_type": number, "results/type_action": text, "results/yx_touch": touch, "results/yx_lift": lift}) for t, (number, touch, lift, text) in enumerate(actions)]


def zoo(folder, k, actions):
    "An episode of AITZ."
    where = folder/f"GENERAL-{k}"
    where.mkdir(parents=True)
    steps = [dict(episode_id=str(k), episode_length=len(actions), step_id=t, instruction=f"Task {k}", result_action_type=number, result_action_text=text, result_touch_yx=json.dumps(touch), result_lift_yx=json.dumps(lift),
        image_path=f"general/GENERAL-{k}/GENERAL-{k}_{t}.png", coat_action_think="a thought") for t, (number, touch, lift, text) in enumerate(actions)]
    (where/f"GENERAL-{k}.json").write_text(json.dumps(steps))
    for t in range(len(actions)): (where/f"GENERAL-{k}_{t}.png").write_bytes(picture(t))
    return where/f"GENERAL-{k}.json"


ODYSSEY = [("CLICK", [[500, 250]]), ("SCROLL", [[500, 800], [500, 200]]), ("TYPE", "lamp"), ("CLICK", "KEY_HOME"), ("BACK", ""), ("LONG_PRESS", [[1, 2]]), ("CLICK", "KEY_RECENT"), ("CLICK", [[1, 2000]])]


def odyssey(folder, k, actions):
    "An episode of GUI-Odyssey."
    for name in ("annotations", "screenshots/data_0"): (folder/name).mkdir(parents=True, exist_ok=True)
    steps = [dict(step=t, screenshot=f"{k}_{t}.png", action=action, info=info, ps="") for t, (action, info) in enumerate(actions)]
    (folder/"annotations"/f"{k}.json").write_text(json.dumps(dict(episode_id=str(k), device_info=dict(device_name="Pixel 7 Pro"), task_info=dict(category="Web_Shopping", instruction=f"Task {k}"), step_length=len(steps), steps=steps)))
    for t in range(len(steps)): (folder/"screenshots"/"data_0"/f"{k}_{t}.png").write_bytes(picture(t))
    return folder/"annotations"/f"{k}.json"


def write(kind, folder, episodes):
    "A data set with an episode for each list of actions."
    folder.mkdir()
    if kind == "android-control": write_records(folder/"x-00000-of-00001", [control(k, a) for k, a in enumerate(episodes)])
    if kind == "aitw": write_records(folder/"x-00000-of-00001", [r for k, a in enumerate(episodes) for r in wild(k, [*a, DONE])])
    for k, a in enumerate(episodes):
        if kind == "aitz": zoo(folder, k, [*a, DONE])
        if kind == "gui-odyssey": odyssey(folder, k, [*a, ("COMPLETE", "")])
    return folder


KINDS = {"aitw": (aitw, WILD, 1), "aitz": (aitz, WILD, 1), "android-control": (android_control, CONTROL, 0), "gui-odyssey": (gui_odyssey, ODYSSEY, 1)} # reader, actions, steps that `write` adds


def contents(where): return {str(f.relative_to(where)): f.read_bytes() for f in where.rglob("*") if f.is_file() and f.parent.name != "stages"}


@pytest.mark.parametrize("kind", KINDS)
def test_command(kind, tmp_path, capsys):
    "Every kind is converted by the command line, a part of it alone too."
    _, actions, more = KINDS[kind]
    source = write(kind, tmp_path/"source", [actions[:2], actions[1:4], actions[:1]])
    main_ends(["convert", kind, str(source), str(tmp_path/"out"), "--limit", "2"])
    assert f"2 episodes, 2 kept, {5 + 2*more} steps, 2 successes" in capsys.readouterr().out
    name = {"aitz": "GENERAL-2"}.get(kind, "2")
    (tmp_path/"splits.json").write_text(json.dumps({"test": [name]}))
    main_ends(["convert", kind, str(source), str(tmp_path/"test"), "--split", f"{tmp_path/'splits.json'}:test"])
    said = capsys.readouterr().out
    assert "1 episode, 1 kept" in said and "hardly a failure" in said
    assert EpisodeStore(tmp_path/"test"/"episodes").episodes().goal.tolist() == ["Task 2"]*(2 + more)


def main_ends(words):
    with pytest.raises(SystemExit) as e: main(words)
    assert not e.value.code, e.value.code


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_nothing_dropped_in_silence(kind, data, tmp_path_factory):
    "Each step of the source is a row, and each that ours cannot say is counted in the report."
    reader, actions, more = KINDS[kind]
    folder = tmp_path_factory.mktemp("drops")
    episodes = data.draw(st.lists(st.lists(st.sampled_from(actions), min_size=1, max_size=6), min_size=1, max_size=4))
    report = convert(kind, reader, write(kind, folder/"source", episodes), folder/"out")
    steps = EpisodeStore(folder/"out"/"episodes").episodes().query("action != ''")
    assert len(steps) == report["steps"] == sum(map(len, episodes)) + more*len(episodes)
    counted = sum(int(o["what"].split()[0]) for o in report["oddities"] if o["done"] == UNREADABLE)
    assert (steps.error != "").sum() == counted
    assert report["kept"] == len(episodes) and all(o["episode"] is None for o in report["oddities"])


KILLED = "import sys; from digiq.__main__ import main; main(sys.argv[1:])"


def test_killed_conversion_goes_on(tmp_path):
    big = [picture(t, (540, 1200)) for t in range(4)]
    write_records(tmp_path/"source", [as_example(dict(episode_id=k, goal=f"Task {k}", screenshots=big, screenshot_widths=[540]*4, screenshot_heights=[1200]*4,
        actions=[json.dumps(CONTROL[0])]*3, step_instructions=[f"step {k}"]*3)) for k in range(100)])
    words = [sys.executable, "-c", KILLED, "convert", "android-control", str(tmp_path/"source")]
    process = subprocess.Popen([*words, str(tmp_path/"out")], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any((tmp_path/"out").glob("oddities/*.json")): time.sleep(.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not read_json(tmp_path/"out"/"stages"/"converted.json")["done"]
    before = contents(tmp_path/"out")
    for out in ("out", "whole"): subprocess.run([*words, str(tmp_path/out)], cwd=ROOT, check=True, capture_output=True)
    after = contents(tmp_path/"out")
    assert after == contents(tmp_path/"whole")
    assert all(after[f] == data for f, data in before.items() if not Path(f).name.startswith("."))


def test_memory_stays_bounded(tmp_path):
    "12 MB of screenshots pass through a fraction of that."
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 200, 3), np.uint8))
    noise.save(tmp_path/"noise.png")
    shot = (tmp_path/"noise.png").read_bytes()
    write_records(tmp_path/"source", (as_example(dict(episode_id=k, goal="Go", screenshots=[shot]*4, screenshot_widths=[200]*4, screenshot_heights=[100]*4,
        actions=[json.dumps(CONTROL[0])]*3, step_instructions=["go"]*3)) for k in range(50)))
    tracemalloc.start()
    try:
        report = convert("android-control", android_control, tmp_path/"source", tmp_path/"out")
        _, peak = tracemalloc.get_traced_memory()
    finally: tracemalloc.stop()
    assert report["kept"] == 50 and len(shot)*200 > 12e6
    assert peak < 6e6, peak


def example_class():
    "`tf.train.Example`, as Google's library makes it of its description."
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    def message(name, *fields, into=file.message_type, entry=False):
        m = into.add(name=name)
        m.options.map_entry = entry
        for number, (field, kind, repeated) in enumerate(fields, start=1):
            f = m.field.add(name=field, number=number, label=3 if repeated else 1, type=11 if isinstance(kind, str) else kind)
            if isinstance(kind, str): f.type_name = kind
        return m
    message("BytesList", ("value", 12, True))
    message("FloatList", ("value", 2, True))
    message("Int64List", ("value", 3, True))
    message("Feature", ("bytes_list", ".t.BytesList", False), ("float_list", ".t.FloatList", False), ("int64_list", ".t.Int64List", False))
    features = message("Features", ("feature", ".t.Features.FeatureEntry", True))
    message("FeatureEntry", ("key", 9, False), ("value", ".t.Feature", False), into=features.nested_type, entry=True)
    message("Example", ("features", ".t.Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def test_reads_what_other_libraries_write(tmp_path):
    theirs = example_class()
    made = theirs()
    made.features.feature["goal"].bytes_list.value.append("Find 日本".encode())
    made.features.feature["n"].int64_list.value.extend([0, -1, 2**62, 300])
    made.features.feature["yx"].float_list.value.extend([.25, -1.])
    out = io.BytesIO()
    writer = RecordWriter(out)
    for data in (made.SerializeToString(), b"", os.urandom(3000)): writer.write(data)
    (tmp_path/"theirs").write_bytes(out.getvalue())
    found = list(records(tmp_path/"theirs"))
    assert len(found) == 3 and found[1] == b""
    example = Example(found[0])
    assert (example.texts("goal"), example.numbers("n"), example.numbers("yx")) == (["Find 日本"], [0, -1, 2**62, 300], [.25, -1])
    assert theirs.FromString(as_example(dict(goal="Find 日本", n=[0, -1, 2**62, 300], yx=[.25, -1.]))) == made


def mutated(data, draw):
    "Some bytes changed, or cut off."
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))): data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[:draw(st.integers(0, len(data)))]) if draw(st.booleans()) else bytes(data)


@pytest.fixture(scope="module")
def plain(): return gzip.decompress(write_bytes([control(1, CONTROL), *wild(2, WILD + [DONE])]))


def write_bytes(some):
    path = Path(os.environ.get("TMPDIR", "/tmp"))/f"records-{os.getpid()}"
    try:
        write_records(path, some)
        return path.read_bytes()
    finally: path.unlink(missing_ok=True)


@quick
@given(data=st.data())
def test_damaged_files(data, plain, tmp_path_factory):
    path = tmp_path_factory.getbasetemp()/"damaged"
    zipped = data.draw(st.booleans())
    path.write_bytes(mutated(gzip.compress(plain) if zipped else plain, data.draw))
    try: list(records(path))
    except DataError as e: assert str(path) in str(e) and "\n" not in str(e)


def read_one(make):
    found = read_episode(0, "name", make, "kind") # raises nothing
    assert found.rows or found.oddities[-1].done == "episode left out"


@quick
@given(data=st.data())
def test_damaged_records(data):
    "Records that someone changed, with checksums that agree."
    def read(make):
        try: some = make()
        except DataError: return
        return some
    episode = read(lambda: Example(mutated(control(1, CONTROL[:3]), data.draw)))
    if episode is not None: read_one(lambda: read_example(episode))
    steps = read(lambda: [Example(mutated(r, data.draw)) for r in wild(2, [WILD[0], DONE])])
    if steps is not None: read_one(lambda: read_examples(steps))


anything = st.recursive(st.none() | st.booleans() | st.integers(-10**400, 10**400) | st.floats() | st.text(max_size=5) | st.just("\ud800"), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=5)


def places(x, path=()):
    "Every place in a JSON value."
    yield path
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else (): yield from places(v, (*path, k))


def changed(x, path, value):
    if not path: return value
    out = dict(x) if isinstance(x, dict) else list(x)
    out[path[0]] = changed(x[path[0]], path[1:], value)
    return out


@pytest.mark.parametrize("kind", ["aitz", "gui-odyssey", "android-control"])
@quick
@given(data=st.data())
def test_strange_json(kind, data, tmp_path_factory):
    "Any value in any place is an episode left out, or a step in the source's words."
    folder = tmp_path_factory.mktemp("strange")
    if kind == "android-control":
        actions = changed(CONTROL, data.draw(st.sampled_from(list(places(CONTROL))[1:])), data.draw(anything))
        return read_one(lambda: read_example(Example(control(1, actions))))
    path = zoo(folder, 1, WILD + [DONE]) if kind == "aitz" else odyssey(folder, 1, ODYSSEY + [("COMPLETE", "")])
    good = json.loads(path.read_text())
    path.write_text(json.dumps(changed(good, data.draw(st.sampled_from(list(places(good)))), data.draw(anything))))
    for name, make in KINDS[kind][0](folder): read_one(make)


def test_checksum_of_any_length():
    "The checksum agrees with tensorboard's."
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as theirs, masked_crc32c
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 3, 63, 64, 65, 1000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1):
        data = rng.bytes(n)
        if n <= 1000: assert masked(crc32c(data)) == masked_crc32c(data)
        assert crc32c(data) == theirs(data)
