"What a phone over adb does when text is hostile and links, servers and answers fail."
import asyncio, os, shutil, socket, subprocess, threading
from contextlib import contextmanager

import pytest
from adbutils import AdbClient
from hypothesis import given, settings
from hypothesis import strategies as st

from digiq.play import adbd
from digiq.play.adb import AdbDevice, AdbSettings
from digiq.play.adbd import Adbd, adb_server
from digiq.play.android import COMMANDS, Android
from digiq.env import DeviceError
from digiq.phone import SimPhone

adb = shutil.which("adb")
if not adb:
    if os.environ.get("DIGIQ_CI"): raise RuntimeError("adb is missing: apt-get install adb")
    pytest.skip("adb is missing: apt-get install adb", allow_module_level=True)

quick, brief = AdbSettings(limit=20, settle=0, pause=.01), AdbSettings(limit=.5, settle=0)
hostile = st.text(st.one_of(st.sampled_from("$()`;|&<>\"'\\%s \n\t*?~#-!{}[]"), st.characters(exclude_categories=["Cs"])), max_size=20)


@pytest.fixture(scope="module")
def server():
    with adb_server(adb) as port: yield port


@contextmanager
def phone():
    "A phone behind adb, and the device that drives it."
    android = Android(SimPhone(disturbance=0))
    with Adbd([android]) as served: yield android, AdbDevice(connected(served.addresses[0]), quick)


def connected(address):
    AdbClient().connect(address, timeout=60)
    return address


def test_typed_text_arrives_as_it_is_and_nothing_else_runs(server):
    with phone() as (android, device):
        arrived = []
        android.phone.type_text = arrived.append

        @settings(max_examples=60, deadline=None, database=None)
        @given(hostile)
        def types(text):
            arrived.clear()
            android.log.clear()
            device.type_text(text)
            assert "".join(arrived) == text
            assert {words[0] for words in android.log} <= {"input", "ime", "settings", "dumpsys", "am"}
        types()


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20))
def test_a_real_shell_sees_one_word(text):
    "adbutils quotes the words; this is what `sh` makes of its line."
    from adbutils._utils import list2cmdline
    line = list2cmdline(["printf", "%s|", text])
    assert subprocess.run(["sh", "-c", line], capture_output=True, check=True).stdout.decode() == text + "|"


class Proxy:
    "Passes an address on; `cut_after` bytes from the phone it drops the link, once."
    def __init__(self, address):
        self.target, self.cut_after, self.pairs = address.split(":"), None, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:{}".format(self.listener.getsockname()[1])
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try: here, _ = self.listener.accept()
            except OSError: return
            there = socket.create_connection((self.target[0], int(self.target[1])))
            self.pairs.append((here, there))
            for pair in ((here, there, False), (there, here, True)): threading.Thread(target=self.pass_on, args=pair, daemon=True).start()

    def pass_on(self, source, sink, counted):
        try:
            while data := source.recv(1 << 14):
                if counted and self.cut_after is not None:
                    self.cut_after -= len(data)
                    if self.cut_after < 0:
                        self.cut_after = None
                        break
                sink.sendall(data)
        except OSError: pass
        for s in (source, sink):
            try: s.shutdown(socket.SHUT_RDWR)
            except OSError: pass

    def __enter__(self): return self
    def __exit__(self, *_):
        self.listener.close()
        for pair in self.pairs:
            for s in pair: s.close()


def test_link_cut_in_the_middle_of_a_screenshot(server):
    with Adbd([android := Android(SimPhone(disturbance=0))]) as served, Proxy(served.addresses[0]) as proxy:
        device = AdbDevice(connected(proxy.address), quick)
        device.way = "screencap"
        proxy.cut_after = 300_000
        assert device.screenshot().tobytes() == android.phone.screenshot().tobytes()
        assert len(proxy.pairs) == 2 and proxy.cut_after is None


def test_link_cut_in_the_middle_of_a_tap_is_not_tapped_again(server, monkeypatch):
    with Adbd([android := Android(SimPhone(disturbance=0))]) as served, Proxy(served.addresses[0]) as proxy:
        device, taps = AdbDevice(connected(proxy.address), quick), []
        android.phone.tap = lambda *at: (taps.append(at), setattr(proxy, "cut_after", 0))
        with pytest.raises(DeviceError): device.tap(.5, .5)
        assert len(taps) == 1
        assert device.screenshot().size == android.phone.size


@pytest.mark.parametrize("answer", [b"", b"garbage", bytes(100), b"\xff" * 1000, b"\x89PNG\r\n\x1a\n" + b"x" * 50])
def test_device_that_answers_with_garbage(server, monkeypatch, answer):
    with phone() as (android, device):
        device.cfg = brief
        monkeypatch.setitem(COMMANDS, "screencap", lambda android, words: answer)
        for device.way in ("screencap", "screencap -p"):
            with pytest.raises(DeviceError, match="screenshot"): device.screenshot()


def test_device_that_hangs_is_given_up_in_time(server, monkeypatch):
    async def never(stream, android, modifiers, line): await asyncio.Event().wait()
    async def drip(stream, android, modifiers, line):
        while True:
            await stream.write(b"x")
            await asyncio.sleep(.05)
    with phone() as (android, device):
        device.cfg = brief
        for service in (never, drip):
            monkeypatch.setitem(adbd.SERVICES, "exec", service)
            monkeypatch.setitem(adbd.SERVICES, "shell", service)
            with pytest.raises(DeviceError, match="within 0.5 s"): device.screenshot()
            with pytest.raises(DeviceError): device.tap(.5, .5)


def test_adb_server_that_is_killed_comes_back():
    with adb_server(adb) as port, phone() as (android, device):
        subprocess.run([adb, "-P", str(port), "kill-server"], check=True, timeout=30)
        try: assert device.screenshot().tobytes() == android.phone.screenshot().tobytes()
        finally: subprocess.run([adb, "-P", str(port), "kill-server"], timeout=30)
