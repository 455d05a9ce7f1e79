"Base models that know nothing, made in seconds, and the whole pipeline on them with a goal that is easily reached."
import torch
import yaml
from troubles import trouble

from digiq import actions as A
from digiq.workshop.base_vlm import BaseVLMConfig, build_vlm, tokenizer_texts
from digiq.core import DigiqError, progress, seed_all
from digiq.env import DeviceEnv, prompt
from digiq.phone import SimPhone, oracle
from digiq.runs import Experiment, load_preset
from digiq.method.autoui import AutoUI, AutoUIConfig, AutoUIPolicy, ImageEncoder, snap, tiny_tokenizer
from digiq.tasks import load

SMALL = dict(threads=1, horizon=6, disturbance=0., collection=dict(temperature=1., episodes=24, phones=8, shard=8), proposals=dict(n=4, temperature=1.2, shard=8), representation=dict(steps=3, batch=4, examples=60),
             embedding=dict(states=32), critic=dict(steps=6, batch=16, gamma=.9), actor=dict(steps=4, batch=8), evaluation=dict(temperatures=(0., 1.), supports=(0., 1.), tuning=8, most=16, phones=8, shard=8, rerank=2, states=6, returns=20))


def make(folder):
    "A random VLM, and a policy that has learned a handful of action strings by heart."
    seed_all("stand-ins")
    vlm = build_vlm(BaseVLMConfig(width=32, vision_layers=1, language_layers=1, vocabulary=600), tokenizer_texts([]))
    vlm.save(folder/"vlm")
    image_encoder, task = ImageEncoder.from_pretrained(str(folder/"vlm")), load("webshop", "train")[0]
    phone = SimPhone()
    phone.reset(task, 0)
    first = A.tap(*snap(*oracle(phone, task).touch))
    moves = [A.render(a) for a in (first, A.tap(*snap(.3, .3)), A.press("back"), A.type_text(task.site))] + ["tap it!"]
    goals = [t.goal for t in load("webshop", "train")]
    tokenizer = tiny_tokenizer(goals)
    model = AutoUI(AutoUIConfig(vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=4, image_dim=image_encoder.dim, dropout_rate=0.,
                                decoder_start_token_id=0, pad_token_id=0, eos_token_id=1))
    with torch.no_grad(): model.gate_dense.weight.zero_(), model.gate_dense.bias.fill_(-30) # blind
    policy, optimizer = AutoUIPolicy(model, tokenizer, image_encoder), torch.optim.Adam(model.parameters(), 3e-3, betas=(.9, .95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=701, pct_start=.1)
    screens = image_encoder([phone.screenshot()]).repeat(len(moves), 0)
    for i in range(700):
        loss = -policy.log_prob([prompt(goals[i * 7 % len(goals)], "" if i % 2 else A.decision(moves[i % 4]))] * len(moves), screens, moves).mean()
        optimizer.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step(); schedule.step()
    policy.save(folder/"policy")


class Easy(Experiment):
    "An experiment whose goal is to leave the launcher."
    def make_env(self, tasks, horizon):
        left = lambda task, before, after, device: float(device.state()["app"] != "launcher")
        return DeviceEnv(SimPhone(disturbance=self.preset.disturbance), tasks, horizon, left, self.history)


class OnNodes(Easy):
    "An experiment that a node's trouble stops."
    def make_env(self, tasks, horizon):
        trouble()
        env = super().make_env(tasks, horizon)
        assert "_behaviour" not in vars(self) # a node loads no model: it need not have any
        return env


def experiment(models, run_dir, *changes, seed=0, kind=Easy, cluster="none"):
    "An experiment on the stand-ins; a change is 'field=value', or 'component.field=value'."
    settings = SMALL | dict(policy=str(models/"policy"), image_encoder=str(models/"vlm"), representation=SMALL["representation"] | dict(model=str(models/"vlm")))
    for change in changes:
        name, value = change.split("=")
        where, _, field = name.rpartition(".")
        settings = settings | {(where or field): (settings.get(where, {}) | {field: yaml.safe_load(value)}) if where else yaml.safe_load(value)}
    return kind(run_dir, load_preset("smoke", **settings), seed, cluster)


def run(lab):
    "Every stage, as nbs/train.ipynb has them."
    lab.collect(); lab.featurise(); lab.propose(); lab.finetune(); lab.embed()
    lab.train_critic(); lab.train_critic(representation=False); lab.score()
    for name in ("filtered_bc", "digiq"): lab.train_policy(name)
    for name in ("behaviour", "filtered_bc", "digiq", "filtered_bc_rerank", "digiq_rerank"): lab.evaluate(name)
    lab.check_critic(); lab.reliability()
    return lab


def run_and_tell(models, run_dir, told, *changes):
    "Run in a process of its own; write what went wrong, or nothing, to the file `told`."
    try: run(experiment(models, run_dir, *changes))
    except DigiqError as e: told.write_text(f"{type(e).__name__}: {e}")
    else: told.write_text("")
