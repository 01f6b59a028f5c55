"""Jobs that Slurm interrupts and starts again; the end is that of a job left in peace."""

from __future__ import annotations

import re
import time
from pathlib import Path

from tests.cluster import logs, matrix
from tests.cluster.slurm import Job, Slurm

TWO_RANKS = "--ntasks-per-node=1"  # on two nodes


def submit(
    slurm: Slurm, folder: Path, file: str | Path, steps: int, *words: str | Path, **variables: str
) -> Job:
    """Submit a file for two ranks that log their steps in ``folder``."""
    output = folder.with_suffix(".out")
    steps_of = ["--steps", str(steps), "--step-log", folder, "--inject", "1:3"]
    return slurm.submit(output, TWO_RANKS, file, *steps_of, *words, **variables)


def steps_logged(folder: Path) -> list[int]:
    """How many steps each of the two ranks has logged."""
    paths = [folder / f"rank{rank}.jsonl" for rank in range(2)]
    return [len(path.read_text().splitlines()) if path.exists() else 0 for path in paths]


def entries(folder: Path, rank: int) -> dict[int, logs.Entry]:
    """What a rank has logged of each step; if twice, then the same."""
    found, broken = logs.read(folder, rank)
    assert broken == []
    by_step: dict[int, logs.Entry] = {}
    for entry in found:
        assert by_step.setdefault(entry.step, entry) == entry
    return by_step


def test_a_job_that_is_told_to_stop_goes_on_as_if_it_had_not(slurm: Slurm, tmp_path: Path):
    stopped, unbroken = tmp_path / "stopped", tmp_path / "unbroken"
    num_steps = (
        900  # it must still be at work when its step is 5 s old, before which no signal comes
    )
    checkpoints = ["--checkpoint", tmp_path / "checkpoints"]
    job = submit(slurm, stopped, "slurm/requeue.sbatch", num_steps, *checkpoints)
    slurm.until(lambda: min(steps_logged(stopped)) >= 5, "the first steps", 100)

    limit_s = 20
    with matrix.row("told to stop (USR2)", "srun", "all save, leave, are requeued", limit_s) as row:
        started = time.monotonic()
        job.signal("USR2")
        job.says("REQUEUE", limit_s)
        row.ended(time.monotonic() - started, 85)
    [last_step] = re.findall(r"Told to stop: stopped after step (\d+)", job.output)
    assert steps_logged(stopped) == [int(last_step)] * 2
    assert int(last_step) < num_steps

    other = submit(
        slurm, unbroken, "slurm/srun.sbatch", num_steps
    )  # while Slurm lets the first one wait
    assert other.ended(limit_s=100) == ("COMPLETED", 0), other.output
    assert job.ended(limit_s=100) == ("COMPLETED", 0), job.output
    assert job.facts()["Restarts"] == "1"
    assert re.findall(r"START job \d+, restart (\d)", job.output) == ["0", "1"]
    for folder in (stopped, unbroken):
        assert logs.compare(folder, 2, replicated=False) == []
    for rank in range(2):
        assert logs.read(stopped, rank) == logs.read(unbroken, rank)


SLOW_START = """
import signal
assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
signal.sigwait({signal.SIGUSR2})
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
print("it came too early", flush=True)
"""


def test_a_signal_while_python_starts_is_not_lost(slurm: Slurm, tmp_path: Path):
    """And a job that may not be requeued any more says how to go on."""
    file = tmp_path / "once.sbatch"
    file.write_text(slurm.run("python", "launch/slurm.py", "srun", "--max-requeues=0").stdout)
    folder, checkpoints = tmp_path / "once", tmp_path / "checkpoints"
    (tmp_path / "sitecustomize.py").write_text(SLOW_START)  # each Python begins with it
    path = f"{tmp_path}:{slurm.environment['PYTHONPATH']}"
    job = submit(slurm, folder, file, 100_000, "--checkpoint", checkpoints, PYTHONPATH=path)
    job.says("START", limit_s=30)

    limit_s = 60
    with matrix.row("signal during import", "srun", "heard all the same", limit_s) as row:
        started = time.monotonic()
        job.signal("USR2")
        state, code = job.ended(limit_s)
        row.ended(time.monotonic() - started, code)
    assert len(re.findall("it came too early", job.output)) == 2, job.output
    assert (state, code) == ("FAILED", 85), job.output
    assert "were requeued 0 times, of 0 at most. To go on: sbatch FILE --checkpoint" in job.output
    [saved] = checkpoints.iterdir()
    assert steps_logged(folder) == [int(saved.name.removeprefix("step-"))] * 2


def test_a_job_whose_node_is_lost_goes_on_on_others(slurm_on_networks: Slurm, tmp_path: Path):
    slurm = slurm_on_networks
    folder = tmp_path / "lost"
    saves = ["--checkpoint", tmp_path / "checkpoints", "--save-every", "20"]
    job = submit(slurm, folder, "slurm/requeue.sbatch", 300, *saves)
    slurm.until(lambda: min(steps_logged(folder)) >= 50, "some checkpoints", 100)

    limit_s = 60
    lost = slurm.daemons.nodes[1]
    with matrix.row("node down", "srun", "requeued, goes on elsewhere", limit_s) as row:
        started = time.monotonic()
        slurm.daemons.cut(lost)
        job.says("restart 1, on m[1,3]", limit_s)
        row.ended(time.monotonic() - started, None)
    reached = steps_logged(folder)
    assert job.ended(limit_s=100) == ("COMPLETED", 0), job.output
    slurm.daemons.mend(lost)
    assert slurm.left_running(within_s=30) == {}

    assert max(reached) < 300
    first, second = (entries(folder, rank) for rank in range(2))
    assert list(first) == list(second) == list(range(1, 301))
    assert len(logs.read(folder, 0)[0]) > 300, "it began anew, or not at a checkpoint"
    verdicts = [[(e.skipped, e.scale) for e in each.values()] for each in (first, second)]
    assert verdicts[0] == verdicts[1]
