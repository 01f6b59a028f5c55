#!/bin/sh
# Make .venv ready for one purpose, or say in one sentence why that cannot be done.
#
#   sh tools/venv.sh demo|test|docs|bench
#
# PYTHON names the interpreter to build it with, TORCH the torch to install. The Makefile calls this
# before every target; when nothing has changed it does nothing.
set -eu

extra=$1
torch=${TORCH:-torch==2.13.0}
venv_python=.venv/bin/python
stamp=.venv/.ready-$extra
export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'set-up: %s\n' "$*"; }
fail() { printf 'set-up: %s\n' "$*" >&2; exit 1; }

# True if `$1` has a torch that is new enough and, with a second argument, can use a GPU.
has_torch() {
    "$1" - "${2:-}" 2>/dev/null <<'PY'
import sys
import torch
new_enough = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)
sys.exit(not (new_enough and (sys.argv[1] != "cuda" or torch.cuda.is_available())))
PY
}

# True if torch's own index of CPU builds can be reached from here.
reaches_cpu_index() {
    "$venv_python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' \
        "$1" >/dev/null 2>&1
}

# The folder is part of the key: a virtual environment that was moved or copied is of no use.
# The sources in C are, too: they are compiled when shardscale is installed.
key="$(cat pyproject.toml tools/venv.sh shardscale/kernels/native/*.[ch] 2>/dev/null | cksum) $torch $(pwd)"

# A PYTHON that was named must be the one in .venv, or the wrong one would be tested in silence.
if [ -n "${PYTHON:-}" ] && [ -x "$venv_python" ]; then
    ask='import platform; print(platform.python_version())'
    wanted=$("$PYTHON" -c "$ask" 2>/dev/null) || fail "$PYTHON does not run, so name another Python 3.10 or newer with PYTHON=."
    present=$("$venv_python" -c "$ask" 2>/dev/null) || present=$wanted
    [ "$wanted" = "$present" ] || fail ".venv holds Python $present, but $PYTHON is $wanted; run 'make clean' first."
fi

if [ -x "$venv_python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then
    exit 0
fi

if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null 2>&1 ||
        fail "$python was not found; install Python 3.10 or newer (Debian: apt-get install python3 python3-venv), or name one with PYTHON=."
    "$python" -c '' >/dev/null 2>&1 ||
        fail "$python does not run, so name another Python 3.10 or newer with PYTHON=."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$python is $("$python" --version 2>&1), but 3.10 or newer is needed; name one with PYTHON=."
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module; on Debian or Ubuntu run 'apt-get install python3-venv', then try again."

    site=
    if has_torch "$python" cuda; then
        say "$python already has a torch that can use the GPU here, so .venv shares it."
        site=--system-site-packages
    fi
    say "Creating .venv with $("$python" --version)."
    "$python" -m venv --clear $site .venv
    if [ -n "$site" ] && ! has_torch "$venv_python"; then
        # $python lives in a virtual environment itself, and those hand nothing on.
        "$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
            >"$("$venv_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
    fi
fi

if has_torch "$venv_python"; then
    say "torch $("$venv_python" -c 'import torch; print(torch.__version__)') is there already."
else
    # An exact pin: anything looser brings the newest build, with gigabytes of GPU libraries.
    cpu_index=https://download.pytorch.org/whl/cpu
    quiet=-qq
    [ ! -t 1 ] || quiet=
    say "Installing $torch, the CPU build where one can be had (about 200 MB; this can take some minutes)."
    if [ "$(uname -s)" = Linux ] && reaches_cpu_index "$cpu_index/torch/"; then
        "$venv_python" -m pip install $quiet --extra-index-url "$cpu_index" "$torch"
    else
        "$venv_python" -m pip install $quiet "$torch"
    fi
fi

say "Installing shardscale from this folder, with what '$extra' needs."
"$venv_python" -m pip install -qq -e ".[$extra]"
printf '%s\n' "$key" >"$stamp"
say "Ready."
