#!/usr/bin/env bash
# Installs PyTorch from the package registry into a virtual environment of its own, for
# `draftsmith bench train --peer torch`. The default package brings CUDA libraries (5 GB unpacked); only its CPU part is
# used. `torch-compiled` needs a C++ compiler as well.
#
# Usage: bench/peers/install-torch.sh [FOLDER]     (default: runs/peers/torch)
set -euo pipefail

folder=${1:-runs/peers/torch}
version=2.15.0
python3 -m venv "$folder"
"$folder/bin/pip" install "torch==$version"
echo
echo "draftsmith bench train --peer torch --peer torch-compiled --peer-python $folder/bin/python …"
