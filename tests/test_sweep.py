"Sweeps that are killed, and the examples of clusters: valid as far as that can be told here, and the Slurm one run with stand-ins for Slurm."
import json, os, re, signal, stat, subprocess, sys, time
from pathlib import Path

import jsonschema, nbformat, pytest, yaml
from notebooks import root

from digiq.core import ConfigError, read_json
from digiq.runs.sweep import executed, sweep

EXAMPLES = root/"nbs"/"cluster"/"examples"
ALONE = ["unshare", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"] # only loopback, and nobody left behind
SWEEPS = """
import sys
from digiq.runs.sweep import sweep
done = sweep(["smoke"], [0, 1], dict(episodes=20), "runs", sys.argv[1], "toy.ipynb")
print(done.table().to_string())
sys.exit(done.failed() if done.errors else 0)
"""


@pytest.fixture
def toy(tmp_path):
    "A notebook of two stages in a folder of its own; seed 1 waits between them as long as a file is there."
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))
    nb.cells = [nbformat.v4.new_code_cell('preset = "tiny"\nseed = 0\nrun_dir = ""\nepisodes = 10', metadata=dict(tags=["parameters"])),
        nbformat.v4.new_code_cell("""import json, time
from pathlib import Path
folder = Path(run_dir); folder.mkdir(parents=True, exist_ok=True)
with open(folder/"begun", "a") as f: f.write("x")
if not (folder/"stage").exists(): (folder/"stage").write_text(str(time.time_ns()))"""),
        nbformat.v4.new_code_cell('while seed == 1 and Path("hold").exists(): time.sleep(.05)'),
        nbformat.v4.new_code_cell("""rate = dict(mean=.5, low=0., high=1., episodes=episodes)
(folder/"metrics.json").write_text(json.dumps(dict(seed=seed, success=dict(behaviour=rate))))""")]
    nbformat.write(nb, tmp_path/"toy.ipynb")
    return tmp_path


def until(true, process):
    "Wait for a process to get somewhere."
    deadline = time.monotonic() + 120
    while not true(): assert process.poll() is None and time.monotonic() < deadline; time.sleep(.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_is_killed_goes_on(toy, number):
    runs, hold = toy/"runs", toy/"hold"
    hold.touch()
    start = lambda: subprocess.Popen([sys.executable, "-c", SWEEPS, "none"], cwd=toy, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    killed = start()
    until((runs/"seed1"/"stage").exists, killed)
    killed.send_signal(number)
    assert killed.wait(120) and executed(runs/"seed0.ipynb") and not executed(runs/"seed1.ipynb")
    before = [(runs/"seed0.ipynb").read_bytes(), (runs/"seed1"/"stage").read_text()]
    hold.unlink()
    again = start()
    assert again.wait(120) == 0 and "50.0 [" in again.stdout.read()
    assert [(runs/"seed0.ipynb").read_bytes(), (runs/"seed1"/"stage").read_text()] == before and executed(runs/"seed1.ipynb")
    assert [(runs/f"seed{k}"/"begun").read_text() for k in (0, 1)] == ["x", "xx"]


def test_a_kernel_that_dies_stops_no_other(toy, monkeypatch):
    nb = nbformat.read(toy/"toy.ipynb", as_version=4)
    nb.cells[2].source = "import os\nif seed == 0: os.kill(os.getpid(), 9)"
    nbformat.write(nb, toy/"toy.ipynb")
    monkeypatch.chdir(toy)
    done = sweep(["smoke"], [0, 1], out="runs", notebook="toy.ipynb")
    assert done.errors == {Path("runs/seed0"): "its process was killed, perhaps for want of memory"} and [r["seed"] for r in done.runs["smoke"]] == [1]


def test_an_installed_wheel_says_so(monkeypatch):
    monkeypatch.setattr("digiq.runs.sweep.package", "/nowhere/digiq/__init__.py")
    with pytest.raises(ConfigError, match=r"there is no /nowhere/nbs/train.ipynb: run it in a source checkout"): sweep()


def executable(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_slurm_example_sweeps(toy):
    "On a real Ray cluster of one node; Slurm's part in it is played by two lines of shell."
    try: subprocess.run([*ALONE, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError): pytest.skip("this machine lends no network namespaces")
    commands = toy/".venv"/"bin"
    commands.mkdir(parents=True)
    (commands/"activate").write_text(f'PATH="{commands}:{Path(sys.executable).parent}:$PATH"\n')
    executable(commands/"scontrol", "#!/bin/sh\necho localhost\n")
    executable(commands/"srun", '#!/bin/sh\nshift 2\nexec "$@"\n')
    (toy/"sweeps.py").write_text(SWEEPS)
    executable(commands/"digiq", f'#!/bin/sh\n[ "$*" = "sweep --cluster auto --seeds 0-1" ] && exec "{sys.executable}" sweeps.py auto\n')
    slurm = dict(SLURM_SUBMIT_DIR=toy, SLURM_JOB_ID=12345, SLURM_JOB_NODELIST="localhost", SLURM_JOB_NUM_NODES=1, SLURM_CPUS_PER_TASK=4)
    environment = os.environ | {k: str(v) for k, v in slurm.items()}
    script = 'ip link set lo up && mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && exec "$@"' # where Ray notes which cluster is "auto"
    done = subprocess.run([*ALONE, "sh", "-c", script, "sh", "bash", str(EXAMPLES/"slurm.sh"), "--seeds", "0-1"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "50.0 [" in done.stdout and all(executed(toy/"runs"/f"seed{k}.ipynb") and read_json(toy/"runs"/f"seed{k}"/"metrics.json")["seed"] == k for k in (0, 1))
    assert not list(toy.glob(".ray-token*"))


def test_slurm_example_is_a_job():
    text = (EXAMPLES/"slurm.sh").read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and subprocess.run(["bash", "-n", EXAMPLES/"slurm.sh"]).returncode == 0
    comments = text[:text.index("set -euo")]
    assert [line.split()[1].split("=")[0] for line in comments.splitlines() if line.startswith("#SBATCH ")] == ["--job-name", "--nodes", "--ntasks-per-node", "--cpus-per-task", "--mem", "--time"]


def test_machines_example_is_what_ray_takes():
    from ray import autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config
    config = yaml.safe_load((EXAMPLES/"machines.yaml").read_text())
    jsonschema.validate(config, json.loads((Path(autoscaler.__file__).parent/"ray-schema.json").read_text()))
    full = prepare_config(config)
    validate_config(full)
    assert full["max_workers"] == len(config["provider"]["worker_ips"]) == 2
    starts = [command for name in ("head", "worker") for command in full[f"{name}_start_ray_commands"]]
    assert all(subprocess.run(["bash", "-n", "-c", command]).returncode == 0 for command in starts + full["setup_commands"])
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    _, resources = starts[-1].split("--resources=")
    said = subprocess.run(["bash", "-c", f"adb() {{ printf 'List of devices attached\\nA1\\tdevice\\nB2\\toffline\\nC3\\tdevice\\n'; }}; echo {resources}"], capture_output=True, text=True).stdout
    assert json.loads(said) == {"phone": 2}


# What KubeRay's CRD asks of the fields that the example uses, written by hand and compared with it field by field (KubeRay's sources at commit 12cb11e, a RayJob's spec as it stands in the CRD of RayCronJobs)
TEXT, WHOLE, YES_OR_NO = {"type": "string"}, {"type": "integer", "minimum": -2**31, "maximum": 2**31 - 1}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITIES = {"type": "object", "additionalProperties": {"type": ["integer", "string"], "pattern": r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$"}}


def fields(*required, **known):
    "An object of these fields and no others."
    return {"type": "object", "properties": known, "required": list(required), "additionalProperties": False}


def many(item): return {"type": "array", "items": item}


POD = fields(spec=fields("containers", hostNetwork=YES_OR_NO, dnsPolicy=TEXT, nodeSelector=TEXTS,
    containers=many(fields("name", name=TEXT, image=TEXT, resources=fields(limits=QUANTITIES, requests=QUANTITIES), volumeMounts=many(fields("mountPath", "name", name=TEXT, mountPath=TEXT)))),
    volumes=many(fields("name", name=TEXT, persistentVolumeClaim=fields("claimName", claimName=TEXT)))))
KUBERAY = fields("apiVersion", "kind", "metadata", "spec", apiVersion={"const": "ray.io/v1"}, kind={"const": "RayJob"}, metadata=fields("name", name=TEXT),
    spec=fields(entrypoint=TEXT, shutdownAfterJobFinishes=YES_OR_NO, backoffLimit=WHOLE, rayClusterSpec=fields("headGroupSpec", rayVersion=TEXT, authOptions=fields(mode={"enum": ["disabled", "token"]}),
        headGroupSpec=fields("template", serviceType=TEXT, rayStartParams=TEXTS, template=POD),
        workerGroupSpecs=many(fields("groupName", "maxReplicas", "minReplicas", "template", groupName=TEXT, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, rayStartParams=TEXTS, template=POD)))))


def test_kubernetes_example_fits_the_crd():
    from importlib.metadata import version
    import ray
    job = yaml.safe_load((EXAMPLES/"kuberay.yaml").read_text())
    jsonschema.validate(job, KUBERAY)
    cluster = job["spec"]["rayClusterSpec"]
    for wrong in {"replica": 1}, {"replicas": "3"}, {"rayStartParams": {"num-cpus": 4}}, {"template": {"spec": {}}}:
        with pytest.raises(jsonschema.ValidationError): jsonschema.validate(dict(job, spec=job["spec"] | {"rayClusterSpec": cluster | {"workerGroupSpecs": [cluster["workerGroupSpecs"][0] | wrong]}}), KUBERAY)
    assert cluster["rayVersion"].split(".")[:2] == version("ray").split(".")[:2] and cluster["authOptions"]["mode"] == "token" and cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    options = re.findall('"--([a-z-]+)"', (Path(ray.__file__).parent/"scripts"/"scripts.py").read_text()) # importing it takes long
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["rayStartParams"].keys() <= {*options} and all(isinstance(v, str) for v in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert {m["name"] for m in pod["containers"][0].get("volumeMounts", [])} == {v["name"] for v in pod.get("volumes", [])}
    assert json.loads(json.loads(cluster["workerGroupSpecs"][1]["rayStartParams"]["resources"])) == {"phone": 8} # quoted once for the shell
