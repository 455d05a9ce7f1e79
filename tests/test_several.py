"Training by several processes equals training by one; a training that was cut off goes on as if it had not been."
import os, socket, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_vlm_policy
import torch

from digiq import actions as A
from digiq.data import Recorded
from digiq.method import training
from digiq.vlm import finetuning
from digiq.core import ConfigError, DataError, seed_all
from digiq.method.critic import CriticConfig
from digiq.method.extraction import Scores
from digiq.workshop.families import random_vlm
from digiq.vlm.finetuning import Examples, finetune
from digiq.method.autoui import AutoUI, AutoUIConfig, AutoUIPolicy, tiny_tokenizer
from digiq.vlm.representation import RepresentationConfig
from digiq.method.training import ActorConfig, Accelerator, Texts, Transitions, fit_critic, fit_policy

GOALS = ["Go to velmora.com", "Go to velmora.com, and search for a red lamp", "Open the clock"]
CRITIC = CriticConfig(text_dim=8, q_hidden=(16,), v_hidden=(16,), dropout=0., state_dropout=0., screen_cells=(1, 1), steps=24, batch=16, lr=1e-2, accumulate=2, v_action="proposal")
SHARDED = dict(llava={}, adapters=dict(lora=4, recompute=True), qwen=dict(family="qwen"), idefics=dict(family="idefics", recompute=True))
ACTOR = ActorConfig(steps=8, batch=8, lr=1e-2, accumulate=2)


class Rows(np.ndarray):
    "Vectors in memory, in the place of `Embeddings`."


def data(episodes=12, length=5, n=3):
    "Random episodes."
    rng, texts, steps = np.random.default_rng(0), Texts(), episodes*length
    number = np.vectorize(lambda i: texts(["", "TYPE", "PRESS_BACK", *GOALS][i]))
    episode, step = np.divmod(np.arange(steps), length)
    screens = np.arange(steps) + episode
    return Transitions(screen=rng.normal(size=(steps + episodes, 4)).astype(np.float16), here=screens, before=np.where(step, screens - 1, screens), after=screens + 1,
        goal=number(3 + episode % 3), previous_kind=number(rng.integers(3, size=steps)), previous_text=number(rng.integers(6, size=steps)), next_kind=number(rng.integers(3, size=steps)), next_text=number(rng.integers(6, size=steps)),
        reward=(step == length - 1).astype(np.float32)*(episode % 2), done=(step == length - 1).astype(np.float32), togo=np.where(episode % 2, length - 1 - step, -1), episode=episode, step=step,
        recorded=n*np.arange(steps), proposed=np.arange(n*steps).reshape(steps, n), pair_step=np.arange(n*steps)//n, pair_action=np.array([A.render(A.tap(*rng.random(2))) for _ in range(n*steps)], object),
        pair_kind=number(rng.integers(3, size=n*steps)), pair_text=number(rng.integers(6, size=n*steps)), pair_count=np.ones(n*steps, int), pair_rep=np.arange(n*steps), texts=texts, reps=rng.normal(size=(n*steps, 6)).astype(np.float16).view(Rows))


def train_critic(cfg=CRITIC, training_state=None):
    d = data()
    critic, history = fit_critic(d, cfg, tiny_tokenizer(GOALS), seed=3, log_every=4, training_state=training_state)
    return history, {k: v.clone() for k, v in critic.state_dict().items()}


def train_policy(cfg=ACTOR, training_state=None, dropout=0.):
    d, tokenizer = data(), tiny_tokenizer(GOALS)
    seed_all("policy")
    model = AutoUI(AutoUIConfig(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2, image_dim=4, dropout_rate=dropout, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1))
    n = len(d.pair_step)
    scores = Scores(d.pair_step, d.pair_action, d.pair_count, np.ones(n, bool), np.ones(n, bool), np.ones(n, bool), np.zeros(n, np.float32), np.zeros(n, np.float32))
    rows = np.arange(0, n, 2)
    prompts = [f"Goal: {GOALS[i % 3]}" + " and nothing else at all"*(i % 60)*(i % 2) for i in range(len(d))] # long enough to be worth a pass of their own
    history = fit_policy(AutoUIPolicy(model, tokenizer, None), d, prompts, Recorded(d.screen), scores, (rows, np.linspace(.5, 2, len(rows)).astype(np.float32)), cfg, seed=3, training_state=training_state)
    return history, {k: v.clone() for k, v in model.state_dict().items()}


def train_agent():
    losses, weights = test_vlm_policy.train("qwen2.5", steps=6)
    return [dict(loss=x) for x in losses], {str(i): w for i, w in enumerate(weights)}


def finetune_vlm(family="llava", **cfg):
    vlm, n = random_vlm(family), 40
    changed = np.arange(n) % 2 == 0
    pictures = np.where(changed[:, None], (200, 30, 30), (30, 30, 200)).astype(np.uint8)[:, None, None].repeat(vlm.side, 1).repeat(vlm.side, 2)
    examples = Examples(pictures, [A.tap(*np.random.default_rng(i).random(2)) for i in range(n)], changed, np.arange(n) // 5)
    report = finetune(vlm, examples, RepresentationConfig(**(dict(steps=8, batch=8, lr=1e-3) | cfg)))
    return [dict(loss=x) for x in report["losses"]], vlm.model and vlm.model.state_dict()


def one_of_several(folder):
    "What each process of several does; the first one tells."
    told = dict(critic=train_critic(), policy=train_policy(), agent=train_agent(), representation=finetune_vlm())
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    rows = accelerator.gather(torch.tensor(accelerator.part(np.arange(8))))
    assert sorted(rows.tolist()) == list(range(8)), "no row twice, none left out"
    with pytest.raises(ConfigError, match="cannot be shared evenly by 2 processes: choose a multiple of 2"): accelerator.part(np.arange(3))
    torch.save(told, Path(folder)/f"{accelerator.process_index}.pt")


def one_of_sharded(folder):
    "What each process does where no process holds the whole model. Accelerate offers FSDP on GPUs only, but gloo has all that it needs: so its state is told."
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
    from torch.distributed.tensor import DTensor
    def accelerator(device):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT", cpu_ram_efficient_loading=True, reshard_after_forward=True)
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        told = Accelerator(cpu=True, fsdp_plugin=plugin)
        told.state._shared_state["fsdp_plugin"] = told.state.fsdp_plugin = plugin
        PartialState._shared_state["distributed_type"] = told.state.distributed_type = DistributedType.FSDP
        return told
    finetuning._accelerator, head, parts = accelerator, finetuning.EffectHead.forward, []
    def forward(self, *args, **kwargs):
        layers = [p for p in self.parameters() if isinstance(p, DTensor)]
        parts.append(sum(p.to_local().numel() for p in layers)/sum(p.numel() for p in layers))
        return head(self, *args, **kwargs)
    finetuning.EffectHead.forward = forward
    told = {name: finetune_vlm(**cfg) for name, cfg in SHARDED.items()}
    assert parts and all(.4 < part < .6 for part in parts), "each holds half of every layer"
    torch.save(told, Path(folder)/f"{PartialState().process_index}.pt")


def processes(work, folder):
    "What each of two processes put into `folder`."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo")
    processes = [subprocess.Popen([sys.executable, "-c", f"import test_several; test_several.{work}({str(folder)!r})"], env=env | dict(RANK=str(i), LOCAL_RANK=str(i)), stderr=subprocess.PIPE, text=True) for i in range(2)]
    for p in processes:
        _, err = p.communicate(timeout=600)
        assert p.returncode == 0, err[-3000:]
    return [torch.load(folder/f"{i}.pt", weights_only=True) for i in range(2)]


@pytest.fixture(scope="module")
def two(tmp_path_factory): return processes("one_of_several", tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory): return processes("one_of_sharded", tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("what, alone", [("critic", train_critic), ("policy", train_policy), ("agent", train_agent), ("representation", finetune_vlm)])
def test_two_processes_equal_one(two, what, alone):
    history, weights = alone()
    for told in two:
        found, theirs = told[what]
        assert len(found) == len(history)
        for a, b in zip(found, history): assert a.keys() == b.keys() and all(abs(a[k] - b[k]) < 1e-5*max(1, abs(b[k])) for k in a), (a, b)
        if what == "critic": # 12 updates of 1e-2; the order of a minibatch's rows alone makes 6e-6, by rounding
            away = {k: (theirs[k] - w).abs().max().item() for k, w in weights.items() if w.numel()}
            assert max(away.values()) < 1e-4, away


@pytest.mark.parametrize("what", SHARDED)
def test_a_model_in_two_halves_learns_what_a_whole_one_does(sharded, what):
    history, weights = finetune_vlm(**SHARDED[what])
    (first, theirs), (second, nothing) = (told[what] for told in sharded)
    assert first == second and [h["loss"] for h in first] == pytest.approx([h["loss"] for h in history], abs=1e-5)
    assert nothing is None and theirs.keys() == weights.keys(), "its parts come together on the first process"
    away = {k: (theirs[k] - w).abs().max().item() for k, w in weights.items()}
    assert max(away.values()) < 1e-4, away
    assert history[-1]["loss"] < history[0]["loss"]


class Cut(Exception):
    "Stands for a power failure."


@pytest.mark.parametrize("cut_at", [3, 9, 23])
def test_a_critic_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, cut_at):
    cfg = replace(CRITIC, dropout=.2, save_every=4)
    whole = train_critic(cfg, tmp_path/"whole")
    real, calls = Transitions.minibatch, []
    def fails(self, t, *args):
        calls.append(len(t))
        if len([n for n in calls if n == cfg.batch]) > cut_at: raise Cut
        return real(self, t, *args)
    monkeypatch.setattr(Transitions, "minibatch", fails)
    with pytest.raises(Cut): train_critic(cfg, tmp_path/"cut")
    monkeypatch.setattr(Transitions, "minibatch", real)
    assert (tmp_path/"cut").exists() == (cut_at > 4)
    history, weights = train_critic(cfg, tmp_path/"cut")
    assert history == whole[0] and all(torch.equal(w, whole[1][k]) for k, w in weights.items())


def test_a_policy_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    cfg = replace(ACTOR, save_every=2)
    whole = train_policy(cfg, tmp_path/"whole", dropout=.1)
    real, calls = AutoUIPolicy.log_prob, []
    def fails(self, *args):
        calls.append(1)
        if len(calls) > 9: raise Cut
        return real(self, *args)
    monkeypatch.setattr(AutoUIPolicy, "log_prob", fails)
    with pytest.raises(Cut): train_policy(cfg, tmp_path/"cut", dropout=.1)
    monkeypatch.setattr(AutoUIPolicy, "log_prob", real)
    history, weights = train_policy(cfg, tmp_path/"cut", dropout=.1)
    assert history == whole[0] and all(torch.equal(w, whole[1][k]) for k, w in weights.items())


def test_a_damaged_bookmark_is_named(tmp_path):
    cfg = replace(CRITIC, steps=8, save_every=4)
    train_critic(cfg, tmp_path/"b")
    (tmp_path/"b").write_bytes((tmp_path/"b").read_bytes()[:200])
    with pytest.raises(DataError, match="b is damaged: delete it, and the training starts again"): train_critic(cfg, tmp_path/"b")
    with pytest.raises(ConfigError, match="save_every is 3: choose a multiple of critic.accumulate"): replace(CRITIC, save_every=3)


def test_length_groups_change_nothing(monkeypatch):
    "A minibatch in several passes has the gradient of one pass."
    real, parts = training.length_buckets, []
    def counted(lengths, *price):
        found = real(lengths, *price)
        parts.append(len(found))
        return found
    monkeypatch.setattr(training, "length_buckets", counted)
    split, _ = train_policy()
    assert max(parts) > 1
    monkeypatch.setattr(training, "length_buckets", lambda lengths: [np.arange(len(lengths))])
    whole, _ = train_policy()
    for a, b in zip(split, whole): assert abs(a["loss"] - b["loss"]) < 1e-5*abs(b["loss"])


def test_bfloat16_reaches_the_losses_of_float32():
    exact, low = train_policy()[0], train_policy(replace(ACTOR, precision="bfloat16"))[0]
    assert exact[-1]["loss"] != low[-1]["loss"]
    for a, b in zip(exact, low): assert abs(a["loss"] - b["loss"]) < 1e-2*abs(a["loss"])
