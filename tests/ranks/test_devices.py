"""Wherever gradients, scale and loss live, and whatever the group sends by: one verdict.

This machine has no accelerator; ``tests.ranks.accelerator`` stands in for one, on every rank.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

import shardscale
from shardscale import ShardedGradScaler
from tests.ranks import accelerator
from tests.ranks.accelerator import NAME, TRANSPORT
from tests.ranks.models import equal, lay_out, make_net, reference_grads, spoil, whole_bits

INF, NAN = math.inf, math.nan
SCALE = 8.0
TWO_BACKENDS = f"cpu:gloo,{NAME}:{TRANSPORT}"
ROUNDING = 2.0**-22
"""Relative: a norm passes a few roundings to float32, of 2^-24 each."""
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.5, foreach=False),
    "fused SGD": lambda params: torch.optim.SGD(params, lr=0.5, fused=True),
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=0.5, fused=True),
}


# ----------------------------------------------- all of the training on the host, but for the scale


def offload(rank, size, name):
    """{optimizer: {check: whether it held}}, and the scales and norms along the way.

    As with CPU offload: parameters, gradients and optimizer on the host, the scale on the device.
    """
    accelerator.install()
    group = dist.new_group(backend=TWO_BACKENDS)
    names = ("SGD", "fused AdamW")  # torch's fused SGD takes no DTensor
    return {optimizer: offload_one(rank, size, name, optimizer, group) for optimizer in names}


def offload_one(rank, size, name, optimizer_name, group):
    laid, net = lay_out(name, size), make_net()
    optimizer = OPTIMIZERS[optimizer_name](laid.model.parameters())
    reference = OPTIMIZERS[optimizer_name](net.parameters())
    scaler = ShardedGradScaler(NAME, init_scale=SCALE, process_group=group)
    scaler.attach(laid.model, copies=laid.copies)
    held, seen = {}, []
    for step, (how, value) in enumerate(
        [("step", None), ("step", INF), ("unscale_", NAN), ("clip", INF), ("clip", None)]
    ):
        before = whole_bits(laid)
        optimizer.zero_grad()
        laid.backward(scaler, step)
        if value is not None:
            spoil(laid.model, rank, size // 2, value)
        if how == "unscale_":
            scaler.unscale_(optimizer)
        if how == "clip":
            norm = scaler.clip_grad_norm_(optimizer, INF).item()
        scaler.step(optimizer)
        scaler.update()
        if value is not None:
            held[how, value] = equal(before, whole_bits(laid))
        else:
            grads = reference_grads(net, laid.num_batches, step)
            reference.step()
            # Once Adam has divided, its numbers are no longer exact.
            if step == 0 or "SGD" in optimizer_name:
                params = {n: p.detach() for n, p in net.named_parameters()}
                held[how] = equal(laid.whole(), params)
        seen.append(scaler.get_scale())
    expected = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
    return held, seen, norm / expected


@pytest.mark.parametrize(
    ("name", "size"), [("DDP", 2), ("FSDP1 FULL_SHARD original", 2), ("FSDP2", 3)]
)
def test_a_scale_elsewhere_trains_what_lies_on_the_host_as_one_process_would(ranks, name, size):
    """Contract 40 and 45: also with fused optimizers, which fetch flag and scale themselves.

    Bitwise, because all numbers are whole and small. A number that the host reads before it has
    come from the device is another one.
    """
    for found in ranks.run(offload, size, name=name):
        for optimizer_name, (held, scales, norm) in found.items():
            assert held == dict.fromkeys(held, True), optimizer_name
            assert scales == [8.0, 4.0, 2.0, 1.0, 1.0], optimizer_name
            # After Adam's first step the reference has rounded otherwise; its gradients have not.
            assert norm == pytest.approx(1.0, rel=1e-4 if "Adam" in optimizer_name else ROUNDING)


# ----------------------------------------------------------------- several devices in one optimizer

PLACES = [("cpu",), (NAME,), ("cpu", NAME, "cpu"), ()]
"""On which devices each of four ranks has a parameter of three elements."""


def mix_devices(rank, size):
    """{(scale's device, optimizer, where the bad value is): (norm, values, scale)}."""
    accelerator.install()
    group = dist.new_group(backend=TWO_BACKENDS)
    bad_places = [None] + [(r, i) for r, places in enumerate(PLACES) for i in range(len(places))]
    found = {}
    for scale_on in ("cpu", NAME):
        for optimizer_name in OPTIMIZERS:
            for bad in bad_places:
                found[scale_on, optimizer_name, bad] = mix_once(
                    rank, group, scale_on, optimizer_name, bad
                )
    return found


def mix_once(rank, group, scale_on, optimizer_name, bad):
    params = [torch.nn.Parameter(torch.ones(3, device=device)) for device in PLACES[rank]]
    optimizers = [OPTIMIZERS[optimizer_name](params)] if params else []
    scaler = ShardedGradScaler(scale_on, init_scale=SCALE, process_group=group)
    scaler.attach(torch.nn.ParameterList(params), copies=shardscale.distinct)
    scaler.scale(torch.ones((), device=PLACES[rank][0] if params else "cpu"))
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, INF if bad == (rank, i) else SCALE)
    norm = scaler.clip_grad_norm_(optimizers, 1.0).item()
    scaler.step(optimizers)
    scaler.update()
    return norm, [p.tolist() for p in params], scaler.get_scale()


def test_gradients_of_several_devices_share_one_verdict_and_one_norm(ranks):
    """Contract 41 and 45: on the host, on the device, on both, and on a rank that has neither."""
    for rank, found in enumerate(ranks.run(mix_devices, 4)):
        for (scale_on, optimizer_name, bad), (norm, values, scale) in found.items():
            if bad is not None:
                assert (norm, scale) == (INF, SCALE / 2), (scale_on, optimizer_name, bad)
                assert values == [[1.0] * 3] * len(PLACES[rank]), (scale_on, optimizer_name, bad)
                continue
            assert norm == pytest.approx(math.sqrt(15), rel=ROUNDING), (scale_on, optimizer_name)
            assert scale == SCALE
            # Adam's first step is the learning rate, whatever the gradient; before it, decay.
            moved = 1 - 0.5 / math.sqrt(15) if "SGD" in optimizer_name else 0.995 - 0.5
            for value in values:
                assert value == pytest.approx([moved] * 3, rel=1e-6), (scale_on, optimizer_name)


def mix_without_a_norm(rank, size):
    """Scales of a job whose default dtype is float64, for each place of the bad value."""
    accelerator.install()
    group = dist.new_group(backend=TWO_BACKENDS)
    torch.set_default_dtype(torch.float64)
    scales = {}
    for scale_on in ("cpu", NAME):
        for bad in [None] + [(r, i) for r, places in enumerate(PLACES) for i in range(len(places))]:
            params = [
                torch.nn.Parameter(torch.ones(3, device=device, dtype=torch.float32))
                for device in PLACES[rank]
            ]
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, INF if bad == (rank, i) else SCALE)
            optimizers = [torch.optim.SGD(params)] if params else []
            scaler = ShardedGradScaler(scale_on, init_scale=SCALE, process_group=group)
            scaler.unscale_(optimizers)
            scaler.step(optimizers)
            scaler.update()
            scales[scale_on, bad] = scaler.get_scale()
    return scales


def test_what_is_found_on_one_device_counts_where_no_norm_would_tell(ranks):
    """By the flag alone, which is float32 whatever torch's default dtype is."""
    for scales in ranks.run(mix_without_a_norm, 4):
        assert scales == {key: SCALE if key[1] is None else SCALE / 2 for key in scales}


# --------------------------------------------------------------------- where the group's message is

CONFIGS = {
    "gloo": None,
    f"cpu:gloo,{NAME}:gloo": None,
    TWO_BACKENDS: NAME,
    f"{NAME}:{TRANSPORT}": NAME,
}
"""A group's backends -> the device of the messages that the device's own transport gets, if any."""


def send(rank, size):
    """{(backends, scale's device, gradients' device): (values, scales, messages)}."""
    accelerator.install()
    found = {}
    for config in CONFIGS:
        group = dist.new_group(backend=config)
        for scale_on in ("cpu", NAME):
            for grads_on in ("cpu", NAME):
                found[config, scale_on, grads_on] = send_some(rank, group, scale_on, grads_on)
    return found


def send_some(rank, group, scale_on, grads_on):
    p = torch.nn.Parameter(torch.ones(3, device=grads_on))
    optimizer = torch.optim.SGD([p], lr=0.5, foreach=False)
    scaler = ShardedGradScaler(scale_on, init_scale=SCALE, process_group=group)
    num_before = len(accelerator.messages_seen())
    scales = []
    for bad_rank in (None, 0, 1, 2):
        scaler.scale(torch.ones(()))
        p.grad = torch.full_like(p, NAN if rank == bad_rank else scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return p.tolist(), scales, accelerator.messages_seen()[num_before:]


def test_the_message_goes_where_the_group_sends_from(ranks):
    """Contract 41: whatever device scale and gradients are on.

    The transports insist: that of the device refuses any other message, and Gloo knows no tensor
    of the device.
    """
    for found in ranks.run(send, 3):
        assert len(found) == 4 * len(CONFIGS)
        for (config, scale_on, grads_on), (values, scales, messages) in found.items():
            assert values == [0.5] * 3, (config, scale_on, grads_on)
            assert scales == [8.0, 4.0, 2.0, 1.0], (config, scale_on, grads_on)
            assert messages == ([CONFIGS[config]] * 4 if CONFIGS[config] else [])


# -------------------------------------------------------------------- what the host has to wait for


def wait(rank, size):
    """{(optimizer, how): how often the host waited in each of three iterations}."""
    accelerator.install()
    group = dist.new_group(backend=TWO_BACKENDS)
    return {
        (optimizer_name, how): wait_some(rank, group, optimizer_name, how)
        for optimizer_name in OPTIMIZERS
        for how in ("step", "unscale_", "clip")
    }


def wait_some(rank, group, optimizer_name, how):
    p = torch.nn.Parameter(torch.ones(3, device=NAME))
    optimizer = OPTIMIZERS[optimizer_name]([p])
    scaler = ShardedGradScaler(NAME, init_scale=SCALE, process_group=group)
    scaler.attach(torch.nn.ParameterList([p]), copies=shardscale.distinct)
    loss = torch.ones((), device=NAME)
    waits = []
    for step in range(3):
        p.grad = torch.full_like(p, INF if rank == step else SCALE)
        with accelerator.counted_waits() as counted:
            scaler.scale(loss)
            if how == "unscale_":
                scaler.unscale_(optimizer)
            if how == "clip":
                scaler.clip_grad_norm_(optimizer, 1.0)
            scaler.step(optimizer)
            scaler.update()
        waits += counted
    return waits


def test_agreeing_on_the_device_makes_the_host_wait_only_for_a_step_that_it_takes(ranks):
    """Good or bad, here or elsewhere: never with a fused optimizer, once with any other."""
    for found in ranks.run(wait, 2):
        for (optimizer_name, how), waits in found.items():
            expected = 0 if "fused" in optimizer_name else 1
            assert waits == [expected] * 3, (optimizer_name, how)
