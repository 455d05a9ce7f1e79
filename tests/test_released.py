"Files in exactly the published layouts, at small sizes and at a large one; and files that would like to run something."
import io, itertools, os, pickle, struct, subprocess, sys, zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, BlipImageProcessorPil, OPTConfig, RobertaConfig, RobertaModel

from digiq.actions import decision, press, render, tap, type_text
from digiq.released.episodes import convert
from digiq.core import ConfigError, DataError
from digiq.data import Embeddings
from digiq.env import prompt
from digiq.explore import ActionExplorer, TrajectoryExplorer
from digiq.runs import load_preset, open_run
from digiq.method.autoui import AutoUI, AutoUIConfig, tiny_tokenizer
from digiq.released.torchfile import TorchFile
from digiq.method.training import TrainingState

ROOT = Path(__file__).resolve().parent.parent
ACTIONS = [render(tap(round(.02 + .05*i, 4), .4)) for i in range(18)] + [render(press(k)) for k in ("home", "back", "enter")] + [render(type_text("usb-c"))]


def episode(k, steps, n, d, d_image, new=torch.randn):
    "An episode as Digi-Q published them."
    states = [new(d_image) for _ in range(steps + 1)]
    shots = [f"<path_to_images>/emulator-{5554 + 2*(k % 8)}/{1700000000 + k}_{t}.png" for t in range(steps + 1)]
    seen, out = [prompt(f"Go to site{k}.com, search for usb-c", decision(ACTIONS[t]) if t else "") for t in range(steps + 1)], []
    for t in range(steps):
        names = [ACTIONS[(k + t + i*i) % len(ACTIONS)] for i in range(n)]
        reps = new(n, d)
        out.append(dict(observation=seen[t], next_observation=seen[t + 1], task=f"Go to site{k}.com, search for usb-c", action=names[0], action_list="<split>".join(names), reward=float(t == steps - 1 and k % 3 == 0), trajectory_reward=float(k % 3 == 0),
            mc_return=.5, done=t == steps - 1, image_features=states[t], next_image_features=states[t + 1], image_path=shots[t], next_image_path=shots[t + 1], traj_id=k, step_id=t, q_rep_out=reps[0], q_rep_out_list=reps,
            q_response="Yes", q_response_list=["Yes"]*n, parsed_action="tap", parsed_action_list=["tap"]*n, q_image_path=shots[t], q_image_path_list=[f"{shots[t]}_{i}" for i in range(n)]))
        first = {a: i for i, a in reversed(list(enumerate(names)))}
        out[-1]["q_rep_out_list"] = reps[[first[a] for a in names]]
    return out


class Evil:
    "Runs a command when it is unpickled."
    def __init__(self, call, *args): self.how = call, args
    def __reduce__(self): return self.how


class State:
    "Asks for the state of an object to be set."
    def __reduce__(self): return OrderedDict, (), {"__class__": 1}


def saved(obj, **kwargs):
    out = io.BytesIO()
    torch.save(obj, out, **kwargs)
    return out.getvalue()


def rewritten(data, change, compress=zipfile.ZIP_STORED):
    "A zip archive of torch with its pickle changed."
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compress) as new:
        for name in old.namelist(): new.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return out.getvalue()


def attacks(flag):
    "Name and bytes of files that try to make `flag`, or to overrun a storage."
    touch, system = f"touch {flag}", b"posix\nsystem\n"
    text = b"X" + struct.pack("<I", len(touch)) + touch.encode()
    tensor = [[{"x": torch.arange(4.)}]]
    step = lambda evil: [[{"task": "t", "action": evil}]]
    yield "os.system", saved(step(Evil(os.system, touch)))
    yield "os.system in the older form", saved(step(Evil(os.system, touch)), _use_new_zipfile_serialization=False)
    yield "os.system in a plain pickle", pickle.dumps(step(Evil(os.system, touch)))
    yield "protocol 4", pickle.dumps(step(Evil(os.system, touch)), 4)
    yield "subprocess", saved(step(Evil(subprocess.Popen, ["touch", str(flag)])))
    yield "eval", saved(step(Evil(eval, f"open({str(flag)!r}, 'w')")))
    yield "nested reduce", saved(step(Evil(OrderedDict, [Evil(os.system, touch)])))
    yield "reduce as an array's size", saved(step(Evil(np._core.multiarray._reconstruct, np.ndarray, Evil(os.system, touch), b"b")))
    yield "object array", saved([[{"x": np.array([Evil(os.system, touch)], object)}]])
    yield "text array", saved([[{"x": np.array(["a"])}]])
    yield "nested torch.load", saved(step(Evil(torch.storage._load_from_bytes, saved(Evil(os.system, touch)))))
    yield "getattr", saved(step(Evil(getattr, Evil(__import__, "os"), "system")))
    yield "INST", b"(" + text + b"i" + system + b"."
    yield "OBJ", b"(c" + system + text + b"o."
    yield "NEWOBJ", b"\x80\x02]](c" + system + text + b"\x85\x81ee."
    yield "EXT1", b"\x80\x02](\x82\x01e."
    yield "a text that is called", b"\x80\x02](" + text + b")Re."
    yield "a state for what is no array", saved([[State()]])
    yield "a storage with a bad size", rewritten(saved(tensor), lambda p: p.replace(b"K\x04\x85", b"K\x40\x85"))
    yield "a storage that lies about its size", rewritten(saved(tensor), lambda p: p.replace(b"K\x04", b"K\x40"))
    yield "a huge tensor of steps of 0", rewritten(saved(tensor), lambda p: p.replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85").replace(b"K\x01\x85", b"K\x00\x85"))
    yield "a storage by another path", rewritten(saved(tensor), lambda p: p.replace(b"X\x01\x00\x00\x000", b"X\x0d\x00\x00\x00../../../root"))
    yield "a compressed pickle", rewritten(saved(tensor), lambda p: p, zipfile.ZIP_DEFLATED)
    yield "a text longer than the file", b"\x80\x04](\x8d" + struct.pack("<Q", 1 << 60) + b"x."
    yield "a number for an object beyond memory", b"\x80\x02](]r\xff\xff\xff\xffe."


@pytest.mark.parametrize("name", [name for name, _ in attacks("flag")])
def test_nothing_in_a_file_is_run(name, tmp_path):
    flag = tmp_path/"ran"
    (tmp_path/"evil.pt").write_bytes(dict(attacks(flag))[name])
    with pytest.raises(DataError):
        for item in TorchFile(tmp_path/"evil.pt").items():
            for s in item: [v.read() for v in s.values() if hasattr(v, "read")]
    assert not flag.exists()
    with pytest.raises(DataError): convert(tmp_path/"evil.pt", tmp_path/"out")
    assert not flag.exists()


def write_large(path, gigabytes):
    "A file of episodes of full width, as torch writes arrays of NumPy: all in the pickle, as text. It is written without ever being held."
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(64*4096, np.float32)
    new = lambda *shape: (pool[:np.prod(shape)]*np.float32(rng.uniform(.5, 2))).reshape(shape)
    with zipfile.ZipFile(path, "w") as z, z.open("archive/data.pkl", "w", force_zip64=True) as f:
        size = f.write(b"\x80\x02](")
        for k in itertools.count():
            size += f.write(pickle.dumps(episode(k, 10, 64, 4096, 1408, new), 2)[2:-1])
            if size > gigabytes*(1 << 30): break
        f.write(b"e.")
    return k + 1


LARGE = """
import resource, sys
from digiq.released.episodes import convert
report = convert(sys.argv[1], sys.argv[2])
print(report["kept"], report["pairs"], len(report["oddities"]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


def test_two_gigabytes_in_bounded_memory(tmp_path):
    path = tmp_path/"webshop-large.pt"
    try:
        n = write_large(path, 2)
        assert path.stat().st_size > 2 << 30
        done = subprocess.run([sys.executable, "-c", LARGE, path, tmp_path/"out"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        kept, pairs, odd, megabytes = map(int, done.stdout.split())
        assert (kept, odd) == (n, 0) and n*10 < pairs < n*10*len(ACTIONS)
        print(f"{megabytes} MB resident")
        assert megabytes < 1700
    finally:
        for f in [*tmp_path.rglob("*.npy"), path]: f.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "Episodes with their pictures in a zip archive, Auto-UI-Base and a RoBERTa, all small."
    folder = tmp_path_factory.mktemp("published")
    rng = np.random.default_rng(0)
    episodes = [episode(k, 4, 6, 24, 12, lambda *shape: rng.standard_normal(shape, np.float32)) for k in range(20)]
    torch.save(episodes, folder/"webshop-20trajs.pt")
    with zipfile.ZipFile(folder/"webshop-images.zip", "w") as z:
        for path in {s[k] for e in episodes for s in e for k in ("image_path", "next_image_path")}:
            out = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (60, 27, 3), np.uint8)).save(out, "PNG")
            z.writestr(path.replace("<path_to_images>", "webshop-images"), out.getvalue())
    words = tiny_tokenizer([s["task"] for e in episodes for s in e], 700)
    torch.manual_seed(0)
    config = AutoUIConfig(vocab_size=len(words), d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, image_dim=12)
    (folder/"Auto-UI-Base").mkdir()
    torch.save(AutoUI(config).state_dict(), folder/"Auto-UI-Base"/"pytorch_model.bin")
    config.save_pretrained(folder/"Auto-UI-Base")
    RobertaModel(RobertaConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=80, pad_token_id=0)).save_pretrained(folder/"roberta")
    words.save_pretrained(folder/"Auto-UI-Base")
    words.backend_tokenizer.post_processor = TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", words.eos_token_id)]) # as RoBERTa's, which never reads nothing
    words.save_pretrained(folder/"roberta")
    return folder


def small(folder, **changes):
    "The published settings at small sizes."
    critic = dict(text_encoder=str(folder/"roberta"), q_hidden=[20, 16], v_hidden=[16], steps=8, batch=8, accumulate=2, tau_every=4, save_every=4)
    return dict(device="cpu", workers=1, policy=str(folder/"Auto-UI-Base"), collection=dict(recorded=str(folder/"out")), critic=critic, extraction=dict(threshold=-1.), actor=dict(steps=8, batch=4, accumulate=2, save_every=4), **changes)


@pytest.fixture(scope="module")
def trained(published):
    report = convert(published/"webshop-20trajs.pt", published/"out", published/"webshop-images.zip")
    assert (report["kept"], report["oddities"]) == (20, [])
    lab = open_run(published/"run", load_preset("webshop", **small(published)))
    assert lab.collect().episodes.sum() == 20
    assert lab.featurise()["width"] == 12 and lab.propose()["candidates"] == 6 and lab.finetune() == {} and lab.embed()["width"] == 24
    return lab


def test_from_released_episodes_to_a_policy(trained):
    critic = trained.train_critic()
    scores = trained.score()
    assert np.isfinite(critic["history"][-1]["q"]) and np.isfinite(scores.q).all() and scores.q.std() > 0
    assert trained.train_policy("digiq")["learned_from"] == len(trained.transitions)
    behaviour, learned = trained.behaviour.model, trained.agent("digiq").model
    assert any(not torch.equal(a, b) for a, b in zip(behaviour.parameters(), learned.parameters()))
    assert not torch.equal(learned.lm_head.weight, learned.shared.weight)


def test_reference_leaves_features_as_they_are(trained):
    critic = trained.load_critic()
    assert critic.cfg.reference and (critic.screens_mean == 0).all() and (critic.rep_std == 1).all()
    data, t = trained.transitions, np.arange(3)
    raw = Embeddings(trained.path/"embeddings")
    assert raw[data.pair_rep[:3]].dtype == np.float32 and data.states(t)["screens"].dtype == torch.float32


@pytest.mark.parametrize("stage", ["critic", "policy"])
def test_cut_off_training_goes_on_to_the_same_weights(published, trained, tmp_path, monkeypatch, stage):
    trained.train_critic(), trained.score(), trained.train_policy("digiq")
    lab = open_run(tmp_path/"run", load_preset("webshop", **small(published)))
    lab.collect(), lab.featurise(), lab.propose(), lab.embed()
    if stage == "policy": lab.train_critic(), lab.score()
    reached, work = TrainingState.reached, lab.train_critic if stage == "critic" else lambda: lab.train_policy("digiq")

    def cut(self, step, history):
        reached(self, step, history)
        if step == 6: raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingState, "reached", cut)
        work()
    assert [f.stem for f in (tmp_path/"run"/"training_states").glob("*.safetensors")] == ["critic" if stage == "critic" else "digiq"]
    work()
    name = Path("checkpoints")/("critic" if stage == "critic" else "digiq")/"model.safetensors"
    assert (tmp_path/"run"/name).read_bytes() == (trained.path/name).read_bytes()


def test_papermill_trains_from_released_episodes(published, trained, tmp_path):
    preset = yaml.safe_load((ROOT/"digiq"/"presets"/"webshop.yaml").read_text())
    for k, v in small(published).items(): preset[k] = preset[k] | v if isinstance(v, dict) else v
    (tmp_path/"webshop.yaml").write_text(yaml.safe_dump(preset))
    command = [sys.executable, "-m", "papermill", ROOT/"nbs"/"train.ipynb", tmp_path/"out.ipynb", "-f", tmp_path/"webshop.yaml", "-p", "run_dir", tmp_path/"run", "-p", "mode", "train", "--no-progress-bar"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    same = [f.relative_to(trained.path) for f in (trained.path/"checkpoints").rglob("*.safetensors")]
    assert len(same) == 2 and all((tmp_path/"run"/f).read_bytes() == (trained.path/f).read_bytes() for f in same)


def publish_agent(folder, path, screen=12, rep=24, d=16):
    "An agent's directory as `accelerate` wrote it: policy, critic and target critic."
    path.mkdir()
    (path/"pytorch_model.bin").write_bytes((folder/"Auto-UI-Base"/"pytorch_model.bin").read_bytes())
    roberta, q, v = RobertaModel.from_pretrained(folder/"roberta").state_dict(), 5*d + 2*screen + rep, 3*d + 2*screen
    for n in 1, 2:
        torch.manual_seed(n)
        weights = {f"module.base_lm_{name}.{k}": x for name in ("task", "type", "text") for k, x in roberta.items()}
        for kind, sizes in dict(q=[q, q, 20, 20, 20, 1], v=[v, 20, 20, 20, 1]).items():
            for head in 1, 2:
                for i, (a, b) in enumerate(zip(sizes, sizes[1:])): weights |= {f"module.{kind}_critic{head}.{2*i}.weight": torch.randn(b, a)/a**.5, f"module.{kind}_critic{head}.{2*i}.bias": torch.randn(b)*.1}
        torch.save(weights, path/f"pytorch_model_{n}.bin")
    return path


def test_released_agent_on_released_episodes(published, trained, tmp_path):
    "The first thing that a reader of the paper wants to see: Q and V of the published agent, on the published episodes."
    blip = Blip2Config(vision_config=Blip2VisionConfig(hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14), text_config=OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16, max_position_embeddings=20),
        qformer_config=Blip2QFormerConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, encoder_hidden_size=12, vocab_size=50))
    Blip2ForConditionalGeneration(blip).save_pretrained(tmp_path/"blip")
    BlipImageProcessorPil(size=dict(height=28, width=28)).save_pretrained(tmp_path/"blip")
    lab = open_run(tmp_path/"run", load_preset("webshop", **small(published, image_encoder=str(tmp_path/"blip"))))
    lab.collect(), lab.featurise(), lab.propose(), lab.embed()
    agent = publish_agent(published, tmp_path/"aitw-webshop-digiq-agent")
    assert lab.take_agent(agent) == dict(screen=12, representation=24)
    assert lab.take_agent(agent) == dict(screen=12, representation=24) # again: nothing to do
    lead = TrajectoryExplorer(str(lab.path), episode=3)
    steps = lead.strip["steps"]
    assert len(steps) == 5 and all(np.isfinite([s["q"], s["v"]]).all() for s in steps[:-1]) and len({s["q"] for s in steps[:-1]}) == 4
    rows = ActionExplorer(lead.run, lead).state["rows"]
    assert len(rows) > 1 and all(np.isfinite([r["q1"], r["q2"], r["advantage"], r["log_prob"]]).all() for r in rows)
    scores = lab.score()
    assert np.isfinite(scores.q).all() and scores.q.std() > 0
    assert lab.agent("digiq").act(["Go to ebay.com"], [""], [lead.run.screen("episodes", 3, 0)], [lead.run.screen("episodes", 3, 0)])
    assert lab.train_policy("awr")["learned_from"] > 0 # and the critic teaches another policy
    trained.train_critic()
    with pytest.raises(ConfigError, match="has a critic already: choose another run_dir"): trained.take_agent(agent)
    other = open_run(tmp_path/"other", load_preset("webshop", **small(published, image_encoder=str(tmp_path/"blip"))))
    other.collect(), other.featurise(), other.propose(), other.embed()
    with pytest.raises(ConfigError, match="wants widths .*, this run has .*: take over the episodes that were published with it"): other.take_agent(publish_agent(published, tmp_path/"wide", rep=30))
