#!/usr/bin/env bash
# Installs llama-cpp-python from the package registry into a virtual environment of its own, for
# `draftsmith bench decode --peer llama-cpp-python`, and its OpenAI server for `regenerate-through-faults.sh`. Compiles
# llama.cpp: minutes, needs a C++ compiler.
#
# Usage: bench/peers/install-llama-cpp-python.sh [FOLDER]     (default: runs/peers/llama-cpp-python)
set -euo pipefail

folder=${1:-runs/peers/llama-cpp-python}
version=0.3.36
python3 -m venv "$folder"
# Where its AMX code crashes (seen in a virtual machine), name the instruction sets instead:
#   CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON" …
# The examples, the own server and the vision code of llama.cpp are not used; leaving them out halves the build.
CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF ${CMAKE_ARGS:-}" \
    "$folder/bin/pip" install "llama-cpp-python[server]==$version"
echo
echo "draftsmith bench decode --peer llama-cpp-python --peer-python $folder/bin/python …"
