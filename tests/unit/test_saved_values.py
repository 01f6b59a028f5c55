"""Whatever a saved state holds is taken, or refused in a sentence; then nothing has moved."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardscale import ConfigError, ConstantScale, DynamicScale, ShardedGradScaler, StateError
from shardscale.comm import Solo
from shardscale.errors import ShardScaleError

POLICY = DynamicScale(3.0, 0.25, 17, hysteresis=4, min_scale=2.0)


class Wordless:
    """An object that cannot be quoted."""

    def __repr__(self) -> str:
        raise RuntimeError("no words")


@dataclass(frozen=True)
class Mine:
    """A policy of somebody's own, with errors of its own."""

    factors: tuple[float, ...] = (2.0, 0.5)
    patience: int = 3

    def __post_init__(self):
        if type(self.patience) is not int:
            raise TypeError("patience")

    def init(self, init_scale, device):
        return ConstantScale().init(init_scale, device)

    def next_state(self, state, found_inf):
        return state


def saved_by(policy=POLICY):
    """What a scaler with some history saves."""
    scaler = ShardedGradScaler("cpu", init_scale=64.0, policy=policy)
    state = scaler.state_dict()
    ours = dict(state["shardscale"]) | {"num_updates": 41, "num_skipped": 7}
    return {**state, "_growth_tracker": 5, "shardscale": tuple(ours.items())}


def with_ours(**changes):
    """A state in which some of what is ours is another."""
    state = saved_by()
    return {**state, "shardscale": (dict(state["shardscale"]) | changes)}


def with_fields(**changes):
    """A state of a policy some of whose numbers are others."""
    fields = dict(dict(saved_by()["shardscale"])["policy_fields"])
    return with_ours(policy_fields=fields | changes)


def megatrons(**changes):
    return {"scale": 512.0, "growth_tracker": 3, "hysteresis_tracker": 2, **changes}


def used(policy=POLICY, scale=64.0):
    """A scaler that has something to lose."""
    scaler = ShardedGradScaler("cpu", init_scale=scale, policy=policy)
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([param], lr=0.5)
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler


def everything_of(scaler):
    return repr((scaler.state_dict(), scaler._policy, scaler.last_report()))


REFUSED = {
    "scale": [
        {**saved_by(), "scale": value}
        for value in (
            *(10**400, 10**5000, -1.0, 0, math.inf, math.nan, True, None, "8", [8.0], b"8", 8j),
            *(np.bool_(True), np.array([1.0, 2.0]), np.timedelta64(5, "s"), np.complex64(8)),
            *(torch.ones(2), torch.ones((), device="meta"), torch.tensor(True), Wordless()),
        )
    ],
    "growth_factor": [
        {**saved_by(), "growth_factor": v} for v in ("2", None, 10**400, torch.ones(3), 0.5)
    ],
    "backoff_factor": [{**saved_by(), "backoff_factor": v} for v in ("0.5", math.nan, 1.5)],
    "growth_interval": [
        {**saved_by(), "growth_interval": v} for v in ("9", 2.5, True, 0, 10**5000, np.float64(9))
    ],
    "_growth_tracker": [
        {**saved_by(), "_growth_tracker": v} for v in (-1, 2.0, 2**31, True, "1", None, math.nan)
    ],
    "shardscale": [
        {**saved_by(), "shardscale": v} for v in (None, 5, "ab", ["ab"], (("a", 1, 2),), {1: 2})
    ],
    "version": [with_ours(version=v) for v in ("2", None, 0, -1, 1.5, True)],
    "policy": [with_ours(policy=v) for v in (None, 5, ["DynamicScale"])],
    "policy_fields": [with_ours(policy_fields=v) for v in (None, 5, "ab", {1: 2}, ((2, 3),))],
    "no DynamicScale can be made": [
        with_fields(hysteresis="1"),
        with_fields(hysteresis=2**40),
        with_fields(hysteresis=0),
        with_fields(hysteresis=2.0),
        with_fields(min_scale=None),
        with_fields(min_scale=True),
        with_fields(max_scale=10**400),
        with_fields(unheard_of=1),
    ],
    "hysteresis_tracker": [
        *(with_ours(hysteresis_tracker=v) for v in (2**40, "1", None, -1, 5, 1.5, True, [1])),
        *(megatrons(hysteresis_tracker=v) for v in ([2], None, math.nan, 1.5, "2", True)),
    ],
    "growth_tracker": [megatrons(growth_tracker=v) for v in (-3, 0.5, None, [3], 2**31)],
    "num_updates": [with_ours(num_updates=v) for v in (-1, 1.5, "3", None, 10**400, math.nan)],
    "num_skipped": [with_ours(num_skipped=v) for v in (-1, 1.5, "3", None, 10**400, True)],
}


@pytest.mark.parametrize(
    ("name", "state"),
    [(name, state) for name, states in REFUSED.items() for state in states],
    ids=[f"{name}-{i}" for name, states in REFUSED.items() for i in range(len(states))],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name_and_changes_nothing(name, state):
    scaler = used()
    before = everything_of(scaler)
    with pytest.raises(ConfigError) as error:
        scaler.load_state_dict(state)
    message = str(error.value)
    assert name in message and message.startswith("the state dict")
    # What to do; and no book, whatever was found.
    assert "Pass what a scaler's own state_dict() gave" in message and len(message) < 800
    assert everything_of(scaler) == before


@pytest.mark.parametrize("state", [None, 5, "scale", [("scale", 8.0)], Wordless()], ids=type)
def test_what_is_no_dictionary_is_refused(state):
    scaler = used()
    before = everything_of(scaler)
    with pytest.raises(StateError, match="must be a dictionary"):
        scaler.load_state_dict(state)
    assert everything_of(scaler) == before


def test_keys_that_are_no_strings_are_listed_with_the_others():
    for state in ({5: 1, None: 2}, {**saved_by(), 5: 1, Wordless(): 2}):
        state.pop("growth_factor", None)
        with pytest.raises(StateError, match=r"'5'.*"):
            ShardedGradScaler("cpu").load_state_dict(state)


def test_a_missing_key_reads_as_a_sentence():
    """A KeyError's own text would be its repr."""
    state = saved_by()
    del state["growth_factor"]
    with pytest.raises(KeyError) as error:
        ShardedGradScaler("cpu").load_state_dict(state)
    assert isinstance(error.value, StateError)
    assert str(error.value).startswith("the state dict lacks ['growth_factor']; it has ['_growth_")


@pytest.mark.parametrize("number", [np.float64, np.float32, np.longdouble, torch.tensor], ids=str)
@pytest.mark.parametrize("integer", [np.int64, np.uint8, torch.tensor], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_numbers_of_numpy_and_of_torch_are_taken_for_plain_ones(number, integer, shape):
    kinds = {float: number, int: integer}

    def other(value):
        made = kinds[type(value)](value) if type(value) in kinds else value
        return made.reshape(shape) if shape and made is not value else made

    plain = saved_by(DynamicScale(4.0, 0.25, 17, hysteresis=4, min_scale=2.0, max_scale=2.0**9))
    ours = dict(plain["shardscale"])
    ours["policy_fields"] = {name: other(v) for name, v in ours["policy_fields"]}
    state = {name: other(v) for name, v in plain.items() if name != "shardscale"}
    state["shardscale"] = {name: other(v) for name, v in ours.items()}
    scaler = ShardedGradScaler("cpu")
    scaler.load_state_dict(state)
    # The repr, too: where a number is 4.0 here and np.float64(4.0) there, ranks would disagree.
    assert repr(scaler.state_dict()) == repr(plain)


def test_a_policy_of_ones_own_keeps_what_is_no_number_as_it_is():
    scaler = ShardedGradScaler("cpu", policy=Mine())
    scaler.load_state_dict(saved_by(Mine((3.0, 0.1, 0.2), 9)))
    assert scaler._policy == Mine((3.0, 0.1, 0.2), 9)


class Third(Solo):
    """One rank of several, that never comes to a verdict."""

    rank, size = 2, 4


@pytest.mark.parametrize("state", [None, {}, {"scale": 1.0}, {**saved_by(), "scale": 0.0}])
def test_an_error_says_which_rank_of_a_group_it_is_about(state):
    with pytest.raises(ShardScaleError) as error:
        ShardedGradScaler("cpu", comm=Third()).load_state_dict(state)
    assert str(error.value).endswith(". This is rank 2 of 4.")
    with pytest.raises(ShardScaleError) as error:
        ShardedGradScaler("cpu").load_state_dict(state)
    assert "rank" not in str(error.value)


def test_an_error_binds_the_scaler_to_no_group():
    """It has agreed in none, so it goes on alone where the group is gone."""
    scaler = ShardedGradScaler("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        with pytest.raises(ConfigError, match=r" This is rank 1 of 2\.$"):
            scaler.load_state_dict({**saved_by(), "scale": 0.0})
    finally:
        dist.destroy_process_group()
    scaler.step(())
    scaler.load_state_dict(saved_by())
    assert scaler.get_scale() == 64.0


# ------------------------------------------------------------------- Anything at any of the places

NUMBERS = st.one_of(
    st.integers(-3, 20),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([2**31 - 1, 2**31, 2**40, 2**53, 2**63, 10**400, -(10**400), True]),
)
SCALARS = st.one_of(
    NUMBERS,
    st.floats(width=32).map(np.float32),
    st.integers(-5, 2**31).map(np.int64),
    st.floats().map(torch.tensor),
    st.integers(-5, 2**31).map(torch.tensor),
    st.none(),
    st.text(max_size=3),
    st.sampled_from(["DynamicScale", "ConstantScale", "Mine"]),
    st.binary(max_size=2),
    st.builds(object),
    st.builds(Wordless),
    st.sampled_from([torch.ones(2), torch.ones((), device="meta"), np.ones(0), np.str_("1")]),
)
NAMES = st.sampled_from(
    [
        *("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"),
        *("shardscale", "version", "policy", "policy_fields", "hysteresis_tracker"),
        *("num_updates", "num_skipped", "growth_tracker", "hysteresis", "min_scale", "patience"),
    ]
)
KEYS = st.one_of(NAMES, st.text(max_size=3), st.integers(0, 3), st.none(), st.booleans())
THINGS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3),
        st.tuples(st.tuples(KEYS, inner)),
    ),
    max_leaves=6,
)


@st.composite
def states(draw):
    """A state of some policy or layout, of whose values some are others, or gone, or new."""
    policy = draw(st.sampled_from([POLICY, ConstantScale(), Mine()]))
    state = draw(st.sampled_from([saved_by(policy), megatrons()]))
    if "shardscale" in state:
        ours = dict(state["shardscale"])
        fields = dict(ours["policy_fields"]) | draw(st.dictionaries(NAMES, THINGS, max_size=1))
        ours["policy_fields"] = tuple(fields.items())
        state["shardscale"] = ours | draw(st.dictionaries(NAMES, THINGS, max_size=1))
    state = state | draw(st.dictionaries(KEYS, THINGS, max_size=1))
    for name in draw(st.lists(NAMES, max_size=1)):
        state.pop(name, None)
    return state


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    state=st.one_of(states(), THINGS),
    policy=st.sampled_from([POLICY, DynamicScale(), ConstantScale(), Mine()]),
)
def test_anything_loads_or_is_refused_with_nothing_moved(state, policy):
    scaler = used(policy, 8.0)
    before = everything_of(scaler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scaler.load_state_dict(state)
        except ShardScaleError:
            assert everything_of(scaler) == before
            return
    # It holds a state that one more scaler takes as it is.
    after = scaler.state_dict()
    other = ShardedGradScaler("cpu", policy=policy)
    other.load_state_dict(after)
    assert repr(other.state_dict()) == repr(after)
    assert 0 < after["scale"] < math.inf and after["_growth_tracker"] >= 0
    ours = dict(after["shardscale"])
    for name in ("num_updates", "num_skipped"):
        assert type(ours[name]) is int and ours[name] >= 0
