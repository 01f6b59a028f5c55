#!/usr/bin/env bash
# Starts ranks with the mpirun that comes first in PATH, MPICH's, Intel's or Open MPI's:
#
#   launch/mpirun.sh -n 4 launch/train.py --steps 100
#   MPIRUN_FLAGS="--hostfile hosts" launch/mpirun.sh -n 8 launch/train.py
#
#   -n N              ranks; one for each slot, as in a job of Slurm, if not given
#   --oversubscribe   more ranks than there are cores
#   --as-root         root is meant, as in a container
#
# MPICH asks for neither of the last two. MPIRUN_FLAGS is given to mpirun as it stands.
set -euo pipefail

usage() { # what stands above
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
}
fail() {
    echo "launch/mpirun.sh: $*" >&2
    exit 2
}

# Name and version, from what an mpirun or a library says of itself.
name_of() {
    local text=$1 name=
    case $text in
        *"Open MPI"*) name="Open MPI" ;;
        *"Intel(R) MPI"*) name="Intel MPI" ;;
        *MPICH* | *HYDRA*) name=MPICH ;;
        *) name=${text%%$'\n'*} ;;
    esac
    if [[ $text =~ [0-9]+(\.[0-9]+)+ ]]; then
        name+=" ${BASH_REMATCH[0]}"
    fi
    echo "$name"
}

number=() oversubscribe=false as_root=false
while [[ ${1:-} == -* ]]; do
    case $1 in
        -h | --help) usage ;;
        -n)
            [[ ${2:-} =~ ^[1-9][0-9]{0,5}$ ]] || fail "-n is '${2:-}', but must be a number from 1 on."
            number=(-n "$2")
            shift
            ;;
        --oversubscribe) oversubscribe=true ;;
        --as-root) as_root=true ;;
        *) fail "$1 is unknown; there are -n, --oversubscribe and --as-root, and MPIRUN_FLAGS for others." ;;
    esac
    shift
done
[[ $# -ge 1 ]] || fail "no program is named, as in: launch/mpirun.sh -n 4 launch/train.py"
[[ -f $1 ]] || fail "there is no program '$1' in $PWD."

command -v mpirun >/dev/null ||
    fail "there is no mpirun in PATH: activate the environment that has it, or module load an MPI."
command -v python >/dev/null || fail "there is no python in PATH: activate its environment first."
starter=$(name_of "$(mpirun --version 2>&1)")
library=$(python -c '
try:
    import mpi4py
    mpi4py.rc.initialize = False
    from mpi4py import MPI
except Exception as error:  # RuntimeError where there is no MPI
    print(error)
    raise SystemExit(1)
print(MPI.Get_library_version().strip("\0\n "))') ||
    fail "$(command -v python) cannot load mpi4py${library:+ (${library%%$'\n'*})}: pip install mpi4py," \
        "beside the MPI of this mpirun."
library=$(name_of "$library")
# An mpirun of another MPI would start so many worlds of one rank each.
[[ $starter == "$library" ]] ||
    fail "$(command -v mpirun) is of $starter, but mpi4py of $(command -v python) uses $library:" \
        "put the mpirun of $library first in PATH, or install mpi4py for $starter."

read -ra flags <<<"${MPIRUN_FLAGS:-}"
if [[ $starter == "Open MPI"* ]]; then
    # It binds each rank to one core, which all threads of torch would share.
    flags+=(--bind-to none)
    if $oversubscribe; then
        flags+=(--map-by :OVERSUBSCRIBE)
    fi
    if $as_root; then
        flags+=(--allow-run-as-root)
    elif ((EUID == 0)); then
        fail "Open MPI does not run as root; if root is meant, as in a container, pass --as-root."
    fi
fi
# With -m mpi4py a rank that raises ends all; without it the others would wait for it for ever.
exec mpirun "${flags[@]}" "${number[@]}" python -m mpi4py "$@"
