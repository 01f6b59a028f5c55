"""What kernels are compared with, round by round, and what was hoped for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from clocks import Seconds
from side_by_side import Row, quantile

__all__ = ["Facts", "comparisons", "no_large_temporary", "small_tensor"]

MIB = 2**20
LARGE_GPU, LARGE_CPU = 256 * 10**6, 256 * MIB
MANY = 1000
# A copy of a gradient would have its size; work buffers and tables are small.
GOAL_MIB = 4
SMALL = 4096
STAND_IN = (
    "torch's operator refuses bfloat16 here; its _foreach_mul_ stands in, which looks for no Inf"
)
FLOAT16 = "torch's scaler refuses float16 gradients; its operator is called without that question"


class Facts(NamedTuple):
    """What decides which goals a case has."""

    device: str
    """The type."""
    dtype: torch.dtype
    nbytes: int
    num: int
    torch_checks: bool
    """Whether torch's operator takes this dtype here; else ``_foreach_mul_`` stands in."""

    @property
    def is_large(self) -> bool:
        return self.nbytes >= (LARGE_GPU if self.device == "cuda" else LARGE_CPU)


class Pair(NamedTuple):
    """Two ways whose times are divided in each round."""

    what: str
    ours: str
    against: str
    kind: str = "device"
    of: str = "torch / ours"


UNSCALE = "ours: unscale_"
NOT_ACTIVE = "ours: unscale_ + clip, not active"
TORCH_ACTIVE = "torch: unscale_ + clip, active"
PAIRS = {
    "torch": Pair("unscale_, against torch's operator", UNSCALE, "torch: unscale_"),
    "copy": Pair("unscale_, against copy_", UNSCALE, "copy_", of="copy_ / ours"),
    "mul": Pair("unscale_, against mul_ in place", UNSCALE, "mul_", of="mul_ / ours"),
    "sum": Pair(
        "unscale_ with the sum of squares, against without",
        "ours: unscale_ with the sum",
        UNSCALE,
        of="with / without",
    ),
    "norm": Pair(
        "check_ with the sum, against torch's _foreach_norm, which does not check",
        "ours: check_ with the sum",
        "torch: _foreach_norm",
    ),
    "not active": Pair(
        "unscale_ + clip, not active", NOT_ACTIVE, "torch: unscale_ + clip, not active"
    ),
    "not active, mul": Pair(
        "unscale_ + clip, not active, against one mul_ in place",
        NOT_ACTIVE,
        "mul_",
        of="mul_ / ours",
    ),
    "active": Pair("unscale_ + clip, active", "ours: unscale_ + clip, active", TORCH_ACTIVE),
    "folded": Pair(
        "check_, then one multiply that unscales and clips, against unscale_ + clip, active",
        "ours: check_, folded multiply",
        TORCH_ACTIVE,
    ),
    "step": Pair(
        "fold_clip + fused AdamW, against unscale_ + clip + fused AdamW",
        "ours: fold_clip + fused AdamW",
        "torch: unscale_ + clip + fused AdamW",
    ),
    "host, unscale": Pair(
        "the scaler's unscale_, host time",
        "ours: scaler.unscale_",
        "torch: scaler.unscale_",
        kind="host",
    ),
    "host, not active": Pair(
        "unscale_ + clip, not active, host time",
        NOT_ACTIVE,
        "torch: unscale_ + clip, not active",
        kind="host",
    ),
}


def goals_of(facts: Facts) -> dict[str, float]:
    """Key of a pair -> the goal; for ``sum`` the most, for all others the least."""
    if facts.device == "cuda":
        if facts.is_large:
            return {
                "copy": 0.92,
                "sum": 1.05,
                "not active": 2.4,
                "active": 1.2,
                "folded": 1.6,
                "step": 1.25,
            }
        return {"not active": 4, "host, not active": 8} if facts.num >= MANY else {}
    if not facts.is_large:
        return {}
    by_dtype: dict[torch.dtype, dict[str, float]] = {
        torch.float32: {"torch": 1, "not active": 2.5},
        torch.bfloat16: {"torch": 1.6, "not active": 4},
        torch.float16: {"not active, mul": 0.9},
    }
    return by_dtype[facts.dtype]


def comparisons(facts: Facts, taken: Mapping[str, Sequence[Seconds]]) -> list[Row]:
    """A row for each pair whose ways were measured."""
    goals = goals_of(facts)
    rows = [
        bandwidth(name, facts.nbytes, taken[name]) for name in ("copy_", "mul_") if name in taken
    ]
    for key, pair in PAIRS.items():
        if facts.device == "cpu" and key == "host, not active":
            continue  # the host is the device: this row stands there already
        if pair.ours in taken and pair.against in taken:
            note = note_of(facts) if pair.against.startswith("torch: ") and key != "norm" else ""
            rows.append(row_of(pair, taken, goals.get(key), note, at_most=key == "sum"))
    return rows


def note_of(facts: Facts) -> str:
    """What stands in for torch's ``unscale_`` where torch refuses a dtype."""
    if not facts.torch_checks:
        return STAND_IN
    return FLOAT16 if facts.dtype == torch.float16 else ""


def row_of(
    pair: Pair,
    taken: Mapping[str, Sequence[Seconds]],
    goal: float | None,
    note: str = "",
    at_most: bool = False,
) -> Row:
    ours = [getattr(seconds, pair.kind) for seconds in taken[pair.ours]]
    against = [getattr(seconds, pair.kind) for seconds in taken[pair.against]]
    ratios = [o / a if at_most else a / o for o, a in zip(ours, against, strict=True)]
    middle = quantile(ratios, 0.5)
    return Row(
        pair.what,
        "us",
        1e6 * quantile(ours, 0.5),
        1e6 * quantile(against, 0.5),
        (middle, quantile(ratios, 0.2), quantile(ratios, 0.8)),
        pair.of,
        "" if goal is None else f"{'<=' if at_most else '>='} {goal:g} x",
        None if goal is None else (middle <= goal if at_most else middle >= goal),
        note,
    )


def bandwidth(name: str, nbytes: int, taken: Sequence[Seconds]) -> Row:
    """How fast the roofline is, its reading and its writing counted."""
    rate = 2 * nbytes / quantile([seconds.device for seconds in taken], 0.5) / 1e9
    return Row(f"{name} of as many bytes, torch's", "GB/s", rate, None, None, "", "", None)


def no_large_temporary(largest: Mapping[str, int]) -> Row:
    """The call of ours that allocates most, and how much."""
    call = max(largest, key=lambda name: largest[name])
    mib = largest[call] / MIB
    what = f"most that a call of ours allocates ({call.removeprefix('ours: ')})"
    return Row(what, "MiB", mib, None, None, "", f"<= {GOAL_MIB} MiB", mib <= GOAL_MIB)


def small_tensor(facts: Facts, taken: Mapping[str, Sequence[Seconds]]) -> list[Row]:
    """unscale_ of one gradient of 4 KiB; nothing of a larger one."""
    if facts.nbytes > SMALL:
        return []
    pair = PAIRS["torch"]._replace(what="unscale_ of one gradient of 4 KiB")
    note = "" if facts.torch_checks else STAND_IN  # no scaler takes part here
    if facts.device == "cpu":
        return [row_of(pair, taken, 1, note)]
    host = pair._replace(what="the same, host time", kind="host")
    return [row_of(pair, taken, None, note), row_of(host, taken, None, note)]
