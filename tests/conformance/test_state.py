"""Statements 36 to 38: what is saved, what is loaded, and what travels in a pickle."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as TorchShardedGradScaler
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardscale import ConfigError, ConstantScale, DynamicScale, ShardedGradScaler, StateError
from shardscale.comm import Solo
from tests.conformance.side_by_side import (
    BOTH,
    assert_fails_alike,
    full,
    params_of,
    run_verdicts,
    sgd,
)

TORCH_KEYS = ["scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"]
MODERN = [
    None,
    DynamicScale(hysteresis=3, growth_interval=4, min_scale=0.7, max_scale=2.0**20),
    DynamicScale(growth_factor=1.1, backoff_factor=0.9, max_scale=1024.3),
    ConstantScale(),
]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(tree):
    branches = {dict: lambda: tree.values(), tuple: lambda: tree}.get(type(tree))
    return [tree] if branches is None else [x for value in branches() for x in leaves(value)]


def test_torchs_keys_come_first_and_ours_beside_them():
    """Contract 36: as plain floats and ints."""
    theirs, ours = torch.amp.GradScaler("cpu"), ShardedGradScaler("cpu")
    run_verdicts(theirs, [True, False, True])
    run_verdicts(ours, [True, False, True])
    saved = ours.state_dict()
    assert list(saved) == [*TORCH_KEYS, "shardscale"]
    expected = theirs.state_dict()
    for key in TORCH_KEYS:
        assert saved[key] == expected[key] and type(saved[key]) is type(expected[key])
    assert {type(leaf) for leaf in leaves(saved)} <= {float, int, str}


@pytest.mark.parametrize("policy", MODERN, ids=repr)
def test_weights_only_loading_reads_it(policy):
    """Contract 36: no class of ours is needed to open the file."""
    saved = ShardedGradScaler("cpu", init_scale=512.0, policy=policy).state_dict()
    assert through_a_file(saved) == saved


@pytest.mark.parametrize("policy", MODERN, ids=repr)
def test_torchs_classes_load_ours(policy):
    """Contract 36: the way back."""
    ours = ShardedGradScaler("cpu", init_scale=512.0, policy=policy)
    run_verdicts(ours, [True, True])
    for theirs in (torch.amp.GradScaler("cpu"), TorchShardedGradScaler("cpu")):
        theirs.load_state_dict(ours.state_dict())
        assert theirs.get_scale() == ours.get_scale()
        assert theirs._get_growth_tracker() == (0 if isinstance(policy, ConstantScale) else 2)
        assert theirs.get_growth_interval() == ours.get_growth_interval()


def test_a_constant_scale_stays_constant_in_torchs_hands():
    """Contract 36: it has no policy of that name, but factors of one."""
    theirs = torch.amp.GradScaler("cpu")
    saved = ShardedGradScaler("cpu", init_scale=512.0, policy=ConstantScale()).state_dict()
    theirs.load_state_dict({**saved, "growth_interval": 1})
    assert [s for s, _ in run_verdicts(theirs, [True, False, True])] == [512.0] * 3


@pytest.mark.parametrize("live", [False, True])
def test_we_load_torchs(live):
    """Contract 36: and go on as torch would."""
    theirs = torch.amp.GradScaler(
        "cpu", init_scale=48.0, growth_factor=3.0, backoff_factor=0.3, growth_interval=3
    )
    run_verdicts(theirs, [True, True])
    ours = ShardedGradScaler("cpu")
    if live:
        run_verdicts(ours, [False])
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    verdicts = [True, True, False, False, True]
    assert run_verdicts(theirs, verdicts) == run_verdicts(ours, verdicts)


def test_an_empty_state_is_torchs_runtime_error():
    """Contract 37: it was saved by a disabled scaler."""
    theirs, ours = torch.amp.GradScaler("cpu"), ShardedGradScaler("cpu")
    text = (
        "The source state dict is empty, possibly because it was saved "
        "from a disabled instance of GradScaler."
    )
    assert_fails_alike(
        lambda: theirs.load_state_dict({}), lambda: ours.load_state_dict({}), text, RuntimeError
    )


@BOTH
@pytest.mark.parametrize("state", [{}, {"scale": 3.0}, {"scale": math.nan, "nonsense": 1}], ids=str)
def test_a_disabled_scaler_ignores_any_state(make, state):
    """Contract 37: it is 1.0 still."""
    scaler = make("cpu", enabled=False)
    scaler.load_state_dict(state)
    assert scaler.get_scale() == 1.0
    assert scaler.state_dict() == {}


@pytest.mark.parametrize("key", TORCH_KEYS)
def test_a_missing_key_is_torchs_key_error_that_names_it(key):
    """Contract 37: nothing is changed by it."""
    state = torch.amp.GradScaler("cpu", init_scale=4.0).state_dict()
    del state[key]
    with pytest.raises(KeyError, match=key):
        torch.amp.GradScaler("cpu").load_state_dict(state)
    ours = ShardedGradScaler("cpu")
    with pytest.raises(KeyError, match=key):
        ours.load_state_dict(state)
    assert ours.get_scale() == 65536.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": math.nan},
        {"scale": 0.0},
        {"growth_factor": 0.5},
        {"backoff_factor": 1.0},
        {"growth_interval": 0},
    ],
    ids=str,
)
def test_a_saved_number_out_of_range_changes_nothing(wrong):
    """Contract 37: not even the numbers before it."""
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    before = scaler.state_dict()
    state = {**torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=7).state_dict(), **wrong}
    with pytest.raises(ConfigError):
        scaler.load_state_dict(state)
    assert scaler.state_dict() == before


def test_a_state_of_another_policy_or_of_a_newer_version_is_refused():
    """Contract 37: with the way out."""
    saved = ShardedGradScaler("cpu", policy=ConstantScale()).state_dict()
    scaler = ShardedGradScaler("cpu")
    with pytest.raises(StateError, match=r"policy ConstantScale, but .* DynamicScale"):
        scaler.load_state_dict(saved)
    newer = scaler.state_dict()
    newer["shardscale"] = (("version", 99),)
    with pytest.raises(StateError, match="layout version 99"):
        scaler.load_state_dict(newer)


@BOTH
def test_a_live_scaler_is_filled_in_place(make):
    """Contract 37: the tensors that others may hold."""
    scaler = make("cpu")
    scaler.scale(torch.ones(()))
    scale, tracker = scaler._scale, scaler._growth_tracker
    state = torch.amp.GradScaler("cpu", init_scale=4.0).state_dict() | {"_growth_tracker": 7}
    scaler.load_state_dict(state)
    assert scaler._scale is scale and scaler._growth_tracker is tracker
    assert (scale.item(), tracker.item()) == (4.0, 7)


RESUMES = {
    "load_state_dict": lambda scaler, policy: loaded(scaler, policy),
    "pickle": lambda scaler, policy: pickle.loads(pickle.dumps(scaler)),
    "deepcopy": lambda scaler, policy: copy.deepcopy(scaler),
}


def loaded(scaler, policy):
    """Into a scaler of the same kind of policy, all of whose numbers differ."""
    fresh = ConstantScale() if isinstance(policy, ConstantScale) else DynamicScale(1.7, 0.4, 9, 2)
    other = ShardedGradScaler("cpu", init_scale=4.0, policy=fresh)
    other.load_state_dict(through_a_file(scaler.state_dict()))
    return other


@pytest.mark.parametrize("resume", RESUMES.values(), ids=RESUMES)
@pytest.mark.parametrize("policy", MODERN, ids=repr)
@pytest.mark.parametrize("at", [0, 1, 4, 7])
def test_a_resumed_run_decides_as_the_unbroken_one(policy, resume, at):
    """Contract 37: at any point, hysteresis and floors included; and every field comes back."""
    verdicts = [True, False, True, True, False, False, True, True, True, True, True, False]
    scaler = ShardedGradScaler("cpu", init_scale=512.0, policy=policy)
    run_verdicts(scaler, verdicts[:at])
    other = resume(scaler, policy)
    assert other.state_dict() == scaler.state_dict()
    assert run_verdicts(other, verdicts[at:]) == run_verdicts(scaler, verdicts[at:])
    assert other.state_dict() == scaler.state_dict()


def test_counters_come_back():
    """Contract 37: the step number salts the message, so resumed ranks agree with each other."""
    scaler = ShardedGradScaler("cpu")
    run_verdicts(scaler, [True, False, False])
    other = ShardedGradScaler("cpu")
    other.load_state_dict(scaler.state_dict())
    run_verdicts(other, [False])
    saved = dict(other.state_dict()["shardscale"])
    assert (saved["num_updates"], saved["num_skipped"]) == (4, 3)
    assert other.last_report().step == 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_state_saved_before_the_host_has_read_counts_the_last_skip(fused):
    """Contract 37: what a fused optimizer leaves for later is read for the state."""
    scaler = ShardedGradScaler("cpu")
    scaler.step(sgd(full(math.inf), fused=fused))
    scaler.update()
    assert dict(scaler.state_dict()["shardscale"])["num_skipped"] == 1
    scaler.step(sgd(full(1.0), fused=fused))
    scaler.update()
    assert dict(scaler.state_dict()["shardscale"])["num_skipped"] == 1


@BOTH
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_goes_its_own_way(make, duplicate):
    """Contract 38: between two steps, used before or not."""
    for before in ([], [True, False]):
        scaler = make("cpu", init_scale=8.0, growth_interval=3)
        run_verdicts(scaler, before)
        other = duplicate(scaler)
        assert type(other) is type(scaler)
        assert other.get_scale() == scaler.get_scale()
        run_verdicts(other, [False])
        assert other.get_scale() == scaler.get_scale() / 2


def test_a_disabled_scaler_can_be_copied(monkeypatch):
    """Contract 38: without a second warning that there is no CUDA."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: True)
    with pytest.warns(UserWarning, match="Disabling"):
        scaler = ShardedGradScaler("cuda")
    other = pickle.loads(pickle.dumps(scaler))
    assert not other.is_enabled()
    assert other.get_scale() == 1.0


def test_options_come_back():
    """Contract 38: those that are no part of the state."""
    scaler = ShardedGradScaler("cpu", timeout_s=7.0, sync=True)
    other = copy.deepcopy(scaler)
    assert (other._judge.bond.timeout_s, other._judge.sync) == (7.0, True)


@BOTH
@pytest.mark.parametrize("stage", ["unscale_", "step"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_in_the_middle_of_a_step_it_is_torchs_assertion(make, stage, duplicate):
    """Contract 38: and it can be finished."""
    scaler, optimizer = make("cpu", init_scale=8.0), sgd(full(8.0))
    scaler.scale(torch.ones(()))
    getattr(scaler, stage)(optimizer)
    with pytest.raises(AssertionError, match=r"^A GradScaler instance may only be pickled"):
        duplicate(scaler)
    if stage != "step":
        scaler.step(optimizer)
    scaler.update()
    duplicate(scaler)
    assert params_of(optimizer)[0].tolist() == [0.0] * 4


@pytest.mark.parametrize("call", ["unscale_", "step"])
def test_a_rank_that_only_joined_is_in_the_middle_too(call):
    """Contract 38: its verdict has not moved the scale yet."""
    scaler = ShardedGradScaler("cpu", comm=Solo())
    getattr(scaler, call)(())
    with pytest.raises(StateError):
        pickle.dumps(scaler)


def test_a_process_group_is_left_behind():
    """Contract 38: it belongs to the processes that made it."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        scaler = ShardedGradScaler("cpu", init_scale=8.0, process_group=dist.group.WORLD)
        saved = pickle.dumps(scaler)
        assert copy.deepcopy(scaler).get_scale() == 8.0
    finally:
        dist.destroy_process_group()
    alone = pickle.loads(saved)
    optimizer = sgd(full(8.0))
    alone.step(optimizer)
    assert params_of(optimizer)[0].tolist() == [0.0] * 4
