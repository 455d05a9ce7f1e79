"""A policy whose weights are at a real vLLM, on a CPU. All of it runs in vLLM's own environment, which also has the processors of
Qwen-VL: DIGIQ_VLLM names it, tools/vllm_env.sh builds it."""
import os, re, signal, subprocess, sys, threading
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from digiq.actions import decision, press, render, tap, type_text
from digiq.core import DigiqError, seed_all
from digiq.env import prompt
from digiq.vlm.policy import VLMPolicy, VLMPolicyConfig
from digiq.vlm.served import ServedPolicy, serve
from digiq.workshop.families import random_vlm

ROOT = Path(__file__).resolve().parent.parent
there = os.environ.get("DIGIQ_VLLM")
if not there and os.environ.get("DIGIQ_CI"): raise RuntimeError("DIGIQ_VLLM is not set: build the environment with tools/vllm_env.sh and name it")
INSIDE = bool(there) and Path(sys.prefix).resolve() == Path(there).resolve()
inside = pytest.mark.skipif(not INSIDE, reason="runs in vLLM's environment, see the first test")


@pytest.mark.skipif(INSIDE, reason="this is the inside")
@pytest.mark.skipif(not there, reason="DIGIQ_VLLM names no environment with vLLM")
def test_in_vllms_environment():
    command = [f"{there}/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", __file__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " skipped" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]

PAGE = 32 # tokens; the smallest that vLLM has on a CPU
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2000", "--max-num-seqs", "16", "--block-size", str(PAGE)]
HOW = dict(llava=dict(language="mobile-use-1000", side=160), qwen=dict(language="ui-tars", side=112, screens=2, history=2))
ADAPTERS = dict(llava=0, qwen=8) # largest rank; vLLM on a CPU cannot score a prompt where a Llama's output head may be adapted
GOALS = [prompt("Buy a lamp", ""), prompt("Go to velmora.com and search for a red lamp", decision(render(press("back"))))]
ACTIONS = [render(a) for a in (tap(.5, .31), type_text('a <image> "red" </s> lamp'), press("back"))] + ["tap it!"]


def vlm_for(family):
    "A random model, with attention heads of a width that vLLM has on a CPU."
    if family == "llava": return random_vlm(family, 1) # the first that does not give the same answer to everything
    vlm = random_vlm(family)
    cfg = vlm.model.config
    cfg.text_config.update(dict(num_attention_heads=2, rope_parameters=cfg.text_config.rope_parameters | dict(mrope_section=[4, 6, 6])))
    seed_all("wider heads")
    vlm.model = type(vlm.model)(cfg).eval()
    return vlm


def noise(*numbers):
    "Screens that no others are like."
    return [Image.fromarray(np.random.default_rng(i).integers(0, 255, (60, 27, 3), np.uint8)).resize((270, 600)) for i in numbers]


def at_vllm(policy, folder, **how):
    "The policy, at a server."
    policy.save(folder/"policy")
    os.environ.update(DIGIQ_TEST_KEY="sk-served", VLLM_CPU_KVCACHE_SPACE="1")
    return serve(folder/"policy", folder/"vllm.log", OPTIONS, program=f"{there}/bin/vllm", key="DIGIQ_TEST_KEY", **how)


@pytest.fixture(scope="module", params=HOW)
def both(request, tmp_path_factory):
    "A policy here, the same at a server, and a folder."
    folder = tmp_path_factory.mktemp(request.param)
    here = VLMPolicy(vlm_for(request.param), VLMPolicyConfig(max_new_tokens=20, **HOW[request.param]))
    with at_vllm(here, folder, lora=ADAPTERS[request.param]) as server: yield here, ServedPolicy.from_pretrained(folder/"policy", server), folder


def counted(server):
    "Tokens of prompts that vLLM looked for in its cache, and those that it found there."
    text = urlopen(f"{server.url}/metrics").read().decode()
    return np.array([sum(map(float, re.findall(rf"^vllm:prefix_cache_{name}_total{{.*}} (\S+)$", text, re.M))) for name in ("queries", "hits")])


@inside
def test_greedy_answers_are_those_of_the_model_here(both):
    here, served, _ = both
    seen, goals = here.see(noise(0, 1, 2, 3), noise(4, 5, 6, 7)), GOALS*2
    wanted = here.sample(goals, seen, temperature=0)
    assert served.sample(goals, seen, temperature=0) == wanted
    assert len({answer for answer, in wanted}) > 1


@inside
def test_log_probabilities_are_those_of_the_model_here(both):
    here, served, _ = both
    seen, goals, actions = here.see(noise(0, 1)*4, noise(2, 3)*4), GOALS[:1]*4 + GOALS[1:]*4, ACTIONS*2
    with torch.no_grad(): wanted, clamped = (here.log_prob(goals, seen, actions, between) for between in ((0., 1.), (.001, .99)))
    for _ in range(2): # the second time the server has read it all before
        assert (served.log_prob(goals, seen, actions) - wanted).abs().max() < 1e-3
    assert (served.log_prob(goals, seen, actions, (.001, .99)) - clamped).abs().max() < 1e-3 < (clamped - wanted).abs().max()


@inside
def test_sixteen_answers_cost_one_reading(both):
    here, served, _ = both
    seen = here.see(noise(100), noise(101))
    length, before = here.inputs(GOALS[:1], seen)["input_ids"].shape[1], counted(served.server)
    answers, = served.sample(GOALS[:1], seen, n=16)
    asked, found = counted(served.server) - before
    assert asked == 16*length                             # as many as sixteen requests of their own read
    assert length <= asked - found <= length + 15*PAGE    # it was read once, and its end, which fills no page, by each
    assert len(set(answers)) > 8


@inside
def test_a_run_is_repeated_by_its_seed(both):
    here, served, _ = both
    one_by_one = ServedPolicy(served.vlm.processor, served.cfg, replace(served.server, clients=1))
    def drawn(seed):
        torch.manual_seed(seed)
        return one_by_one.sample(GOALS[:1]*3, here.see(noise(0, 1, 2), noise(3, 4, 5)), n=4)
    assert drawn(0) == drawn(0) != drawn(1)


@inside
@pytest.mark.parametrize("both", ["qwen"], indirect=True)
def test_an_adapter_is_loaded_while_the_server_runs(both):
    here, served, folder = both
    seen, own = here.see(noise(0, 1), noise(2, 3)), served.server
    base, answers = here.sample(GOALS, seen, temperature=0), []
    for seed in range(2): # the second one over the files of the first
        trained = VLMPolicy.from_pretrained(folder/"policy", replace(here.cfg, lora=4))
        with trained.training(): torch.manual_seed(seed)
        for name, w in trained.model.named_parameters():
            if "lora_B" in name: torch.nn.init.normal_(w, std=.1)
        trained.save(folder/"adapter")
        served.load(folder/"adapter")
        answers.append(served.sample(GOALS, seen, temperature=0))
        assert answers[-1] == trained.sample(GOALS, seen, temperature=0)
        with torch.no_grad(): wanted = trained.log_prob(GOALS, seen, ACTIONS[:2])
        assert (served.log_prob(GOALS, seen, ACTIONS[:2]) - wanted).abs().max() < 1e-3
    assert base != answers[0] != answers[1] != base
    served.server = own # asked by its own name, the model is as it was
    assert served.sample(GOALS, seen, temperature=0) == base


def of_server(folder):
    "Processes that serve a folder's model, and what they started."
    def group(pid):
        try: return os.getpgid(pid)
        except ProcessLookupError: return 0
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    lead = {group(pid) for pid in pids if str(folder/"policy").encode() in Path(f"/proc/{pid}/cmdline").read_bytes()} - {0, os.getpgid(0)}
    return [pid for pid in pids if group(pid) in lead]


@inside
@pytest.mark.parametrize("both", ["qwen"], indirect=True)
def test_a_server_that_dies_is_named(both):
    "The last test of this server: it takes it away."
    here, served, folder = both
    running = of_server(folder)
    threading.Timer(3, lambda: [os.kill(pid, signal.SIGKILL) for pid in running]).start()
    long_answers = replace(served.cfg, max_new_tokens=900) # they take a while
    impatient = ServedPolicy(served.vlm.processor, long_answers, replace(served.server, tries=2, longest_wait=.2))
    with pytest.raises(DigiqError, match=f"{served.server.url} did not answer.*2 times: see whether the server runs"):
        for _ in range(100): impatient.sample(GOALS, here.see(noise(0, 1)), n=8)
    assert len(running) > 2 and not set(running) & set(of_server(folder))


@inside
def test_a_server_that_cannot_start_says_why(tmp_path):
    here = VLMPolicy(vlm_for("qwen"), VLMPolicyConfig(**HOW["qwen"]))
    starting = at_vllm(here, tmp_path)
    (tmp_path/"policy"/"model.safetensors").unlink()
    with pytest.raises(DigiqError, match="vllm ended with status 1; the end of .*vllm.log"):
        with starting: pass
    assert not of_server(tmp_path)
