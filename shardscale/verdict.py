"""Turn each rank's findings into one verdict that all ranks share, with one all-reduce.

The message is two float64 numbers, summed over the group. Word 1 is the sum of squares. Word 0 is
an exact integer,

.. code-block:: text

    bad + B * wish + B * W * weight(rank) * fingerprint

    bad and wish in {0, 1},  fingerprint in 1..1022
    B = size + 1,  W = 1 + the number of ranks whose wish to stop is heard at once

whose weights sum to zero over the group. If all ranks send the same fingerprint the last term
vanishes, and what is left is the number of bad ranks, below B, and B times the number of wishes,
below W; if they do not, a multiple of B * W remains, and every rank reads it from the same reduced
number. A rank that cannot judge its own gradients sends NaN in word 0, which no other summand can
hide, and -1 in word 1, which adds up to minus the size of the group only where all ranks do so.
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shardscale.comm import Communicator
from shardscale.errors import ConfigError
from shardscale.records import Agreement, Call, ShardStats

__all__ = ["MAX_RANKS", "agree", "alone", "clip_coefficient", "joint_found_inf"]

# The largest group whose message has room for one wish; see `units_of`.
MAX_RANKS = 2**17
_NUM_FINGERPRINTS = 1022
_DRAWS = 170
_LARGEST_WEIGHT = 3 * (_DRAWS - 1) + 2
_LARGEST = torch.finfo(torch.float32).max
_PRIME = 2**32 + 15  # the smallest prime above every 32-bit word
_NUM_MULTIPLIERS = 7
_STRIDE = 0x9E3779B1  # odd, so that its multiples go through all numbers of 29 bits


def agree(
    stats: ShardStats,
    call: Call,
    comm: Communicator,
    previous: Agreement | None = None,
    faulted: bool = False,
) -> Agreement:
    """Turn each rank's findings into one verdict that all ranks share.

    Args:
        stats: This rank's flag and its sum of squares over the shards it owns; both exist with no
            shard too.
        call: What this rank believes all ranks are doing.
        comm: The agreeing group, of at most ``MAX_RANKS`` ranks.
        previous: The agreement before this one. Its bits are part of the fingerprint, and a drift
            that it found is still one.
        faulted: This rank could not judge its gradients: no rank will find this call good.

    Returns:
        The same bits on every rank, on the device of ``stats``. Whether the ranks disagree is a
        function of the reduced words alone, never of a comparison with this rank's own value.

    Raises:
        ConfigError: the group is larger than the message can count exactly.

    Collective: every rank of ``comm`` must call; sends 2 float64, once.
    Sync: none, unless the state lives on the CPU.
    """
    if comm.size > MAX_RANKS:
        raise ConfigError(
            f"the agreeing group has {comm.size} ranks, but one exact message counts at most "
            f"{MAX_RANKS}. Name a smaller group with process_group=."
        )
    message = pack(stats, call, comm.rank, comm.size, previous, faulted)
    if hasattr(comm, "step_under_way"):
        comm.step_under_way = call.num_updates
    comm.all_reduce_sum_(message)
    return unpack(message, stats.sum_squares is not None, comm.size, previous)


def alone(stats: ShardStats, previous: Agreement | None = None) -> Agreement:
    """The verdict of a single rank: its own findings, nothing sent."""
    return unpack(_message(stats, 0), stats.sum_squares is not None, 1, previous)


def pack(
    stats: ShardStats,
    call: Call,
    rank: int,
    size: int,
    previous: Agreement | None = None,
    faulted: bool = False,
) -> Tensor:
    """The (2,) float64 message of one rank, on the device of ``stats``."""
    if faulted:
        return _message(
            ShardStats(stats.found_inf, torch.full_like(stats.found_inf, -1.0)), math.nan
        )
    units = units_of(size)
    term = weight(call.num_updates, rank, size) * fingerprint(call, previous) * units.call
    if stats.wishes and is_heard(call.num_updates, rank, size):
        term = term + units.wish
    return _message(stats, term)


def unpack(words: Tensor, normed: bool, size: int, previous: Agreement | None = None) -> Agreement:
    """Read the reduced message; nothing else enters, so all ranks read the same.

    The norm of many large float32 values need not fit float32; saturated, it still counts as the
    finite number that it is. The payload of a NaN depends on the order of summation, so it is
    dropped: its bits must not enter the next fingerprint.

    Args:
        words: (2,) float64, the sum over all ranks.
        normed: Whether word 1 carries a sum of squares.
        size: The number of ranks. If all of them are at fault, as by a mistake in the program that
            they share, each raises its own error, and none has to learn of another's.
        previous: An agreement whose drift still stands.
    """
    if _is_on_host(words):
        return _unpack_on_host(words, normed, size, previous)
    units = units_of(size)
    total, sum_squares = words[0], words[1]
    stopped = total.isnan()
    faulted = stopped & (sum_squares != -size)
    counts = total.remainder(units.call)  # exact for integers, as fmod is
    drifted = (total != counts) & ~stopped
    if previous is not None:
        drifted = drifted | (previous.drifted > 0)
    wished = counts >= units.wish
    found = (counts.remainder(units.wish) > 0) | drifted | stopped
    if normed:
        norm = torch.where(stopped, math.nan, sum_squares.sqrt())
        found = found | ~norm.isfinite()
        grad_norm = torch.where(norm.isfinite(), norm.clamp(max=_LARGEST), norm).float()
    else:
        grad_norm = torch.full_like(total, math.nan, dtype=torch.float32)
    words = torch.where(words.isnan(), math.nan, words)
    return Agreement(torch.stack([found, drifted, faulted, wished]).float(), grad_norm, words)


def _unpack_on_host(
    words: Tensor, normed: bool, size: int, previous: Agreement | None
) -> Agreement:
    """The same reading in Python numbers, which on the host cost a tenth of tensors."""
    units = units_of(size)
    total, sum_squares = words.tolist()
    stopped = math.isnan(total)
    faulted = stopped and sum_squares != -size
    counts = 0.0 if stopped else total % units.call
    drifted = not stopped and total != counts
    if previous is not None:
        drifted = drifted or previous.flags.tolist()[1] > 0
    wished = counts >= units.wish
    found = counts % units.wish > 0 or drifted or stopped
    grad_norm = math.nan
    if normed:
        grad_norm = math.nan if stopped else math.sqrt(sum_squares)
        found = found or not math.isfinite(grad_norm)
        grad_norm = min(grad_norm, _LARGEST) if math.isfinite(grad_norm) else grad_norm
    if stopped or math.isnan(sum_squares):
        words = torch.where(words.isnan(), math.nan, words)
    flags = torch.tensor([found, drifted, faulted, wished], dtype=torch.float32, device="cpu")
    return Agreement(flags, torch.tensor(grad_norm, dtype=torch.float32, device="cpu"), words)


def joint_found_inf(agreements: Sequence[Agreement]) -> Tensor:
    """() float32: 1.0 where any of the verdicts is bad, else 0.0."""
    if len(agreements) == 1:
        return agreements[0].found_inf
    return torch.stack([agreement.found_inf for agreement in agreements]).amax()


def clip_coefficient(agreement: Agreement, max_norm: float | Tensor) -> Tensor:
    """The factor that brings the norm down to ``max_norm``: () float32 in (0, 1], 1 on a skip.

    Source: ``torch.nn.utils.clip_grads_with_norm_``: min(1, max_norm / (norm + 1e-6)); the norm is
        the root of the float64 sum of squares.
    """
    norm = agreement.words[1].sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    # Clipping by a norm that is Inf or NaN would turn every gradient into 0 or NaN.
    return torch.where(agreement.found_inf > 0, 1.0, factor).float()


def fingerprint(call: Call, previous: Agreement | None) -> int | Tensor:
    """A number in 1..1022 that differs, with all but about 0.1 % probability, where calls differ.

    What the host knows is one word; what lives on a device stays there, so the result is an int
    for a state on the CPU and a () int64 tensor otherwise, by the same formula.

    Source: multiply-mod-prime universal hashing, Carter and Wegman 1979; the multipliers are drawn
    from the step number alone, so two calls that collide once are told apart at another step.
    """
    max_norm = None if isinstance(call.max_norm, Tensor) else call.max_norm
    known = (call.num_updates, call.method, call.ordinal, call.scaler, max_norm, call.policy)
    words: list[int | Tensor] = [zlib.crc32(repr(known).encode())]
    for number in (call.stamp, call.state.scale):
        words += _words_of(number, "f", torch.int32)
    for number in (call.state.growth_tracker, call.state.hysteresis_tracker):
        words += _words_of(number, "i", torch.int32)
    if previous is not None:
        words += _words_of(previous.words, "dd", torch.int64)
    if isinstance(call.max_norm, Tensor):
        words += _words_of(call.max_norm, "f", torch.int32)
    total: int | Tensor = 0
    for multiplier, word in zip(_multipliers(call.num_updates), words, strict=False):
        total = total + (word % _PRIME) * multiplier % _PRIME
    if call.num_replayed is not None:
        # A graph repeats its multipliers; times a number that it counts on, each replay has others.
        total = total % _PRIME * (call.num_replayed * _STRIDE % 2**29 * 2 + 1) % _PRIME
    return total % _NUM_FINGERPRINTS + 1


class Units(NamedTuple):
    """What word 0 counts in; a bad rank counts 1."""

    wish: int
    call: int  # one of a rank's weighted fingerprint


@functools.lru_cache(maxsize=8)
def units_of(size: int) -> Units:
    """The units of a group's word 0, which stays an exact float64 integer however it is summed.

    Around the ring of ranks the numbers whose differences are the weights lie in 0..509, and they
    rise at most ``size // 2`` times from one end to the other. So the positive terms of any ranks
    sum to at most ``size // 2 * 509 * 1022`` of the largest unit and the negative ones to no less
    than minus that, while all counts together stay below one of it. Up to 3259 ranks all of this
    fits 2^53 with one wish a rank; in a larger group fewer wishes do, and in one of 2^17 just one.
    """
    wish = size + 1
    room = 2**53 // ((size // 2 * _LARGEST_WEIGHT * _NUM_FINGERPRINTS + 1) * wish)
    return Units(wish, wish * min(room, size + 1))


def is_heard(step: int, rank: int, size: int) -> bool:
    """Whether a rank's wish rides in the messages of a step.

    Rank 0's always does. The others take turns, of one step where there is room for all of them;
    in the largest groups there is room for none.
    """
    if rank == 0:
        return True
    wish, call = units_of(size)
    num_others = call // wish - 2
    return num_others > 0 and (rank + step) % math.ceil((size - 1) / num_others) == 0


def weight(step: int, rank: int, size: int) -> int:
    """A small integer, drawn from the step number, that is never 0 and sums to 0 over the group.

    Each is the difference of two neighbours on the ring of ranks, which differ modulo 3. In a group
    of one nothing can disagree, and the weight is 0.
    """
    if size == 1:
        return 0
    return _draw(step, rank, size) - _draw(step, (rank + 1) % size, size)


def _draw(step: int, rank: int, size: int) -> int:
    # An even ring alternates between two residues; the last rank of an odd one takes the third.
    residue = 2 if rank == size - 1 and size % 2 else rank % 2
    # The finaliser of splitmix64 (Steele, Lea, Flood 2014), so that any rank's draw costs the same.
    z = (rank * 0x9E3779B97F4A7C15 + _multipliers(step)[-1]) & 0xFFFFFFFFFFFFFFFF
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return 3 * ((z ^ (z >> 31)) % _DRAWS) + residue


@functools.lru_cache(maxsize=8)
def _multipliers(step: int) -> tuple[int, ...]:
    """Eight odd 30-bit multipliers for the words, then one number that the weights start from."""
    digest = hashlib.blake2b(str(step).encode(), digest_size=8 * (_NUM_MULTIPLIERS + 1)).digest()
    drawn = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)]
    # Below 2^30 the product with a word below 2^33 still fits a signed 64-bit integer.
    return (*((n >> 34) | 1 for n in drawn), drawn[-1])


def _words_of(number: Tensor, kind: str, integer: torch.dtype) -> list[int | Tensor]:
    """The bits of a tensor's numbers as integers, read only where they lie on the host.

    Args:
        number: The numbers.
        kind: Their types, in the letters of ``struct``.
        integer: The integer dtype of the same width.
    """
    if not _is_on_host(number):
        return list(number.detach().reshape(-1).view(integer).to(torch.int64).unbind())
    values = number.tolist()
    raw = struct.pack(kind, *values) if len(kind) > 1 else struct.pack(kind, values)
    return list(struct.unpack("q" * len(kind) if integer == torch.int64 else "i", raw))


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.is_cpu


def _message(stats: ShardStats, term: float | Tensor) -> Tensor:
    found_inf, sum_squares, _ = stats
    if _is_on_host(found_inf) and not isinstance(term, Tensor):
        squares = 0.0 if sum_squares is None else sum_squares.item()
        return torch.tensor([found_inf.item() + term, squares], dtype=torch.float64, device="cpu")
    if found_inf.device.type == "mps":  # has no float64; such a message is made on the host
        found_inf = found_inf.cpu()
    count = found_inf.double() + term
    sum_squares = count.new_zeros(()) if sum_squares is None else sum_squares
    return torch.stack([count, sum_squares.to(count.device, torch.float64)])
