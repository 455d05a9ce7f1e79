"Embedding by a real vLLM, in process and over HTTP, in an environment of its own: DIGIQ_VLLM names it, tools/vllm_env.sh builds it."
import os, shutil, subprocess
from pathlib import Path

import numpy as np
import pytest
import standins
from PIL import Image

from digiq.actions import press, render, swipe, tap, type_text
from digiq.data import Embeddings
from digiq.vlm.hf import HFEmbedder
from digiq.phone import SimPhone
from digiq.vlm.representation import VLM, RepresentationConfig
from digiq.tasks import load

there = os.environ.get("DIGIQ_VLLM")
if not there and os.environ.get("DIGIQ_CI"): raise RuntimeError("DIGIQ_VLLM is not set: build the environment with tools/vllm_env.sh and name it")
pytestmark = pytest.mark.skipif(not there, reason="DIGIQ_VLLM names no environment with vLLM")

SETTINGS = "representation.model=tiny-vlm", "representation.embed_dtype=float32", "workers=1" # of the run that is embedded

ENGINE = """
import sys
from pathlib import Path
import numpy as np
import standins
from PIL import Image
from digiq.vlm.embedding import EmbeddingError
from digiq.vlm.vllm import VLLMEmbedder
from digiq.vlm.representation import RepresentationConfig

if __name__ == "__main__": # vLLM starts processes that import this file
    folder = Path(sys.argv[1])
    pairs = [(Image.open(folder/f"{i}.png").convert("RGB"), a) for i, a in enumerate(folder.joinpath("actions.txt").read_text().splitlines())]
    embedder = VLLMEmbedder(folder/"vlm", RepresentationConfig(embed_dtype="float32"), enforce_eager=True)
    np.save(folder/"engine.npy", embedder.embed(pairs))
    np.save(folder/"again.npy", embedder.embed(pairs[::-1])) # now from vLLM's caches
    try: embedder.embed([*pairs[:2], (pairs[0][0], "tap it!")])
    except EmbeddingError as e: assert e.pairs == [2]
    else: raise AssertionError("a malformed action must raise EmbeddingError")
    del embedder
    lab = standins.experiment(folder/"models", folder/"by_engine", *SETTINGS, "embedding.engine=vllm")
    assert lab.embed()["different"] > 0
"""

SERVER = """
import os, sys, time, subprocess
from pathlib import Path
from urllib.request import urlopen
import numpy as np
import standins
from PIL import Image
from digiq.vlm.embedding import EmbeddingError
from digiq.vlm.http import HTTPEmbedder
from digiq.vlm.representation import RepresentationConfig

folder, port = Path(sys.argv[1]), int(sys.argv[2])
pairs = [(Image.open(folder/f"{i}.png").convert("RGB"), a) for i, a in enumerate(folder.joinpath("actions.txt").read_text().splitlines())]
command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder/"vlm"), "--runner", "pooling", "--convert", "embed", "--dtype", "float32", "--enforce-eager", "--max-model-len", "400",
    "--pooler-config", '{"pooling_type": "LAST", "use_activation": false}', "--chat-template", str(folder/"vlm"/"vllm_chat_template.jinja"), "--host", "127.0.0.1", "--port", str(port), "--api-key", "secret"]
with open(folder/"server.log", "w") as log: server = subprocess.Popen(command, stdout=log, stderr=log)
address = f"http://127.0.0.1:{port}"
try:
    while True:
        if server.poll() is not None: raise SystemExit("vllm serve ended: " + (folder/"server.log").read_text()[-3000:])
        try: urlopen(f"{address}/health", timeout=5); break
        except OSError: time.sleep(.5)
    config = RepresentationConfig(embed_dtype="float32")
    np.save(folder/"server.npy", HTTPEmbedder([address], folder/"vlm", config, token="secret").embed(pairs))
    try: HTTPEmbedder([address], folder/"vlm", config, token="guess").embed(pairs[:2])
    except EmbeddingError as e: assert "answered 401" in str(e) and e.pairs == [0, 1], e
    else: raise AssertionError("a wrong token must be refused")
    os.environ["DIGIQ_EMBED_TOKEN"] = "secret"
    lab = standins.experiment(folder/"models", folder/"by_server", *SETTINGS, "embedding.engine=http", f"embedding.servers=[{address}]")
    assert lab.embed()["different"] > 0
finally:
    server.terminate()
    server.wait(60)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A run up to its fine-tuned model, real screens with actions, and what transformers makes of both."
    path, phone = tmp_path_factory.mktemp("vllm"), SimPhone()
    (path/"models").mkdir()
    standins.make(path/"models")
    lab = standins.experiment(path/"models", path/"by_transformers", *SETTINGS)
    lab.collect(); lab.featurise(); lab.propose(); lab.finetune()
    for name in "by_engine", "by_server": shutil.copytree(lab.path, path/name)
    lab.embed()
    standins.experiment(path/"models", lab.path, *SETTINGS, "embedding.engine=http", "embedding.servers=['http://127.0.0.1:1']").embedder() # exports the model
    shutil.copytree(lab.path/"checkpoints"/"representation.vllm", path/"vlm")
    vlm = VLM.load(str(lab.path/"checkpoints"/"representation"), 160)
    phone.reset(load("webshop", "train")[0], 0)
    screens = [phone.screenshot(), Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 27, 3), np.uint8)).resize((270, 600))]
    actions = [render(a) for a in (tap(.5, .3), tap(.2, .8), press("back"), type_text('<image> [IMG] "red" lamp'), type_text(""), swipe(.8, .5, .2, .5), press("enter"))]
    pairs = [(s, a) for s in screens for a in actions]
    for i, (s, _) in enumerate(pairs): s.save(path/f"{i}.png")
    (path/"actions.txt").write_text("\n".join(a for _, a in pairs))
    np.save(path/"wanted.npy", HFEmbedder(vlm, RepresentationConfig(embed_dtype="float32")).embed(pairs))
    return path


def run(code, folder, *arguments):
    "Run a program in vLLM's environment."
    (folder/"program.py").write_text(f"SETTINGS = {SETTINGS}\n{code}")
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "VIRTUAL_ENV")} | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    done = subprocess.run([f"{there}/bin/python", str(folder/"program.py"), str(folder), *map(str, arguments)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def far(found, wanted):
    "Largest difference, relative to the size of a vector."
    return (np.linalg.norm(found.astype(float) - wanted, axis=1)/np.linalg.norm(wanted.astype(float), axis=1)).max()


def same_run(folder, name):
    "Whether an engine's run has the embeddings of transformers' run."
    wanted, found = (Embeddings(folder/n/"embeddings") for n in ("by_transformers", name))
    rows = np.arange(len(wanted))
    return len(found) == len(wanted) and found.different == wanted.different and far(found[rows], wanted[rows]) < 1e-3


def test_engine_gives_the_vectors_of_transformers(folder):
    run(ENGINE, folder)
    wanted, found, again = (np.load(folder/f"{n}.npy") for n in ("wanted", "engine", "again"))
    assert found.dtype == np.float16 and found.shape == wanted.shape
    assert far(found, wanted) < 1e-3 and far(again[::-1], wanted) < 1e-3
    assert same_run(folder, "by_engine")


def test_server_gives_the_vectors_of_transformers(folder):
    from socket import socket
    with socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    run(SERVER, folder, port)
    wanted, found = (np.load(folder/f"{n}.npy") for n in ("wanted", "server"))
    assert found.dtype == np.float16 and far(found, wanted) < 1e-3
    assert same_run(folder, "by_server")
