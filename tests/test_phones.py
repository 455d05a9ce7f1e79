"What real phones print, by the kinds in which people met it: every trait of the built-in phone, alone and together, over a real adb server."
import io, os, shutil, socket, threading
from contextlib import contextmanager
from itertools import product

import pytest
from adbutils import AdbClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from digiq.play import adbd
from digiq.play.adb import ADB_KEYBOARD, AdbDevice, AdbSettings, Refused, ask_phone, complaint, find_devices, read_picture, read_rotation
from digiq.play.adbd import Adbd, adb_server
from digiq.play.android import COMMANDS, DISPLAYS, Android, ShellError, Traits, block
from digiq.play.pool import as_listed, open_devices
from digiq.env import DeviceEnv, DeviceError, check_device
from digiq.phone import SimPhone
from digiq.runs import device_settings, load_preset
from digiq.tasks import load

adb = shutil.which("adb")
if not adb:
    if os.environ.get("DIGIQ_CI"): raise RuntimeError("adb is missing: apt-get install adb")
    pytest.skip("adb is missing: apt-get install adb", allow_module_level=True)

quick, brief = AdbSettings(limit=20, settle=0, pause=.01), AdbSettings(limit=2, settle=0)
task = load("webshop", "train")[2]
blank = "adb-2233fd19-9mU6UL (2)._adb-tls-connect._tcp"


@pytest.fixture(scope="module", autouse=True)
def server():
    with adb_server(adb) as port: yield port


@contextmanager
def phone(**traits):
    "A phone with these traits behind adb, and its address."
    android = Android(SimPhone(disturbance=0), traits=Traits(**traits))
    with Adbd([android]) as served: yield android, served.addresses[0]


@pytest.mark.parametrize("displays, landscape, no_keyboard, no_shell_v2", list(product((False, True), repeat=4)))
def test_every_phone_keeps_the_contract(displays, landscape, no_keyboard, no_shell_v2):
    with phone(displays=displays, landscape=landscape, no_keyboard=no_keyboard, no_shell_v2=no_shell_v2) as (android, address):
        device = AdbDevice(address, quick)
        check_device(device, task)
        assert device.size == ((600, 270) if landscape else (270, 600)) and android.keyboard != ADB_KEYBOARD
        for turn in (1, 3, 0):
            android.settings["system"] |= dict(accelerometer_rotation="0", user_rotation=str(turn))
            assert device.screenshot().tobytes() == android.phone.screenshot().resize(device.size).tobytes()
            assert android.point(*device._pixels(.25, .125)) == (.25, .125)


# A. What a phone answers begins where it likes

two = b"[Warning] Multiple displays were found, but no display id was specified!\nA display ID can be specified with the [-d display-id] option.\n"


@pytest.mark.parametrize("said", [two, b"warning: x\r\n", "Warnung: größer\n".encode(), b"a line without an end", b"\n" * 9, b"WARNING: linker: a.so\n" * 100])
def test_words_before_a_picture(monkeypatch, said):
    plain = COMMANDS["screencap"]
    monkeypatch.setitem(COMMANDS, "screencap", lambda android, words: said + plain(android, words))
    with phone() as (android, address):
        for way in ("screencap", "screencap -p"):
            device = AdbDevice(address, quick)
            device.way = way
            assert device.screenshot().tobytes() == android.phone.screenshot().tobytes()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200).filter(lambda said: b"PNG" not in said), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.booleans())
def test_the_picture_is_found_behind_any_words(said, width, height, raw, space):
    picture = Image.new("RGB", (width, height), (1, 0, 0))
    data = b"".join(n.to_bytes(4, "little") for n in (width, height, 1, *(0,) * space)) + picture.convert("RGBA").tobytes()
    if not raw:
        picture.save(out := io.BytesIO(), "PNG")
        data = out.getvalue()
    assert read_picture(said + data)[0].tobytes() == picture.tobytes()


def test_the_display_that_apps_know_is_asked_for():
    with phone(displays=True) as (android, address):
        assert AdbDevice(address, quick).way.endswith(f" -d {DISPLAYS[0]}")


@pytest.mark.parametrize("traits, why", [(dict(unauthorised=True), "not authorised: unlock the phone and allow this computer"), (dict(offline=True), "offline: plug it in again")])
def test_what_failed_last_is_told(traits, why):
    with phone(**traits) as (android, address), pytest.raises(DeviceError, match=f"connecting: not done within 5 s .last: {why}"):
        AdbClient().disconnect(address)
        try: AdbClient().connect(address, timeout=1)
        except Exception: pass
        AdbDevice(address, AdbSettings(limit=5, settle=0))


def test_phones_that_are_not_ready_are_told_apart():
    with phone(unauthorised=True) as (android, address):
        AdbClient().connect(address, timeout=60)
        with pytest.raises(DeviceError, match=f"{address} is not authorised"): find_devices()
        AdbClient().disconnect(address)


def test_an_address_without_a_phone():
    with pytest.raises(DeviceError, match="2 s .last: failed to connect to '?127.0.0.1:1'?: Connection refused"): AdbDevice("127.0.0.1:1", brief)


def test_what_is_no_picture_is_quoted(monkeypatch):
    def fails(android, words): raise ShellError("Failed to take screenshot. Status: -2")
    monkeypatch.setitem(COMMANDS, "screencap", fails)
    with phone() as (android, address), pytest.raises(DeviceError, match="last: no whole picture from screencap but .*Status: -2"): AdbDevice(address, brief)


# B. Real dumps hold more than one's own

OTHERS = ["mLandscapeRotation=ROTATION_90 mSeascapeRotation=ROTATION_270", "mPortraitRotation=ROTATION_0 mUpsideDownRotation=ROTATION_180", "mUserRotation=ROTATION_0", "mDemoRotation=ROTATION_90",
          *(f"ROTATION_{90 * n}={{nonDecorInsets=Rect(0, 24 - 0, 0)}}" for n in range(4)), "mLastOrientation=-1", "bounds rotation=2", "mCurrentAppOrientation=SCREEN_ORIENTATION_LANDSCAPE"]
OWN = ["mRotation={n} mDeferredRotationPauseCount=0", "DisplayFrames w=9 h=9 r={n}", "DisplayFrames r={n} w=9 h=9", "mConfig={{mDisplayRotation=ROTATION_{d} mRotation=ROTATION_{d}}}", "mRotation=ROTATION_{d}",
       "mCurrentRotation=ROTATION_{d}", "mCurrentRotation={n}"]


@st.composite
def displays(draw):
    "A dump of one to three displays, and how display 0 lies."
    turns, blocks = draw(st.integers(0, 3)), []
    for number in draw(st.permutations([0, 2, 11][:draw(st.integers(1, 3))])):
        n = turns if number == 0 else draw(st.integers(0, 3))
        lines = draw(st.lists(st.sampled_from(OTHERS))) + [line.format(n=n, d=90 * n) for line in draw(st.lists(st.sampled_from(OWN), min_size=1))]
        blocks.append(f"  Display: mDisplayId={number}{draw(st.sampled_from(['', ' (organized)', ' rootTasks=7']))}\n" + "".join(f"    {line}\n" for line in draw(st.permutations(lines))))
    return ("WINDOW MANAGER DISPLAY CONTENTS (dumpsys window displays)\n" + "".join(blocks)).replace("\n", draw(st.sampled_from(["\n", "\r\n"]))), turns


@settings(max_examples=300, deadline=None)
@given(displays())
def test_the_rotation_is_read_from_any_dump(case):
    dump, turns = case
    assert read_rotation(dump) == turns


BUILT_IN = 'DisplayInfo{{"Built-in Screen", displayId 0", real 1080 x 2400, modes [{{id=1, width=1080}}], rotation {}, state ON}}'
VERSIONS = {
    "Android 8": ("  Display: mDisplayId=0\n    init=1080x1920 480dpi cur=1080x1920\n    deferred=false layoutNeeded=false\n\n  mRotation=0 mAltOrientation=false\n  mLastWindowForcedOrientation=-1 mForcedAppOrientation=-1\n", 0),
    "Android 9": ("  Display: mDisplayId=0\n    init=1080x2160 420dpi cur=2160x1080 app=2034x1080\n  DisplayFrames w=2160 h=1080 r=1\n    mStable=[0,63][2034,1080]\n", 1),
    "Android 12": ("  Display: mDisplayId=0 rootTasks=6\n    winConfig={ mBounds=Rect(0, 0 - 3200, 1440) mDisplayWindowingMode=fullscreen mRotation=ROTATION_270}\n", 3),
    "an old viewport": ("  mDefaultViewport=DisplayViewport{valid=true, displayId=0, orientation=3, logicalFrame=Rect(0, 0 - 2400, 1080)}", 3),
    "displays": (f"  mBaseDisplayInfo={BUILT_IN.format(0)}\n  mOverrideDisplayInfo={BUILT_IN.format(1)}\n", 1),
    "input before Android 14": ("    Viewport EXTERNAL: displayId=2, port=1, orientation=3, logicalFrame=[0, 0]\n    Viewport INTERNAL: displayId=0, uniqueId=local:46, port=0, orientation=1, logicalFrame=[0, 0, 2400, 1080]\n    InputDeviceOrientation: 0\n", 1),
    "input from Android 14 on": ("    Viewport INTERNAL: displayId=0, uniqueId=local:46, port=0, orientation=Rotation270, logicalFrame=[0, 0, 2400, 1080]\n    InputDeviceOrientation: Rotation0\n", 3)}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_of_android_tells_its_rotation(version): assert read_rotation(VERSIONS[version][0]) == VERSIONS[version][1]


@pytest.mark.parametrize("dump, turns", [("  SurfaceOrientation: 1\n  SurfaceWidth: 600px", 1), ("no word of it", None), ("", None), ("mRotation=undefined mCurrentRotation=ROTATION_180", 2), (block(2, (1, 2), 3) + block(0, (2, 1), 0), 0)])
def test_other_dumps(dump, turns): assert read_rotation(dump) == turns


@pytest.mark.parametrize("landscape", [False, True])
@pytest.mark.parametrize("turn", "013")
def test_without_dumps_the_size_tells_upright(monkeypatch, landscape, turn):
    def nothing(android, words): raise ShellError("Can't find service: window", 20)
    monkeypatch.setitem(COMMANDS, "dumpsys", nothing)
    with phone(landscape=landscape) as (android, address):
        android.settings["system"] |= dict(accelerometer_rotation="0", user_rotation=turn)
        assert AdbDevice(address, quick).size == ((600, 270) if landscape else (270, 600))


# C. "Cannot" is not "broken"

@pytest.mark.parametrize("refuses", ["ime list", "ime enable", "ime set", "am broadcast"])
def test_a_phone_that_will_not_type_plays_on(refuses):
    with phone(refuses=(refuses,)) as (android, address):
        env = DeviceEnv(AdbDevice(address, quick), [task], evaluator=ask_phone)
        env.reset(seed=1)
        error = env.step('Action Plan: [TYPE] ; Action Decision: "action_type": "TYPE", "touch_point": "[-1.0, -1.0]", "lift_point": "[-1.0, -1.0]", "typed_text": "日本"')[4]["error"]
        assert f"{refuses}: java.lang.SecurityException" in error and "cannot type '日本'" in error
        assert env.running and android.keyboard != ADB_KEYBOARD


@pytest.mark.parametrize("value", ["null", "", "com.android.adbkeyboard/.AdbIME"])
def test_a_keyboard_that_is_not_named(value):
    with phone() as (android, address):
        android.settings["secure"]["default_input_method"] = value
        device = AdbDevice(address, quick)
        device.type_text("日本")
        assert android.keyboard == android.keyboards[0]
        device.reset(task, 1)
        assert ("ime", "set", "null") not in android.log


def test_a_reset_without_keyboards():
    with phone(refuses=("ime",)) as (android, address):
        android.keyboard = android.settings["secure"]["default_input_method"] = ADB_KEYBOARD
        AdbDevice(address, quick).reset(task, 1)


# D. The reason stands on the second line

@pytest.mark.parametrize("no_shell_v2", [False, True])
@pytest.mark.parametrize("refuses, call, why", [("settings put", lambda d: d.reset(task, 1), "settings put: .*WRITE_SECURE_SETTINGS.*developer options"), ("input tap", lambda d: d.tap(.5, .5), "input tap: .*INJECT_EVENTS permission.*Xiaomi"),
    ("input text", lambda d: d.type_text("a"), "input text: .*INJECT_EVENTS"), ("pm clear", lambda d: d.reset(task, 1), "pm clear: .*CLEAR_APP_USER_DATA.*devices.adb.packages")])
def test_the_permission_is_named(no_shell_v2, refuses, call, why):
    with phone(refuses=(refuses,), no_shell_v2=no_shell_v2) as (android, address):
        with pytest.raises(Refused, match=why) as e: call(AdbDevice(address, quick))
        assert "\n" not in str(e.value) and "Exception occurred" not in str(e.value) and ("no shell v2" in str(e.value)) == no_shell_v2


@pytest.mark.parametrize("no_shell_v2", [False, True])
def test_an_app_that_is_not_there(no_shell_v2):
    with phone(no_shell_v2=no_shell_v2) as (android, address):
        with pytest.raises(Refused, match="pm clear: Failed.*com.nowhere is not installed.*devices.adb.packages"): AdbDevice(address, AdbSettings(settle=0, packages=("com.nowhere",))).reset(task, 1)


@pytest.mark.parametrize("out, err, why", [("Error: no such thing\n", "", "Error: no such thing"), ("", "cmd: Can't find service: input\n", "cmd: Can't find service: input"), ("Security exception: Permission Denial\n\njava.lang.SecurityException: x\n", "", "Security exception"),
    ("", "com.miui.guard.TouchDeniedException: no\n", "com.miui.guard.TouchDeniedException"), ("Permission denied\n", "", "Permission denied"), ("Failure [not allowed]\n", "", "Failure"),
    ("", "Attempt to invoke virtual method 'int length()' on a null object reference\n", "Attempt to invoke"), ("Error type 3\nStarting: Intent\n", "", "Error type 3"),
    ("Unknown id: a/.B\n", "", "Unknown id: a/.B"), ("", "sh: input: not found\n", "sh: input: not found"), ("args: [-p, a]\n", "** No activities found to run, monkey aborted.\n", "** No activities found"), ("", "Must have permission a.b.C\n", "Must have permission"),
    ("", 'Exception in thread "main" java.lang.SecurityException: why\n', "Exception in thread"), ("", "*** SECURITY EXCEPTION: why\n", "*** SECURITY EXCEPTION"),
    ("", "WARNING: linker: a.so\r\njava.lang.SecurityException: why\r\n\tat a.b.C(D.java:1)\r\n", "java.lang.SecurityException: why")])
def test_a_failure_with_status_0_is_a_failure(out, err, why):
    assert complaint(("am", "start"), out, err, 0).startswith(why)


def test_a_shell_that_is_announced_and_closed(monkeypatch):
    plain = adbd.Link.open
    async def closes(link, theirs, data):
        await plain(link, theirs, b"nothing:\0" if data.startswith(b"shell,v2") else data)
    monkeypatch.setattr(adbd.Link, "open", closes)
    with phone() as (android, address):
        device = AdbDevice(address, quick)
        check_device(device, task)
        with pytest.raises(Refused, match="no shell v2, which came with Android 7"): device.shell("false")


# E. Names are text

class Renamed:
    "An adb server that lists phones under other names, and refuses some; the rest it leaves to the real one."
    def __init__(self, port, listed, names, refused={}):
        self.port, self.listed, self.names, self.refused = port, listed, names, refused
        self.socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self):
        os.environ["ANDROID_ADB_SERVER_PORT"] = str(self.socket.getsockname()[1])
        return self

    def __exit__(self, *_):
        os.environ["ANDROID_ADB_SERVER_PORT"] = str(self.port)
        self.socket.close()

    def accept(self):
        while True:
            try: here, _ = self.socket.accept()
            except OSError: return
            threading.Thread(target=self.serve, args=(here,), daemon=True).start()

    def serve(self, here):
        what = here.recv(int(here.recv(4) or b"0", 16)).decode()
        for name, address in self.names.items(): what = what.replace(name, address)
        fault = next((why for name, why in self.refused.items() if name in what), None)
        if what == "host:devices" or fault:
            text = (fault or self.listed).encode()
            here.sendall((b"FAIL" if fault else b"OKAY") + b"%04x" % len(text) + text)
            return here.close()
        there = socket.create_connection(("127.0.0.1", self.port))
        there.sendall(b"%04x" % len(what.encode()) + what.encode())
        for a, b in ((here, there), (there, here)): threading.Thread(target=self.pass_on, args=(a, b), daemon=True).start()

    def pass_on(self, source, sink):
        try:
            while data := source.recv(1 << 16): sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError: pass


def test_a_serial_with_a_blank_is_one_phone(server, tmp_path):
    with phone() as (android, address):
        AdbClient().connect(address, timeout=60)
        with Renamed(server, f"{blank}\tdevice\n", {blank: address}):
            assert find_devices() == [blank]
            assert AdbDevice(blank, quick).screenshot().size == (270, 600)
            asked = load_preset("smoke", devices=device_settings("adb", blank)).devices
            with open_devices(asked, tmp_path) as makers: assert len(makers) == 1 and makers[0]([task], 3).reset(seed=1)
        AdbClient().disconnect(address)


@pytest.mark.parametrize("state, why", [("no permissions (user in plugdev group; are your udev rules wrong?); see [http://developer.android.com/tools/device.html]", "not open to this user: add udev rules"),
    ("no permissions", "not open to this user"), ("unauthorized", "not authorised: unlock the phone and allow this computer"), ("authorizing", "not authorised"), ("offline", "offline: plug it in"),
    ("connecting", "still connecting"), ("sideload", "not in Android"), ("recovery", "not in Android: restart the phone"), ("something new", "something new")])
def test_the_state_of_a_phone_says_what_to_do(server, state, why):
    with Renamed(server, f"4 5\t{state}\nother one\toffline\n", {}), pytest.raises(DeviceError) as e: find_devices()
    assert str(e.value).startswith(f"4 5 is {why}") and str(e.value).count(" is ") == 2 and "other one is offline" in str(e.value)


def test_a_phone_that_may_not_be_opened(server):
    fault = "insufficient permissions for device: user in plugdev group; are your udev rules wrong?\nSee [http://developer.android.com/tools/device.html] for more information"
    with Renamed(server, "", {}, {"4711": fault}), pytest.raises(DeviceError, match="4711: connecting: not done within 2 s .last: not open to this user: add udev rules"): AdbDevice("4711", brief)


def test_zeros_that_papermill_drops_come_back(server):
    with Renamed(server, "00123\tdevice\n24332524704069\tdevice\n007\tdevice\n07\tdevice\n", {}):
        assert [as_listed(s) for s in ("123", "24332524704069", "007", "7", "9", "x")] == ["00123", "24332524704069", "007", "7", "9", "x"]
