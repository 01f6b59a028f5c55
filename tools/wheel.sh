#!/bin/sh
# Build the wheel into dist/, install it outside the checkout and test the copy that is installed.
#
#   sh tools/wheel.sh
#
# `make wheel` calls this when .venv is ready.
set -eu

python=$(pwd)/.venv/bin/python
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1

# From a copy, because what an earlier build left in the checkout would come into the wheel.
mkdir "$folder/source" "$folder/tests"
cp -R shardscale pyproject.toml README.md LICENSE "$folder/source"
rm -f "$folder"/source/shardscale/kernels/native/*.so
"$python" -m pip wheel -qq --no-deps -w "$folder" "$folder/source"
"$python" -m pip install -qq --no-deps --target "$folder/installed" "$folder"/*.whl
mkdir -p dist
cp "$folder"/*.whl dist

# The tests, too, from a copy: in the checkout the library beside them would be found first.
cp -R tests pyproject.toml "$folder/tests"
ci=$(pwd)/.ci
cd "$folder/tests"
COPY="$folder/installed" PYTHONPATH="$folder/installed:$ci" "$python" -m pytest -q \
    -p only_this_copy -p no_silent_skips -p no:cacheprovider tests/unit/test_native.py
