"The built-in phone as Debian's adb sees it, and what hostile bytes do to its port."
import hashlib, os, random, shutil, signal, socket, subprocess, sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from digiq.play import adbd
from digiq.play.adbd import LARGEST, Adbd, adb_server, pack
from digiq.play.android import Android, ShellError, parse_line
from digiq.phone import SimPhone

adb = shutil.which("adb")
if not adb:
    if os.environ.get("DIGIQ_CI"): raise RuntimeError("adb is missing: apt-get install adb")
    pytest.skip("adb is missing: apt-get install adb", allow_module_level=True)


def call(*words, **kw):
    "Run Debian's client."
    return subprocess.run([adb, *words], capture_output=True, timeout=30, **kw)


@pytest.fixture(scope="module")
def phones():
    androids = [Android(SimPhone(disturbance=0), f"simphone-{i}") for i in range(2)]
    with adb_server(adb), Adbd(androids) as server:
        for address in server.addresses: assert b"connected to" in call("connect", address).stdout
        yield list(zip(server.addresses, androids))


def test_lists_every_phone(phones):
    listed = call("devices", "-l").stdout.decode()
    for address, _ in phones: assert f"{address}" in listed and "model:SimPhone" in listed
    assert listed.count("device product:simphone") == 2


def test_shell_tells_output_errors_and_status_apart(phones):
    done = call("-s", phones[0][0], "shell", "echo out; nothing; exit 7")
    assert (done.stdout, done.returncode) == (b"out\n", 7) and b"not found" in done.stderr


def test_shell_without_a_command_reads_lines(phones):
    done = call("-s", phones[0][0], "shell", input=b"echo one\necho two\nexit 3\necho three\n")
    assert (done.stdout, done.returncode) == (b"one\ntwo\n", 3)
    done = call("-s", phones[0][0], "shell", input=b"false && exit 5\n\necho one; exit 4; echo two\necho three\n")
    assert (done.stdout, done.returncode) == (b"one\n", 4)


@pytest.mark.parametrize("line, status, said", [("exit 300; echo x", 44, b""), ("input tap nan nan", 255, b"Invalid arguments"), ("input swipe 1 2 nan 4", 255, b"Invalid arguments"),
    ("pm list packages ''", 0, b""), ("uiautomator dump ''", 1, b"No such file"), ("am start -d 'http://['", 255, b"Exception occurred while executing 'start':\nValueError")])
def test_a_line_that_fails_ends(phones, line, status, said):
    done = call("-s", phones[0][0], "shell", line)
    assert done.returncode == status and said in done.stderr and b"x\n" not in done.stdout


def test_a_service_that_breaks_ends(phones, monkeypatch):
    async def breaks(stream, android, modifiers, line): raise KeyError(line)
    monkeypatch.setitem(adbd.SERVICES, "exec", breaks)
    assert call("-s", phones[0][0], "exec-out", "screencap").stdout == b""
    assert call("-s", phones[0][0], "shell", "echo", "here").stdout == b"here\n"


def test_pictures_over_exec_and_over_a_file(phones, tmp_path):
    address, android = phones[0]
    android.phone.reset(None, 0)
    raw = call("-s", address, "exec-out", "screencap").stdout
    assert raw[16:] == android.phone.screenshot().convert("RGBA").tobytes()
    call("-s", address, "shell", "screencap", "-p", "/sdcard/s.png", check=True)
    call("-s", address, "pull", "/sdcard/s.png", tmp_path/"s.png", check=True)
    assert (tmp_path/"s.png").read_bytes() == call("-s", address, "exec-out", "screencap", "-p").stdout


def test_drives(phones):
    address, android = phones[1]
    android.phone.reset(None, 0)
    y0, x0, y1, x1 = android.phone.screen().target(("launch", "browser")).box
    call("-s", address, "shell", "input", "tap", str((x0 + x1) / 2 * 270), str((y0 + y1) / 2 * 600), check=True)
    assert b"com.android.chrome" in call("-s", address, "shell", "dumpsys", "window").stdout


def test_push_pull_and_list(phones, tmp_path):
    address = phones[0][0]
    data = random.Random(0).randbytes(3 * LARGEST + 5)
    (tmp_path/"there").write_bytes(data)
    call("-s", address, "push", tmp_path/"there", "/sdcard/däta.bin", check=True)
    call("-s", address, "pull", "/sdcard/däta.bin", tmp_path/"back", check=True)
    assert hashlib.sha256((tmp_path/"back").read_bytes()).digest() == hashlib.sha256(data).digest()
    assert "däta.bin" in call("-s", address, "ls", "/sdcard").stdout.decode()
    assert call("-s", address, "pull", "/sdcard/none", tmp_path/"x").returncode != 0


def test_unknown_service_is_refused_and_the_link_lives(phones):
    address = phones[0][0]
    assert b"closed" in call("-s", address, "root").stderr
    assert call("-s", address, "shell", "echo", "here").stdout == b"here\n"


HELLO = pack(b"CNXN", 0x01000000, LARGEST, b"host::\0")
BROKEN = [HELLO + pack(b"OPEN", 1, 0, b"shell:echo x\0") * 200, HELLO + pack(b"OPEN", 1, 0, b"sync:\0") + pack(b"WRTE", 1, 1, b"SEND\xff\xff\xff\xff"),
          HELLO + pack(b"OPEN", 1, 0, b"shell,v2:\0") + pack(b"WRTE", 1, 1, b"\0\xff\xff\xff\xff"), HELLO + pack(b"WRTE", 1, 9, b"x"), pack(b"OPEN", 1, 0, b"shell:ls\0"),
          HELLO + pack(b"OPEN", 1, 0, b"sync:\0") + pack(b"WRTE", 1, 1, b"x") * 9, pack(b"CNXN", 0x01000000, 0, b""), HELLO[:-1] + b"!"]


def speak(address, data):
    "Send bytes and read until the other side hangs up."
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), 10) as s:
        s.settimeout(10)
        try:
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)
            while s.recv(1 << 16): pass
        except ConnectionError: pass


def test_bytes_that_are_no_protocol_do_nothing(phones):
    address, android = phones[0]
    before, rng = android.phone.state(), random.Random(0)
    for data in BROKEN: speak(address, data)
    for i in range(100): speak(address, (HELLO if i % 2 else b"") + rng.randbytes(100))
    for i in range(200):
        whole = bytearray(HELLO + pack(b"OPEN", 1, 0, b"shell,v2:echo x\0") + pack(b"OKAY", 1, 1))
        whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        speak(address, bytes(whole))
    assert android.phone.state() == before
    assert call("-s", address, "shell", "echo", "here").stdout == b"here\n"


def test_a_name_that_is_no_text_is_answered(phones):
    host, _, port = phones[0][0].partition(":")
    with socket.create_connection((host, int(port)), 10) as s:
        s.settimeout(10)
        s.sendall(HELLO + pack(b"OPEN", 1, 0, b"sync:\0") + pack(b"WRTE", 1, 1, b"RECV\5\0\0\0/sd/\xff"))
        said = b""
        while b"/sd/\xff: No such file" not in said and (data := s.recv(1 << 16)): said += data
    assert b"FAIL" in said


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab ';\"\\$&|\n\t%*~#(`é"), max_size=12))
@example("\\; \\\n")
@example("a\\\nb")
def test_the_shell_takes_a_line_as_a_real_one_does_or_not_at_all(words):
    line = f"printf '[%s]' {words}"
    try: (_, (_, _, *mine)), = parse_line(line)
    except (ShellError, ValueError): return # refused, or several commands
    real = subprocess.run(["sh", "-c", line], capture_output=True, check=True, cwd="/").stdout
    assert real.decode() == "".join(f"[{''.join(w)}]" for w in mine or [""])


def test_serves_from_the_command_line():
    command = [sys.executable, "-m", "digiq", "serve-phone", "--phones", "2", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        addresses = [process.stdout.readline().split()[-1] for _ in range(2)]
        assert all(a.startswith("127.0.0.1:") for a in addresses) and len(set(addresses)) == 2
        taken = subprocess.run([*command[:-1], addresses[0].split(":")[1]], capture_output=True, text=True, timeout=60)
        assert taken.returncode == 1 and "choose another port" in taken.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0 and process.stderr.read() == ""


@pytest.mark.parametrize("words, status, why", [(["--phones", "0"], 2, "--phones must be"), (["--scale", "nan"], 2, "--scale must be"), (["--scale", "0"], 2, "--scale must be"),
    (["--phones", "4", "--port", "65533"], 1, "choose another port"), (["--port", "70000"], 1, "choose another port")])
def test_command_line_that_cannot_be_served(words, status, why):
    done = subprocess.run([sys.executable, "-m", "digiq", "serve-phone", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == status and why in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
