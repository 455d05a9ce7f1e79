"A policy whose weights are at a real vLLM, on a CPU, in an environment of its own: DIGIQ_VLLM names it, tools/vllm_env.sh builds it."
import os, re, signal, subprocess, threading, time
from dataclasses import replace
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from digiq.actions import decision, press, render, tap, type_text
from digiq.core import DigiqError
from digiq.env import prompt
from digiq.vlm.policy import VLMPolicy
from digiq.vlm.served import Server, ServedPolicy, serve
from digiq.workshop import families

there = os.environ.get("DIGIQ_VLLM")
if not there and os.environ.get("DIGIQ_CI"): raise RuntimeError("DIGIQ_VLLM is not set: build the environment with tools/vllm_env.sh and name it")
pytestmark = pytest.mark.skipif(not there, reason="DIGIQ_VLLM names no environment with vLLM")

PAGE = 32 # tokens; the smallest that vLLM has on a CPU
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2000", "--max-num-seqs", "32", "--block-size", str(PAGE), "--limit-mm-per-prompt", '{"image": 1}']
LANGUAGES = dict(llava="mobile-use-1000", qwen="ui-tars")
GOALS = [prompt("Buy a lamp", ""), prompt("Go to velmora.com and search for a red lamp", decision(render(press("back"))))]
ACTIONS = [render(a) for a in (tap(.5, .31), type_text('a <image> "red" </s> lamp'), press("back"))] + ["tap it!"]


def noise(i):
    "A screen that no other is like."
    return Image.fromarray(np.random.default_rng(i).integers(0, 255, (60, 27, 3), np.uint8)).resize((270, 600))


@pytest.fixture(scope="module", params=LANGUAGES)
def served(request, tmp_path_factory):
    "A random model of a family as a policy here, and the same at a server."
    folder = tmp_path_factory.mktemp(request.param)
    here = VLMPolicy(families.random_vlm(request.param), LANGUAGES[request.param], max_new_tokens=20)
    here.save(folder/"policy")
    os.environ["DIGIQ_TEST_KEY"] = "sk-served"
    with serve(folder/"policy", folder/"vllm.log", OPTIONS, lora=8, program=f"{there}/bin/vllm", key="DIGIQ_TEST_KEY") as server:
        yield here, ServedPolicy.from_pretrained(folder/"policy", server), folder


def counted(server):
    "Tokens of prompts that vLLM was asked for, and those of them that it took from its cache."
    text = urlopen(f"{server.url}/metrics").read().decode()
    return np.array([sum(float(v) for v in re.findall(rf"^vllm:prefix_cache_{name}_total{{.*}} (\S+)$", text, re.M)) for name in ("queries", "hits")])


def test_greedy_answers_are_those_of_the_model_here(served):
    here, there, _ = served
    pictures = here.see([noise(i) for i in range(4)])
    goals = [GOALS[i % 2] for i in range(4)]
    wanted = here.sample(goals, pictures, temperature=0)
    assert there.sample(goals, pictures, temperature=0) == wanted
    assert len({a for a, in wanted}) > 1


def test_log_probabilities_are_those_of_the_model_here(served):
    here, there, _ = served
    pictures = here.see([noise(i % 2) for i in range(8)])
    goals, actions = [GOALS[i // 4] for i in range(8)], ACTIONS * 2
    with torch.no_grad(): wanted = here.log_prob(goals, pictures, actions)
    for _ in range(2): # the second time the server has read all of it before
        assert (there.log_prob(goals, pictures, actions) - wanted).abs().max() < 1e-3
    with torch.no_grad(): clamped = here.log_prob(goals, pictures, actions, (.001, .99))
    assert (there.log_prob(goals, pictures, actions, (.001, .99)) - clamped).abs().max() < 1e-3 < (clamped - wanted).abs().max()


def test_sixteen_answers_cost_one_reading(served):
    here, there, _ = served
    picture, = here.see([noise(100)])
    prompt_tokens = here.read(GOALS[:1], [picture])[1].shape[1]
    asked, found = counted(there.server)
    answers, = there.sample(GOALS[:1], [picture], n=16)
    asked, found = counted(there.server) - (asked, found)
    assert asked == 16*prompt_tokens                                # as sixteen requests would have read
    assert prompt_tokens <= asked - found <= prompt_tokens + 15*PAGE # read once, and the end that fills no page
    assert len(set(answers)) > 8


def test_a_run_is_repeated_by_its_seed(served):
    here, there, _ = served
    pictures, alone = here.see([noise(i) for i in range(3)]), ServedPolicy.__new__(ServedPolicy)
    vars(alone).update(vars(there), server=replace(there.server, clients=1))
    def drawn(seed):
        torch.manual_seed(seed)
        return alone.sample(GOALS[:1]*3, pictures, n=4)
    assert drawn(0) == drawn(0) != drawn(1)


def adapted(here, folder, seed):
    "A copy of the policy with an adapter of the language model that changes it, written to a folder."
    from peft import LoraConfig, get_peft_model
    linear = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    vlm = VLMPolicy.from_pretrained(folder.parent/"policy").vlm
    vlm.model = get_peft_model(vlm.model, LoraConfig(r=4, lora_alpha=16, target_modules=linear))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, w in vlm.model.named_parameters():
            if "lora_B" in name: w.normal_(0, .3)
    vlm.model.save_pretrained(folder)
    return VLMPolicy(vlm, here.name, here.max_new_tokens)


def test_an_adapter_is_loaded_while_the_server_runs(served):
    here, there, folder = served
    pictures, base = here.see([noise(0), noise(1)]), here.sample(GOALS, here.see([noise(0), noise(1)]), temperature=0)
    known, seen = there.server, []
    try:
        for seed in range(2): # the second one over the first one's files
            trained = adapted(here, folder/"adapter", seed)
            there.load(folder/"adapter")
            seen.append(there.sample(GOALS, pictures, temperature=0))
            assert seen[-1] == trained.sample(GOALS, pictures, temperature=0)
            with torch.no_grad(): wanted = trained.log_prob(GOALS, pictures, ACTIONS[:2])
            assert (there.log_prob(GOALS, pictures, ACTIONS[:2]) - wanted).abs().max() < 1e-3
    finally: there.server = known
    assert base != seen[0] != seen[1] != base
    assert there.sample(GOALS, pictures, temperature=0) == base # asked by its own name, the model is as it was


def test_a_server_that_dies_is_named(tmp_path):
    here = VLMPolicy(families.random_vlm("llava"), "mobile-use-1000", max_new_tokens=900) # answers that take a while
    here.save(tmp_path/"policy")
    with serve(tmp_path/"policy", tmp_path/"vllm.log", OPTIONS, program=f"{there}/bin/vllm", tries=2, longest_wait=.2) as server:
        of_vllm = [int(pid) for pid in subprocess.run(["pgrep", "-g", str(group(server))], capture_output=True, text=True).stdout.split()]
        assert len(of_vllm) > 1
        threading.Timer(1.5, lambda: [os.kill(pid, signal.SIGKILL) for pid in of_vllm]).start()
        policy = ServedPolicy.from_pretrained(tmp_path/"policy", server)
        with pytest.raises(DigiqError, match=f"{server.url} did not answer.*2 times"):
            for _ in range(50): policy.sample(GOALS, here.see([noise(0), noise(1)]), n=16)
    for pid in of_vllm: assert not alive(pid)


def test_a_server_that_cannot_start_says_why(tmp_path):
    VLMPolicy(families.random_vlm("qwen"), "ui-tars").save(tmp_path/"policy")
    (tmp_path/"policy"/"model.safetensors").unlink()
    with pytest.raises(DigiqError, match="vllm ended with status 1; the end of .*vllm.log"):
        with serve(tmp_path/"policy", tmp_path/"vllm.log", OPTIONS, program=f"{there}/bin/vllm"): pass
