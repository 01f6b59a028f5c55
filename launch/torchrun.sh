#!/usr/bin/env bash
# Starts torchrun on this machine, alone or as one of several:
#
#   launch/torchrun.sh --ranks-per-node 4 launch/train.py --steps 100
#   RDZV_ENDPOINT=node0:29400 RDZV_ID=monday launch/torchrun.sh --nodes 2 launch/train.py
#
#   --ranks-per-node N   one rank for each GPU, or for each core where there is none, if not given
#   --nodes N            machines, 1 if not given
#   --node N             which of them this is, see below
#   --max-restarts N     how often all ranks start anew after one has failed, 0 if not given
#
# With several, run the same line on each of them. RDZV_ENDPOINT is a free port of one of them, by
# the name it has for the others; RDZV_ID is a word that no other job uses. Where a machine does not
# recognise its own name there, --node tells which one it is; number 0 is that of the endpoint.
# On Slurm use slurm/torchrun.sbatch, which needs none of this.
set -euo pipefail

usage() { # what stands above
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
}
fail() {
    echo "launch/torchrun.sh: $*" >&2
    exit 2
}
# Put the value of an option into a variable, if it is a number from $3 on.
take() {
    [[ $# -eq 4 ]] || fail "$2 has no value."
    [[ $4 =~ ^[0-9]{1,6}$ && 10#$4 -ge $3 ]] || fail "$2 is '$4', but must be a number from $3 on."
    printf -v "$1" %s "$((10#$4))"
}

nodes=1 ranks_per_node=auto max_restarts=0 node=
while [[ ${1:-} == -* ]]; do
    case $1 in
        -h | --help) usage ;;
        --nodes) take nodes "$1" 1 "${@:2:1}" ;;
        --ranks-per-node) take ranks_per_node "$1" 1 "${@:2:1}" ;;
        --max-restarts) take max_restarts "$1" 0 "${@:2:1}" ;;
        --node) take node "$1" 0 "${@:2:1}" ;;
        *) fail "$1 is unknown; there are --nodes, --ranks-per-node, --max-restarts and --node." ;;
    esac
    shift 2
done
[[ $# -ge 1 ]] || fail "no program is named, as in: launch/torchrun.sh --nodes 1 launch/train.py"
[[ -f $1 ]] || fail "there is no program '$1' in $PWD."
[[ -z $node || $node -lt $nodes ]] || fail "--node is $node, but the $nodes nodes are counted from 0."

if ((nodes == 1)); then
    # torchrun takes a free port and an id of its own. No name of this machine is looked up, which
    # can fail or take long.
    meeting=(--standalone --local-addr 127.0.0.1)
else
    endpoint=${RDZV_ENDPOINT:-}
    [[ $endpoint =~ ^[^:[:space:]]+:([0-9]{1,5})$ && 10#${BASH_REMATCH[1]} -le 65535 ]] ||
        fail "RDZV_ENDPOINT is '$endpoint', but for $nodes nodes must be HOST:PORT, as node0:29400."
    [[ -n ${RDZV_ID:-} ]] ||
        fail "RDZV_ID is not set, but $nodes nodes find each other by it: any word, the same on all."
    meeting=(--rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$RDZV_ID")
    [[ -z $node ]] || meeting+=(--rdzv-conf "is_host=$((node == 0))")
fi
exec python "${BASH_SOURCE[0]%/*}/torchrun.py" "${meeting[@]}" --nnodes "$nodes" \
    --nproc-per-node "$ranks_per_node" --max-restarts "$max_restarts" "$@"
