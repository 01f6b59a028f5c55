"""The command `shardscale doctor`: its options, and how it ends."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from shardscale.bring_up import come_together
from shardscale.comm.env import RankEnv, resolve
from shardscale.comm.patience import within
from shardscale.doctor import roster
from shardscale.doctor.codes import Code, Failure
from shardscale.doctor.examination import examine
from shardscale.doctor.exchange import Exchange, LostError
from shardscale.doctor.facts import look_at_oneself
from shardscale.doctor.report import Report
from shardscale.doctor.rounds import EndedError, Rounds
from shardscale.doctor.sections import Section
from shardscale.errors import ConfigError, ShardScaleError

__all__ = ["main"]

_LIMIT_S = 60.0
_GRACE_S = 10.0
_ALONE = Section(
    "one rank alone",
    [
        (
            "There was nobody to agree with. Start it on two or more, as you start your training: "
            "torchrun --nproc-per-node 2 -m shardscale doctor, "
            "srun --ntasks 2 python -m shardscale doctor or "
            "mpirun -n 2 python -m mpi4py -m shardscale doctor.",
        )
    ],
)


def main(arguments: Sequence[str]) -> NoReturn:
    """Examine the job that this process is a rank of; the process ends with the exit code.

    Collective: every rank of the job must call.
    """
    options = _parser().parse_args(arguments)
    try:
        env = resolve(os.environ)
    except ConfigError as error:
        # Which rank this is cannot be told, so every process says it.
        report = Report(sys.stdout, options.json)
        report.fail(Failure(Code.ENVIRONMENT, str(error)))
        sys.exit(report.conclude())
    report = Report(sys.stdout, options.json) if env.rank == 0 else Report(sys.stderr)
    code, is_clean = _take_part(env, report, options)
    if is_clean:
        dist.destroy_process_group()
        sys.exit(code)
    sys.stdout.flush()
    # Threads may be stuck, and a group that is broken can abort a process that ends as usual.
    os._exit(code)


def _take_part(env: RankEnv, report: Report, options: argparse.Namespace) -> tuple[Code, bool]:
    """Go through the examination; give the exit code, and whether nothing is left behind."""
    facts = within(_LIMIT_S, lambda: look_at_oneself(env))
    me = f"rank {env.rank} ({facts.host})"
    try:
        env, store, backend = within(
            2 * options.timeout + _GRACE_S,
            lambda: come_together(os.environ, None, options.timeout),
        )
    except (ShardScaleError, RuntimeError, TimeoutError) as error:
        judged = roster.judge({env.rank: facts})
        # What the other ranks of its host would show is the same.
        shown = judged.sections if env.local_rank == 0 else []
        report.add("facts", {env.rank: facts.as_json()}, judged._replace(sections=shown))
        is_wrong = isinstance(error, ConfigError)
        report.fail(Failure(Code.ENVIRONMENT if is_wrong else Code.MISSING, f"{me}: {error}"))
        return report.conclude(), False
    rounds = Rounds(Exchange(store, env.rank, env.world_size), report if env.rank == 0 else None)
    try:
        examine(
            rounds,
            facts._replace(env=env),
            store,
            backend,
            timeout_s=options.timeout,
            with_checks=not options.no_checks,
        )
        if env.world_size == 1:
            report.show(_ALONE)
        return rounds.end(), True
    except EndedError as error:
        return error.code, False
    except LostError as error:
        report.fail(Failure(Code.MISSING, f"{me}: {error}."))
        return report.conclude(), False


def _parser() -> argparse.ArgumentParser:
    codes = ", ".join(f"{code.value} {code.name}" for code in Code)
    parser = argparse.ArgumentParser(
        prog="shardscale doctor",
        description="Examine a job from inside. Start it as you start your training, on all ranks.",
        epilog=f"Exit code, of the first failure: {codes}.",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where rank 0 writes what all ranks found"
    )
    parser.add_argument(
        "--no-checks", action="store_true", help="leave out F1 to F10, the scalers' own checks"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how late a rank may come (default: 60)",
    )
    return parser
