"""Slurm's node lists are expanded as `scontrol show hostnames` does it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardscale import ConfigError
from shardscale.comm.nodelist import expand


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("a", "a"),
        ("a[1-3,07],b", "a1 a2 a3 a07 b"),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("n[08-11]", "n08 n09 n10 n11"),
        ("n[098-101]", "n098 n099 n100 n101"),
        ("n[0]", "n0"),
        ("gpu-a[1-2]-ib,x-1", "gpu-a1-ib gpu-a2-ib x-1"),
        ("r[1-2]n[01-03]", "r1n01 r1n02 r1n03 r2n01 r2n02 r2n03"),
        ("[1-2]a,3", "1a 2a 3"),
        ("n1.example.org,n2.example.org", "n1.example.org n2.example.org"),
        ("b,a", "b a"),
    ],
)
def test_a_list_is_written_out(nodelist: str, hosts: str):
    assert expand(nodelist) == hosts.split()


@pytest.mark.parametrize(
    ("nodelist", "at", "expected"),
    [
        ("", 1, "a host's name"),
        ("a,", 3, "a host's name"),
        (",a", 1, "a host's name"),
        ("a b", 2, "a host's name"),
        ("a]", 2, "a host's name"),
        ("a[1-3", 6, "a comma or a closing bracket"),
        ("a[1;3]", 4, "a comma or a closing bracket"),
        ("a[", 3, "a number"),
        ("a[]", 3, "a number"),
        ("a[1,]", 5, "a number"),
        ("a[x]", 3, "a number"),
        ("a[3-1]", 5, "a number from 3 on"),
        ("a[0-999999999]", 3, "no more than 1000000 hosts"),
        # Where the sum passes the limit, and before the numbers that do it are written out.
        ("a[1-2000]b[1-2000]", 12, "no more than 1000000 hosts"),
        ("a[1-600000,1-600000]", 12, "no more than 1000000 hosts"),
        ("a[1-600000],b[1-600000]", 15, "no more than 1000000 hosts"),
        ("a[0-999],b[1-999001]", 12, "no more than 1000000 hosts"),
        ("a[1-1000000],b", 14, "no more than 1000000 hosts"),
        (f"{'a' * 250}[1-9]b[1-99999]", 257, "the end of a name of at most 255 characters"),
    ],
)
def test_an_error_says_where_it_is(nodelist: str, at: int, expected: str):
    with pytest.raises(ConfigError) as caught:
        expand(nodelist)
    message = str(caught.value)
    assert repr(nodelist) in message
    assert f"at character {at}, where {expected} is expected" in message


def compress(hosts: list[tuple[str, str, str]]) -> str:
    """The inverse, as Slurm would write it: neighbours with one prefix and suffix share brackets,
    and consecutive numbers of one width a range."""
    items: list[tuple[str, list[list[str]], str]] = []
    for prefix, digits, suffix in hosts:
        if items and items[-1][0] == prefix and items[-1][2] == suffix:
            runs = items[-1][1]
            last = runs[-1][-1]
            follows = int(digits) == int(last) + 1
            # A range is written with the width of its lower bound.
            if follows and str(int(digits)).zfill(len(runs[-1][0])) == digits:
                runs[-1].append(digits)
            else:
                runs.append([digits])
        else:
            items.append((prefix, [[digits]], suffix))
    texts = []
    for prefix, runs, suffix in items:
        ranges = ",".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
        alone = len(runs) == 1 and len(runs[0]) == 1
        texts.append(f"{prefix}{ranges}{suffix}" if alone else f"{prefix}[{ranges}]{suffix}")
    return ",".join(texts)


names = st.from_regex(r"[a-z][a-z0-9-]{0,5}[a-z-]", fullmatch=True)
numbers = st.integers(0, 200).flatmap(
    lambda n: st.sampled_from([str(n), str(n).zfill(2), str(n).zfill(4)])
)
suffixes = st.sampled_from(["", "-ib", ".x", "n"])


@given(st.lists(st.tuples(st.sampled_from(["n", "gpu-"]), numbers, suffixes), min_size=1))
def test_expanding_undoes_compressing(hosts: list[tuple[str, str, str]]):
    assert expand(compress(hosts)) == ["".join(host) for host in hosts]


@given(names, st.integers(0, 120), st.integers(0, 120), st.integers(1, 5))
def test_a_range_counts_up_in_the_width_of_its_lower_bound(prefix, low, length, width):
    hosts = expand(f"{prefix}[{str(low).zfill(width)}-{low + length}]")
    assert [int(host.removeprefix(prefix)) for host in hosts] == list(range(low, low + length + 1))
    assert all(len(host) >= len(prefix) + width for host in hosts)


@given(st.text(alphabet="a1[]-,0 ", max_size=12))
def test_whatever_it_is_given_it_answers_or_refuses(nodelist: str):
    try:
        hosts = expand(nodelist)
    except ConfigError:
        return
    assert hosts and all(hosts) and not any(set(host) & set("[], ") for host in hosts)
