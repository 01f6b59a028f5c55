"""The way through all parts, as every rank goes it."""

from __future__ import annotations

from functools import partial

import torch
from torch.distributed.distributed_c10d import Store

from shardscale.doctor import group, names, roster, timing
from shardscale.doctor.checks import CHECKS, judge_ours, judge_torchs, see
from shardscale.doctor.codes import Code
from shardscale.doctor.facts import Facts
from shardscale.doctor.ground import prepare
from shardscale.doctor.rounds import Part, Rounds
from shardscale.doctor.sections import Judged
from shardscale.scaler import ShardedGradScaler

__all__ = ["examine"]

_LIMIT_S = 20.0


def examine(
    rounds: Rounds,
    facts: Facts,
    store: Store,
    backend: str,
    *,
    timeout_s: float,
    with_checks: bool,
) -> None:
    """Look at one part of the job after the other.

    Args:
        rounds: Between the ranks of the job.
        facts: What this rank knows of itself.
        store: The one that the job's group is made over.
        backend: Of that group.
        timeout_s: Seconds that ranks may come late, and that making the group may take.
        with_checks: Whether to run F1 to F10.

    Raises:
        EndedError: a part could not be finished.
        LostError: rank 0 is lost.

    Collective: every rank of the job must call.
    """
    env = facts.env
    _, first_ranks = rounds.go(
        Part("facts", timeout_s, lambda: facts, Facts.as_json, roster.judge_told, Code.MISSING)
    )
    # One rank of each host asks for the others.
    asked = list(first_ranks) if env.rank in first_ranks.values() else []
    rounds.go(
        Part(
            "names",
            _LIMIT_S,
            lambda: names.look_up(asked),
            names.Seen._asdict,
            names.judge,
            Code.NAMES,
        )
    )
    joined, _ = rounds.go(
        Part(
            "group",
            timeout_s,
            lambda: group.join_group(env, store, backend, timeout_s),
            group.Joined.as_json,
            group.judge,
            Code.GROUP,
        )
    )
    rounds.go(
        Part(
            "all-reduce",
            _LIMIT_S,
            lambda: timing.median_times(joined.devices),
            dict,
            timing.judge,
            Code.ALL_REDUCE,
        )
    )
    if with_checks:
        _check(rounds, joined.devices[-1])


def _check(rounds: Rounds, device: torch.device) -> None:
    """All checks with our scaler, and then with torch's: what it leaves behind harms no more."""
    ground, _ = rounds.go(
        Part(
            "groups of the checks",
            _LIMIT_S,
            lambda: prepare(device),
            lambda ground: ground.size,
            lambda _: Judged([]),
            Code.GROUP,
        )
    )
    for check in CHECKS:
        look = partial(see, check, ShardedGradScaler, ground)
        judge = partial(judge_ours, check)
        rounds.go(Part(f"{check.label} shardscale", _LIMIT_S, look, str, judge, Code.CHECK))
    for check in CHECKS:
        look = partial(see, check, check.torchs, ground)
        judge = partial(judge_torchs, check)
        rounds.go(Part(f"{check.label} torch", _LIMIT_S, look, str, judge, None))
