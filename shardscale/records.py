"""The immutable records of one training step, in the order it makes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = [
    "Agreement",
    "Call",
    "Culprit",
    "Layout",
    "Members",
    "ScaleState",
    "ShardStats",
    "StepReport",
    "Verdict",
]


class Members(NamedTuple):
    """The ranks of an agreeing group."""

    rank: int  # this one's number in the group
    size: int
    here: int  # this one's number in the whole job, as layouts use it
    ranks: frozenset[int] | None  # all of them, numbered so; None if the transport does not know


class Layout(NamedTuple):
    """Where one parameter's gradient lives. Ranks are numbered in the whole job."""

    kind: str  # for people: "FSDP1 FULL_SHARD", "DDP", "DTensor (Shard(dim=0),)", "plain"
    num_ranks: int  # how many ranks it speaks of; others may hold copies, or other things
    ranks: frozenset[int]  # those of them that it names: all, or for HYBRID this rank's two groups
    holders: tuple[int, ...]  # those that hold the same piece as this rank, the first counts it;
    # empty for this rank alone
    spec: object = None  # of a DTensor: its mesh and placements


class ScaleState(NamedTuple):
    """What a policy carries from one update to the next; three 0-dim tensors on one device."""

    scale: Tensor  # () float32
    growth_tracker: Tensor  # () int32: good steps since the scale last changed
    hysteresis_tracker: Tensor  # () int32: bad steps still tolerated before the scale backs off


class ShardStats(NamedTuple):
    """What one rank brings to a verdict; it exists with no shard too."""

    found_inf: Tensor  # () float32, 0.0 or 1.0
    sum_squares: (
        Tensor | None
    )  # () float64 over the shards this rank owns; None where not asked for
    wishes: bool = False  # this rank wishes that all ranks stop


class Call(NamedTuple):
    """What one rank believes that all ranks are doing; any difference is a disagreement.

    The floats are compared by their bits, so two NaN agree and 0.0 and -0.0 do not.
    """

    num_updates: int  # updates so far: the step number that salts the message
    method: str  # of the scaler
    ordinal: int  # how many verdicts since that update
    scaler: int  # which of this process's scalers, in the order they were made
    max_norm: float | Tensor | None  # a tensor is () float32
    policy: str  # the policy's class and numbers
    state: ScaleState
    stamp: Tensor  # () float32: the scale these gradients were made with
    num_replayed: Tensor | None = None  # () int64: updates besides, by a graph; None without one


class Verdict(NamedTuple):
    """What all ranks decided about a set of gradients; the same bits on every rank."""

    found_inf: Tensor  # () float32, exactly 0.0 or 1.0
    grad_norm: (
        Tensor  # () float32, L2 norm of the unscaled gradients of all ranks; NaN if not computed
    )


class Agreement(NamedTuple):
    """A verdict, whether the ranks belonged together when they made it, and who wished to stop."""

    flags: Tensor  # (4,) float32, each 0.0 or 1.0: found, drifted, faulted, wished
    grad_norm: Tensor  # () float32
    words: Tensor  # (2,) float64: the reduced message, which the next one is fingerprinted with

    @property
    def found_inf(self) -> Tensor:
        """() float32: 1.0 where the step must be skipped."""
        return self.flags[0]

    @property
    def drifted(self) -> Tensor:
        """() float32: 1.0 where the ranks' calls or states differ, from here on for good."""
        return self.flags[1]

    @property
    def faulted(self) -> Tensor:
        """() float32: 1.0 where a rank could not judge its own gradients."""
        return self.flags[2]

    @property
    def apart(self) -> Tensor:
        """(2,) float32: drifted and faulted; 1.0 in either where the ranks fell apart."""
        return self.flags[1:3]

    @property
    def verdict(self) -> Verdict:
        """What callers see of it."""
        return Verdict(self.flags[0], self.grad_norm)


class Culprit(NamedTuple):
    """One parameter whose gradient was not finite, on one rank."""

    rank: int
    host: str
    name: str
    num_inf: int
    num_nan: int
    numel: int


class StepReport(NamedTuple):
    """One finished iteration as the host knows it; local to this rank, plain numbers."""

    step: int  # 0 for the first update
    scale: float
    next_scale: float
    skipped: bool
    grad_norm: float  # NaN where it was not computed
    culprits: tuple[Culprit, ...]
