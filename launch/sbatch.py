"""What a job for Slurm asks for, and the text of the file that asks: nothing is run here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

__all__ = ["Job", "render"]


# Those that Slurm knows by name, bash and Python can catch, and the file has no other use for: TERM
# is what scancel sends.
_SIGNALS = ("USR1", "USR2", "HUP", "INT", "QUIT", "ALRM")
_FROM_0, _FROM_1 = range(2**31), range(1, 2**31)


def _asked(default: Any, text: str, numbers: range | None = None) -> Any:
    """An option, its help, and which integers it may be if it is no text."""
    return field(default=default, metadata={"help": text, "numbers": numbers})


@dataclass(frozen=True)
class Job:
    """One job; the options of launch/slurm.py are these fields."""

    launcher: str
    nodes: int = _asked(2, "machines", _FROM_1)
    ranks_per_node: int = _asked(2, "ranks on each of them, one for each of its GPUs", _FROM_1)
    cpus_per_rank: int = _asked(2, "cores for each rank", _FROM_1)
    gpus_per_node: int = _asked(0, "GPUs of each machine; 0 asks for none", _FROM_0)
    time: str = _asked("30:00", "limit, as Slurm writes it")
    name: str = _asked("shardscale", "name of the job")
    partition: str = _asked("", "partition, if not the default one")
    account: str = _asked("", "account, if not the default one")
    array: str = _asked("", "numbers of a job array, for example 1-10")
    program: str = _asked(
        "launch/train.py", "what each rank runs, seen from where sbatch is called"
    )
    max_restarts: int = _asked(
        0, "torchrun: how often all ranks start anew after one has failed", _FROM_0
    )
    max_requeues: int | None = _asked(
        None, "stop at the signal, save, requeue; this often at most", _FROM_0
    )
    stop_signal: str = _asked("USR2", "the signal to stop at")
    stop_ahead_s: int = _asked(
        120,
        "how many seconds before the time limit Slurm sends it",
        range(1, 2**16),  # more does not fit its message
    )

    def __post_init__(self) -> None:
        if self.launcher not in tuple(_RANKS):
            raise ValueError(
                f"the launcher is {self.launcher!r}, but must be one of {', '.join(_RANKS)}."
            )
        for each in fields(self):
            if each.name != "launcher":
                _check(each.name, getattr(self, each.name), each.metadata["numbers"], each.default)
        if not self.program:
            raise ValueError("--program is '', but must be the file that each rank runs.")
        if self.stop_signal not in _SIGNALS:
            raise ValueError(
                f"--stop-signal is {self.stop_signal!r}, but must be one of {', '.join(_SIGNALS)}."
            )
        if self.max_restarts and self.launcher != "torchrun":
            raise ValueError("--max-restarts is given, but only torchrun starts ranks anew.")
        if self.max_restarts and self.max_requeues is not None:
            raise ValueError(
                "--max-restarts and --max-requeues are both given, but torchrun would start the "
                "ranks anew that have left to be requeued. Use one of them."
            )


def _check(name: str, value: object, numbers: range | None, default: object) -> None:
    """Refuse a field that is not of its kind."""
    if numbers is None:
        if not (isinstance(value, str) and re.fullmatch(r"[\w.:,%/@+-]*", value, re.ASCII)):
            raise ValueError(
                f"{option(name)} is {value!r}, but must be text that no shell misreads: letters, "
                "digits and _.:,%/@+- alone."
            )
    # The default may be None. A bool and a float can be equal to one of the numbers.
    elif value is not default and (type(value) is not int or value not in numbers):
        raise ValueError(
            f"{option(name)} is {value!r}, but must be an integer from {numbers.start} to "
            f"{numbers.stop - 1}."
        )


def option(name: str) -> str:
    """Return the command-line option of a field."""
    return "--" + name.replace("_", "-")


def render(job: Job) -> str:
    """Return the file for sbatch."""
    requeued = job.max_requeues is not None
    parts = [
        _head(job),
        _PREPARE,
        *([_PREPARE_TO_STOP] if requeued else []),
        _SRUN,
        *([_CHOOSE_PLUGIN] if job.launcher == "mpi" else []),
        *([_IGNORE_SIGNAL] if requeued else []),
        _RANKS[job.launcher],
        _RUN_AND_REQUEUE if requeued else _RUN,
    ]
    return "\n".join(part.lstrip("\n") for part in parts)


def _head(job: Job) -> str:
    """What the file is, what it asks of Slurm, and what the rest of it has to know."""
    tasks, cpus = job.ranks_per_node, job.cpus_per_rank
    if job.launcher == "torchrun":  # it starts the ranks of a node itself
        tasks, cpus = 1, tasks * cpus
    asked = {
        "job-name": job.name,
        "partition": job.partition,
        "account": job.account,
        "array": job.array,
        "nodes": job.nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": cpus,
        "gpus-per-node": job.gpus_per_node,
        "time": job.time,
        "output": "%x-%A_%a.out" if job.array else "%x-%j.out",
        "open-mode": "append",  # what was printed before a requeue stays
    }
    known = {"program": job.program}
    if job.launcher == "torchrun":
        known |= {"ranks_per_node": job.ranks_per_node, "max_restarts": job.max_restarts}
    flags = []
    if job.max_requeues is not None:
        flags = ["#SBATCH --requeue\n"]
        asked["signal"] = f"B:{job.stop_signal}@{job.stop_ahead_s}"
        known |= {"stop_signal": job.stop_signal, "max_requeues": job.max_requeues}
    return "".join(
        (
            "#!/usr/bin/env bash\n",
            f"# {_TITLES[job.launcher]}\n",
            *([f"# {_REQUEUE_TITLE}\n"] if job.max_requeues is not None else []),
            "# Submit it with sbatch; what stands behind its name is for the program.\n",
            f"# Written by: {_command(job)}\n#\n",
            *(f"#SBATCH --{name}={value}\n" for name, value in asked.items() if value),
            *flags,
            "set -euo pipefail\n\n",
            *(f"{name}={value}\n" for name, value in known.items()),
        )
    )


def _command(job: Job) -> str:
    """Return the command that writes this job."""
    given = [
        f"{option(each.name)} {getattr(job, each.name)}"
        for each in fields(job)
        if each.name != "launcher" and getattr(job, each.name) != each.default
    ]
    return " ".join(["python launch/slurm.py", job.launcher, *given])


_TITLES = {
    "srun": "srun starts the ranks, one a task.",
    "torchrun": "srun starts a torchrun on each node, and these start the ranks.",
    "mpi": "srun starts the ranks, one a task, as one MPI job.",
}
_REQUEUE_TITLE = "Told to stop, they save and leave; the job is queued again, and goes on."

_PREPARE = r"""
fail() {
    echo "$*" >&2
    exit 2
}
[[ -n ${SLURM_JOB_ID:-} ]] || fail "This is a job for Slurm; submit it with: sbatch $0"
[[ -f $program ]] || fail "There is no $program in $PWD; call sbatch in the folder that has it."
command -v python >/dev/null || fail "There is no python in PATH; activate its environment first."

export PYTHONUNBUFFERED=1  # or the last words of a rank that is killed are lost
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # since Slurm 22.05 srun does not ask sbatch

# Slurm knows a task of a job array by two numbers.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
restarts=${SLURM_RESTART_COUNT:-0}
stamp() { echo "$(date +%FT%T%z) $*"; }
"""

_PREPARE_TO_STOP = r"""
command -v scontrol >/dev/null || fail "There is no scontrol in PATH, which requeues the job."
stopped=85  # the exit code of a rank that was told to stop, and has saved
export SHARDSCALE_STOP_SIGNAL=$stop_signal
set -- --checkpoint "checkpoints/$job" "$@"

# Slurm sends the signal to this shell, once. The ranks get it until they have ended: one that is
# still starting Python has nothing to hear it with. A task that Slurm has not quite started has
# nothing to ignore it with either, and would end; so the step is left alone at first.
step= told=
pass_on() {
    told=yes
    [[ -n $step ]] || return 0
    stamp "STOP $stop_signal"
    while kill -0 "$step" 2>/dev/null; do
        ((SECONDS < step_began + 5)) ||
            scancel --quiet --signal="$stop_signal" "$SLURM_JOB_ID" || true
        sleep 2
    done &
}
trap pass_on "$stop_signal"
"""

_SRUN = r"""
stamp "START job $job, restart $restarts, on $SLURM_JOB_NODELIST"
trap 'code=$?; stamp "END exit code $code"' EXIT
trap 'exit 143' TERM  # by scancel; without it EXIT would see the code of the command before

# One rank that fails ends all; those still there a minute after the first has finished are ended.
run=(srun --kill-on-bad-exit=1 --wait=60 --label)
"""

_CHOOSE_PLUGIN = r"""
# Tasks learn of each other from a plugin of srun, which must speak as their MPI does.
library=$(python -c '
try:
    import mpi4py
    mpi4py.rc.initialize = False
    from mpi4py import MPI
except Exception as error:  # RuntimeError where there is no MPI
    print(error)
    raise SystemExit(1)
print(MPI.Get_library_version().strip("\0\n "))') ||
    fail "mpi4py does not load${library:+ (${library%%$'\n'*})}. To install it with an MPI:" \
        "pip install mpi4py mpich"
case $library in
    *"Open MPI"*) plugin=pmix package="on Debian slurm-wlm-basic-plugins and libpmix-dev" ;;
    *) plugin=pmi2 package="on Debian slurm-wlm-basic-plugins, elsewhere slurm-libpmi" ;;
esac
srun --mpi=list 2>&1 | grep -qw "$plugin" ||
    fail "srun --mpi=list has no $plugin, but this MPI needs it: ${library%%$'\n'*}." \
        "Install it: $package."
# Slurm's pmi2 takes lines of up to 1024 bytes. The addresses of UCX now and then make longer ones,
# and MPICH then never starts; those of OFI are short.
[[ $library != *ch4:ucx*ofi* ]] || export MPIR_CVAR_CH4_NETMOD=${MPIR_CVAR_CH4_NETMOD:-ofi}
run+=(--mpi="$plugin")
"""

_IGNORE_SIGNAL = r"""
# Until Python has its handler the signal would end the rank. What is ignored here stays ignored
# there, also with torchrun, which has no use for it.
run+=(bash -c "trap '' $stop_signal"'; exec "$@"' rank)
"""

_RANKS = {
    "srun": r"""
run+=(python "$program" "$@")
""",
    "torchrun": r"""
[[ $SLURM_NTASKS == "$SLURM_JOB_NUM_NODES" ]] ||
    fail "There are $SLURM_NTASKS tasks for $SLURM_JOB_NUM_NODES nodes, but a torchrun starts all" \
        "ranks of its node. Give sbatch --ntasks-per-node=1, and no --ntasks."

# It finds out where to meet in each task, from that task's variables: to this shell every node is
# number 0.
run+=(python launch/torchrun.py --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$ranks_per_node")
run+=(--max-restarts "$max_restarts" "$program" "$@")
""",
    "mpi": r"""
# With -m mpi4py a rank that raises ends all; without it the others would wait for it for ever.
run+=(python -m mpi4py "$program" --comm mpi "$@")
""",
}

_RUN = r"""
"${run[@]}"
"""

_RUN_AND_REQUEUE = r"""
"${run[@]}" &
step=$! step_began=$SECONDS
[[ -z $told ]] || pass_on
while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true  # a signal to this shell ends the wait, not the ranks
done
code=0
wait "$step" || code=$?
((code == stopped)) || exit "$code"
if ((restarts >= max_requeues)); then
    echo "The ranks have saved and left as they were told, but were requeued $restarts times, of" \
        "$max_requeues at most. To go on: sbatch FILE --checkpoint checkpoints/$job" >&2
    exit "$code"
fi
stamp "REQUEUE job $job"
trap - EXIT
exec scontrol requeue "$job"  # the last command: it ends this shell
"""
