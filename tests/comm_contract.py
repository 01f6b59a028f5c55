"""What every communicator must keep; run on each of them by the tests beside it."""

from __future__ import annotations

import hashlib
import math

import torch

# Each of two numbers; enough that a transport which adds in another order on one rank shows.
NUM_SUMS = 5_000


def keep_contract(comm, num_sums=NUM_SUMS) -> dict[str, object]:
    """One rank's side of the contract; what it returns must be the same on every rank."""
    random = torch.Generator().manual_seed(comm.rank)
    exponents = torch.randint(-300, 300, (num_sums, 2), generator=random).double()
    rows = torch.randn(num_sums, 2, dtype=torch.float64, generator=random) * 2.0**exponents
    digest = hashlib.sha256()
    for row in rows:
        comm.all_reduce_sum_(row)
        digest.update(row.numpy().tobytes())

    special = torch.tensor([math.nan if comm.rank == 0 else 1.0, math.inf], dtype=torch.float64)
    comm.all_reduce_sum_(special)

    ranks = torch.tensor([comm.rank, 1.0], dtype=torch.float64)
    before = ranks.data_ptr()
    comm.all_reduce_sum_(ranks)

    return {
        "sums": digest.hexdigest(),
        "nan and inf": [str(x) for x in special.tolist()],
        "rank sum and size": ranks.tolist(),
        "in place": ranks.data_ptr() == before,
        "gathered": comm.all_gather_object({"rank": comm.rank}),
        "gathered again": comm.all_gather_object(comm.rank * 10),
    }


def check_contract(results, size) -> None:
    """All ranks saw the same, and what they saw is right."""
    first = results[0]
    assert not isinstance(first, Exception), first

    assert all(result == first for result in results)
    assert first["nan and inf"] == ["nan", "inf"]
    assert first["rank sum and size"] == [sum(range(size)), size]
    assert first["in place"]
    assert first["gathered"] == [{"rank": rank} for rank in range(size)]
    assert first["gathered again"] == [rank * 10 for rank in range(size)]
