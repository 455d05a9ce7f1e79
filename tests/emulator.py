"A program with the command line of Android's emulator and the built-in phone inside; the name of its AVD says how it behaves: it may be some of the `Traits`, with dots between."
import itertools, os, signal, socket, sys, time
from pathlib import Path
words = sys.argv[1:]
matrix = [".".join(some) for n in range(1, 5) for some in itertools.combinations(("displays", "landscape", "no_keyboard", "no_shell_v2"), n)]
traits = (*matrix, "unauthorised", "offline", "refuses")
if words == ["-list-avds"]: sys.exit(print("INFO    | Storing crashdata", "slow", "loop", "crash", "once", "half", "stubborn", *traits, sep="\n"))
option = dict(zip(words, words[1:]))
kind, port, mark = option["-avd"], int(option["-port"]), Path(__file__).with_name("mark")
if kind == "crash" or kind == "once" and not mark.exists() or kind == "half" and port % 4 == 0:
    mark.touch()
    sys.exit("ERROR   | Not enough space to create userdata partition")
if home := os.environ.get("ANDROID_AVD_HOME"): # where it keeps its disks
    folder = Path((Path(home)/f"{kind}.ini").read_text().strip().removeprefix("path="))
    if "-read-only" not in words: (folder/"written").write_text(f"emulator-{port}")
def linger(*_): # 3 s, then end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(3)
    os._exit(0)
if kind == "stubborn": signal.signal(signal.SIGTERM, linger)
from digiq.play.adbd import Adbd
from digiq.play.android import Android, Traits
from digiq.phone import SimPhone
android = Android(SimPhone(), f"EMULATOR{port}", traits=Traits(**{name: ("pm clear",) if name == "refuses" else True for name in kind.split(".") if kind in traits}))
android.properties["sys.boot_completed"] = ""
with socket.create_server(("127.0.0.1", port)), Adbd([android], port=port + 1):
    message = f"host:emulator:{port + 1}".encode()
    with socket.create_connection(("127.0.0.1", int(os.environ["ANDROID_ADB_SERVER_PORT"]))) as s: s.sendall(b"%04x" % len(message) + message)
    time.sleep(.5)
    if kind != "loop": android.properties["sys.boot_completed"] = "1"
    while True: time.sleep(1)
