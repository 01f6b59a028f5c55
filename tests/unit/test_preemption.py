"""A signal that asks to stop: noted, never lost, and never the end of the process."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shardscale import ConfigError, ShardedGradScaler, StageError, StopSignal
from shardscale.comm import Solo

ROOT = Path(__file__).resolve().parents[2]
USED = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in USED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("USR2", signal.SIGUSR2),
        ("SIGUSR2", signal.SIGUSR2),
        ("usr2", signal.SIGUSR2),
        (signal.SIGTERM, signal.SIGTERM),
        (int(signal.SIGTERM), signal.SIGTERM),
        ("INT", signal.SIGINT),
    ],
)
def test_a_signal_is_noted_when_it_comes_and_not_before(name, number):
    """With INT as with any other: the program asked for this, and wants no KeyboardInterrupt."""
    stop = StopSignal(name)
    assert (stop.received, bool(stop), stop()) == (False, False, False)
    signal.raise_signal(number)
    assert (stop.received, bool(stop), stop()) == (True, True, True)


@pytest.mark.parametrize(
    "name",
    [
        "USR3",
        "",
        "SIGSIGUSR2",
        "KILL",
        "STOP",
        "SEGV",
        signal.SIGKILL,
        int(signal.SIGSTOP),
        0,
        -1,
        1000,
        10**400,
        10.0,
        True,
        None,
        b"USR2",
        "10",
        "u\u017fr2",  # whose capitals are USR2
        ["USR2"],
        {"USR2": 10},
    ],
)
def test_a_signal_that_cannot_be_used_is_refused_with_a_list_of_those_that_can(name):
    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(ConfigError) as error:
        StopSignal(name)
    assert f"the signal to stop is {name!r}" in str(error.value)
    listed = str(error.value).partition("one of ")[2].partition(", or a")[0].split(", ")
    assert {"HUP", "TERM", "USR1", "USR2"} <= set(listed)
    assert not {"KILL", "STOP", "SEGV"} & set(listed)
    assert signal.getsignal(signal.SIGUSR2) is before


def test_handlers_that_were_there_before_are_called_too():
    seen = []
    signal.signal(signal.SIGUSR2, lambda number, frame: seen.append((number, frame is not None)))
    first, second = StopSignal(), StopSignal()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert first.received and second.received
    assert seen == [(signal.SIGUSR2, True)]


def test_another_thread_is_told_where_to_make_it():
    errors = []

    def make():
        try:
            StopSignal()
        except Exception as error:
            errors.append(error)

    before = signal.getsignal(signal.SIGUSR2)
    thread = threading.Thread(target=make, name="loader")
    thread.start()
    thread.join()
    (error,) = errors
    assert isinstance(error, StageError) and "the thread 'loader'" in str(error)
    assert signal.getsignal(signal.SIGUSR2) is before


def in_a_process(program: str, meanwhile) -> str:
    """What a program prints, started with USR2 blocked; it waits for a line while things happen."""
    wrapper = (
        "import os, signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])\n"
        "os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-S", "-c", wrapper, program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "up\n"
        meanwhile(process.pid)
        out, _ = process.communicate("go on\n", timeout=60)
    assert process.returncode == 0
    return out


# The library before torch, and torch after the handler.
PROGRAM = """
import sys
print("up", flush=True)
sys.stdin.readline()
from shardscale.preemption import StopSignal
import shardscale
assert shardscale.StopSignal is StopSignal
stop = StopSignal()
assert "torch" not in sys.modules and "numpy" not in sys.modules
print(stop.received)
import torch
print(stop.received, shardscale.ShardedGradScaler("cpu").listen(stop).get_scale())
"""


def test_a_signal_during_start_up_is_not_lost_if_the_parent_has_blocked_it():
    """Also while the process was stopped, and resumed; torch comes after the handler."""

    def meanwhile(pid):
        for number in (signal.SIGSTOP, signal.SIGUSR2, signal.SIGCONT):
            os.kill(pid, number)

    assert in_a_process(PROGRAM, meanwhile) == "True\nTrue 65536.0\n"


def test_without_a_signal_none_is_received():
    program = PROGRAM.partition("import torch")[0]
    assert in_a_process(program, lambda pid: None) == "False\n"


@pytest.mark.parametrize(("leaving", "code"), [("stop.ignore()", 0), ("", -signal.SIGUSR2)])
def test_a_process_on_its_way_out_is_not_ended_by_a_signal_that_is_ignored(leaving: str, code: int):
    """When the last objects are deleted Python has no handlers any more."""
    program = f"""
import os, signal
from shardscale.preemption import StopSignal
class Last:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR2):
        kill(pid, number)
last = Last()
stop = StopSignal()
{leaving}
"""
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == code


# --- The scaler of one rank. ----------------------------------------------------------------------


def train(scaler, num_steps, answers):
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([param], lr=0.5)
    for _ in range(num_steps):
        scaler.scale(param.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        answers.append(scaler.should_stop())


def test_a_scaler_that_is_alone_gives_its_own_wish_at_once():
    scaler, answers = ShardedGradScaler("cpu"), []
    assert not scaler.should_stop()
    assert scaler.listen(StopSignal()) is scaler
    train(scaler, 2, answers)
    signal.raise_signal(signal.SIGUSR2)
    train(scaler, 1, answers)
    assert answers == [False, False, True]


def test_a_group_of_one_that_a_communicator_makes_is_told_an_iteration_later():
    scaler, answers = ShardedGradScaler("cpu", comm=Solo()), []
    scaler.listen(lambda: True)
    train(scaler, 3, answers)
    assert answers == [False, True, True]


def test_a_disabled_scaler_gives_its_own_wish():
    scaler = ShardedGradScaler("cpu", enabled=False)
    assert scaler.should_stop() is False
    assert scaler.listen(lambda: 1).should_stop() is True


def test_a_copy_does_not_go_on_listening():
    scaler = ShardedGradScaler("cpu").listen(lambda: True)
    for copied in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
        answers = []
        train(copied, 2, answers)
        assert answers == [False, False]


@pytest.mark.parametrize("wish", [None, True, "USR2"])
def test_what_cannot_be_asked_is_refused(wish):
    with pytest.raises(ConfigError, match=r"wish is .*must be a function"):
        ShardedGradScaler("cpu").listen(wish)


def test_a_wish_that_raises_reaches_the_caller_and_the_next_call_asks_again():
    answers = iter([None, True])
    scaler, told = ShardedGradScaler("cpu", comm=Solo()), []

    def wish():
        answer = next(answers, True)
        if answer is None:
            raise OSError("no file")
        return answer

    scaler.listen(wish)
    with pytest.raises(OSError, match="no file"):
        train(scaler, 1, told)
    train(scaler, 2, told)
    assert told == [False, True]
