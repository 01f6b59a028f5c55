"""What MPI communicators do within one process, and where there is no MPI."""

from __future__ import annotations

import builtins
import itertools
import pickle
from unittest.mock import Mock

import pytest
import torch

from shardscale import ShardedGradScaler
from shardscale.comm import Bond, MPIComm, Solo, mpi_talk
from shardscale.comm.attendance import Place
from shardscale.comm.base import FIRST_TIMEOUT_S, Timed
from shardscale.comm.mpi_talk import Talk, wait
from shardscale.errors import ConfigError, StageError


@pytest.mark.parametrize("error", [ImportError("No module"), RuntimeError("cannot load libmpi")])
def test_without_mpi_the_error_names_what_to_install(error, monkeypatch):
    """mpi4py raises RuntimeError where it is installed and finds no library."""

    def fail(name, *args):
        if name == "mpi4py":
            raise error
        return import_(name, *args)

    import_ = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ConfigError, match=r"pip install 'shardscale\[mpi\]'") as caught:
        MPIComm(None)
    assert str(error) in str(caught.value)


def test_what_is_done_is_done_however_late_it_is_asked():
    """As for a process that was stopped for longer than the timeout."""
    assert wait(lambda: True, lambda: True, 0.0)


def test_waiting_ends_with_the_time_or_with_hope():
    polls = itertools.count()
    assert not wait(lambda: next(polls) > 3000, lambda: False, 0.01)  # 3 s away
    assert not wait(lambda: next(polls) > 3000, lambda: True, 60.0)


def dying(*told: tuple[object, ...]) -> Mock:
    """What rank 0 of three has, when its MPI has noticed the death of rank 2.

    Args:
        told: The messages of rank 1.
    """
    arrived = list(told)
    dead = RuntimeError("MPI_ERR_PROC_FAILED")

    def send(text: bytes, rank: int, tag: int) -> Mock:
        if rank == 2:
            raise dead
        return Mock(Test=Mock(side_effect=dead))

    def probe(tag: int, source: int | None = None) -> Mock | None:
        if source in (None, 2):
            raise dead
        return Mock(recv=lambda: arrived.pop(0)) if arrived else None

    return Mock(Get_rank=lambda: 0, Get_size=lambda: 3, Isend=Mock(side_effect=send), improbe=probe)


def test_a_death_that_mpi_has_noticed_hides_nobody_else(monkeypatch):
    """It then listens to no rank in particular any more, and sends nothing to the dead one."""
    monkeypatch.setattr(mpi_talk, "_GRACE_S", 0.0)

    here = Place(7, None)
    assert Talk(dying((1, "gave up", here)), 1).call_roll(here) == {1: here}
    assert Talk(dying((1, 1, (6, "one"))), 1).gather("zero", 6, 0.0) == ["zero", "one", None]


class Clock(Solo):
    """A group of one that can be told how long to wait."""

    def __init__(self, timeout_s: float | None = None) -> None:
        self.timeout_s = timeout_s

    def within(self, timeout_s: float) -> Clock:
        return Clock(timeout_s)


def patience(scaler_s: float | None, comm_s: float | None) -> tuple[float | None, float | None]:
    """How long a scaler waits for a verdict, and where it joins only to raise an error."""
    bond = Bond(comm=Clock(comm_s), timeout_s=scaler_s)
    usual, impatient = bond.communicator(), bond.impatient()
    assert isinstance(usual, Timed) and isinstance(impatient, Timed)
    return usual.timeout_s, impatient.timeout_s


def test_the_scalers_time_comes_before_its_communicators():
    assert patience(3.0, 5.0) == (3.0, 3.0)
    assert patience(None, 5.0) == (5.0, 5.0)
    assert patience(3.0, None) == (3.0, 3.0)
    assert patience(None, None) == (None, FIRST_TIMEOUT_S)


def test_a_communicator_that_knows_no_time_keeps_its_own():
    bond = Bond(comm=(comm := Solo()), timeout_s=3.0)
    assert bond.communicator() is bond.impatient() is comm


def test_views_of_one_communicator_are_one_group():
    """Scalers are counted by group; a second with a patience of its own is the second."""
    comm = Clock()
    assert [Bond(comm=comm, timeout_s=t).ordinal for t in (None, 3.0, 4.0)] == [0, 1, 2]
    assert Bond(comm=comm, timeout_s=3.0).twin().communicator().timeout_s == 3.0


def test_a_scaler_over_a_communicator_has_lost_it_in_a_pickle():
    scaler = pickle.loads(pickle.dumps(ShardedGradScaler("cpu", comm=Clock(), timeout_s=3.0)))
    scaler.scale(torch.ones(()))
    with pytest.raises(StageError, match="unpickled"):
        scaler.step(())
