"A VLM as the agent: the whole pipeline on it, with thoughts, adapters, a longer memory and two screens; a training that goes on where it was cut off."

import numpy as np
import pytest
import standins
import torch

from digiq import actions as A
from digiq.core import DigiqError, seed_all
from digiq.data import EpisodeStore, Proposals, Recorded
from digiq.env import prompt
from digiq.method.extraction import Scores
from digiq.method.training import ActorConfig, fit_policy
from digiq.phone import SimPhone, oracle
from digiq.tasks import load
from digiq.vlm.policy import VLMPolicy, VLMPolicyConfig
from digiq.vlm.representation import VLM
from digiq.workshop.families import random_vlm

CFG = VLMPolicyConfig("ui-tars-1000", side=160, max_new_tokens=80, history=2, screens=2, thoughts=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "The stand-ins, and a VLM that has learned a handful of answers by heart."
    folder = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    standins.make(folder)
    seed_all("a VLM that acts")
    task, phone = load("webshop", "train")[0], SimPhone()
    phone.reset(task, 0)
    moves = [A.Answer(A.render(a), thought) for a, thought in ((oracle(phone, task), "The browser."), (A.press("back"), "Not here."), (A.tap(.3, .3), ""))]
    agent = VLMPolicy(VLM.load(str(folder/"vlm"), 160), CFG)
    goals, optimizer = [t.goal for t in load("webshop", "train")], torch.optim.Adam(agent.weights(), 1.5e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-2, total_steps=261, pct_start=.1)
    seen = agent.see([phone.screenshot()])[[0]*len(moves)]
    for i in range(260):
        asked = prompt(goals[i*7 % len(goals)], "" if i % 2 else A.decision(moves[i % 3]))
        loss = -agent.log_prob([asked]*len(moves), seen, moves).mean()
        optimizer.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(agent.weights(), 1.)
        optimizer.step(); schedule.step()
    agent.save(folder/"agent")
    return folder


@pytest.fixture(scope="module")
def lab(models, tmp_path_factory):
    return standins.run(standins.experiment(models, tmp_path_factory.mktemp("run"), f"policy={models/'agent'}"))


def test_every_stage(lab):
    assert set(lab.metrics()["success"]) == {"behaviour", "filtered_bc", "digiq", "filtered_bc_rerank", "digiq_rerank"}
    assert lab.metrics()["success"]["behaviour"]["mean"] > 0
    for name in ("filtered_bc", "digiq"):
        policy = lab.load_trained(name)
        assert type(policy) is VLMPolicy and policy.cfg == CFG
        assert any(not torch.equal(x, y) for x, y in zip(policy.weights(), lab.behaviour.weights()))


def test_what_is_kept(lab):
    steps = EpisodeStore(lab.path/"episodes").episodes()
    acted = steps[steps.action.map(A.is_valid)]
    assert set(acted.thought) == {"The browser.", "Not here.", ""}
    assert steps.previous.map(lambda p: len(A.decisions(p))).max() == 2 # as many as the policy asks for
    proposed = Proposals(lab.path/"proposals").table()
    assert {t for some in proposed.thoughts for t in some} >= {"The browser.", "Not here.", ""}
    found = lab.transitions.pair_action # what is imitated has its thought with it
    assert {A.thought_of(a) for a in found} >= {"The browser.", "Not here."}
    first = {(e, s): t for e, s, t in zip(steps.episode, steps.step, steps.thought)}
    data = lab.transitions
    for t, pair in enumerate(data.recorded):
        if pair >= 0: assert A.thought_of(data.pair_action[pair]) == first[data.episode[t], data.step[t]]


def test_settings_of_a_preset_make_an_agent_of_any_vlm(models, tmp_path):
    lab = standins.experiment(models, tmp_path, f"policy={models/'vlm'}", "vlm_policy.language=mobile-use", "vlm_policy.max_new_tokens=8", "vlm_policy.history=3")
    assert lab.behaviour.cfg == VLMPolicyConfig("mobile-use", max_new_tokens=8, history=3) and lab.make_env(lab.tasks("train"), 3).history == 3
    with pytest.raises(DigiqError, match="none of 24 episodes succeeded"): lab.collect() # it has not learned to act
    assert not EpisodeStore(lab.path/"episodes").episodes().error.eq("").all()
    with pytest.raises(DigiqError, match="there is no action language 'klingon'"): standins.experiment(models, tmp_path/"other", f"policy={models/'vlm'}", "vlm_policy.language=klingon").behaviour


class Cut(Exception): pass


def train(family, training_state=None, cut=None, steps=16, **how):
    "Imitate a few answers; `cut` is the minibatch in which the training is cut off."
    agent = VLMPolicy(random_vlm(family), VLMPolicyConfig("mobile-use-1000", side=112, max_new_tokens=24, **how))
    screens = [standins.SimPhone().screenshot() for _ in range(6)]
    for i, s in enumerate(screens): s.paste((40*i, 90, 160), (0, 0, 270, 300))
    acts = [A.render(a) for a in (A.tap(.5, .31), A.press("back"), A.tap(.1, .9), A.press("home"), A.type_text("red lamp"), A.tap(.7, .2))]
    scores = Scores(np.arange(6), np.array(acts, object), np.ones(6, int), np.ones(6, bool), np.ones(6, bool), np.ones(6, bool), np.ones(6, np.float32), np.zeros(6, np.float32))
    class Pictures(Recorded):
        def pictures(self, rows, back=0): return [screens[max(r - back, 0)] for r in rows]
    real, calls = agent.log_prob, []
    def counted(*args):
        calls.append(1)
        if len(calls) == cut: raise Cut
        return real(*args)
    agent.log_prob = counted
    data = type("Steps", (), {"here": np.arange(6)})
    cfg = ActorConfig(lr=3e-2 if how.get("lora") else 3e-3, steps=steps, batch=4, save_every=4, interpolation=.5)
    prompts = [prompt(f"Buy lamp {i}", "") for i in range(6)]
    history = fit_policy(agent, data, prompts, Pictures(None), scores, (np.arange(6), np.ones(6, np.float32)), cfg, seed=3, training_state=training_state)
    return [h["loss"] for h in history], [w.detach().clone() for w in agent.weights()]


@pytest.mark.parametrize("family,how", [("llava", {}), ("qwen2.5", dict(lora=4)), ("qwen3", dict(lora=4, recompute=True)), ("idefics", dict(recompute=True))])
def test_a_training_goes_on_exactly(family, how, tmp_path):
    losses, weights = train(family, tmp_path/"whole", **how)
    with pytest.raises(Cut): train(family, tmp_path/"cut", cut=11, **how)
    again, resumed = train(family, tmp_path/"cut", **how)
    assert np.mean(losses[-4:]) < (.99 if how.get("lora") else .9)*np.mean(losses[:4]) # adapters of random weights learn little
    assert losses == again and all(torch.equal(x, y) for x, y in zip(weights, resumed))
