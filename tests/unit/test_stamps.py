"""Which scale a gradient has, how often it is divided by it, and what cannot be divided at all."""

from __future__ import annotations

import gc
import pickle
import warnings
import weakref

import pytest
import torch

from shardscale import LayoutError, ShardedGradScaler
from shardscale.stamps import Stamps

WARNING = "were added up over two scales"


def sgd(value=None, **options):
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = None if value is None else torch.full((4,), value)
    return torch.optim.SGD([param], lr=1.0, **options)


def param_of(optimizer):
    return optimizer.param_groups[0]["params"][0]


def stamp(stamps, optimizers, newest):
    return stamps.of(optimizers, torch.tensor(newest)).item()


def close(stamps, scale):
    stamps.close(torch.tensor(scale), (), 0)


def begin(stamps, scale):
    stamps.begin(torch.tensor(scale))


# --------------------------------------------------------------------------------- by which scale


def test_stamps_by_hand():
    """The scale an optimizer's gradients were made with; an empty call stands for others' ones."""
    stamps, one, other = Stamps(), sgd(), sgd()
    begin(stamps, 8.0)
    assert stamp(stamps, [one], 8.0) == 8.0
    stamps.mark_stepped([one])
    close(stamps, 8.0)
    assert stamp(stamps, [one], 16.0) == 16.0
    assert stamp(stamps, [other], 16.0) == 8.0
    assert stamp(stamps, [one, other], 16.0) == 8.0
    assert stamp(stamps, (), 16.0) == 8.0
    stamps.mark_stepped(())
    close(stamps, 16.0)
    assert stamp(stamps, (), 32.0) == 32.0
    assert stamp(stamps, [other], 32.0) == 8.0
    begin(stamps, 32.0)
    assert stamp(stamps, [other], 32.0) == 32.0


def test_an_optimizer_that_was_dropped_does_not_lend_its_stamp_to_a_new_one():
    """By its id, which Python gives to the next object: on one rank and not on another."""
    stamps = Stamps()
    begin(stamps, 8.0)
    for _ in range(100):
        stamps.mark_stepped([sgd()])
    close(stamps, 8.0)
    assert [stamp(stamps, [sgd()], 16.0) for _ in range(100)] == [8.0] * 100


def test_the_stamp_is_a_copy():
    stamps, scale = Stamps(), torch.tensor(8.0)
    stamps.begin(scale)
    stamps.close(scale, (), 0)
    scale.fill_(16.0)
    assert stamp(stamps, [sgd()], 16.0) == 8.0


def test_who_never_begins_is_unscaled_by_the_newest_scale():
    """A loss multiplied by ``get_scale()`` by hand."""
    stamps, scale = Stamps(), torch.tensor(8.0)
    stamps.close(scale, (), 0)
    scale.fill_(16.0)
    assert stamp(stamps, [sgd()], 16.0) == 16.0


# --------------------------------------------------------------------------------- once, not twice

SCALES = [4.0, 3.0]  # a power of two, and one whose inverse float32 cannot hold
UNSCALE = {
    "unscale_": lambda s, o: s.unscale_(o),
    "clip_grad_norm_": lambda s, o: s.clip_grad_norm_(o, float("inf")),
}


def unscaled_then_updated(scale, how, *, fused=False, value=None):
    """Two optimizers with gradients of 1.0, unscaled; the first has stepped and was updated."""
    scaler = ShardedGradScaler("cpu", init_scale=scale, growth_interval=1)
    one, other = sgd(fused=fused), sgd(fused=fused)
    scaler.scale(param_of(one).sum() + param_of(other).sum()).backward()
    if value is not None:
        param_of(other).grad[1] = value
    UNSCALE[how](scaler, one)
    UNSCALE[how](scaler, other)
    scaler.step(one)
    scaler.update()
    return scaler, one, other


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how", UNSCALE)
@pytest.mark.parametrize("scale", SCALES)
def test_an_update_in_between_does_not_make_unscaled_gradients_scaled_again(scale, how, fused):
    """Contract 34: torch forgets that the second optimizer is unscaled, and divides it twice."""
    scaler, one, other = unscaled_then_updated(scale, how, fused=fused)
    scaler.step(other)
    scaler.update()
    moved = (torch.ones(4) * scale) * torch.tensor(1.0 / scale, dtype=torch.float64).float()
    assert torch.equal(param_of(one), -moved)
    assert torch.equal(param_of(other), -moved)


def test_torch_unscales_the_second_optimizer_twice():
    """What the test above would find of torch's class."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    one, other = sgd(), sgd()
    scaler.scale(param_of(one).sum() + param_of(other).sum()).backward()
    scaler.unscale_(one)
    scaler.unscale_(other)
    scaler.step(one)
    scaler.update()
    scaler.step(other)
    assert [param_of(o)[0].item() for o in (one, other)] == [-1.0, -0.25]


@pytest.mark.parametrize("how", UNSCALE)
def test_a_bad_verdict_stays_bad_across_the_update(how):
    scaler, _, other = unscaled_then_updated(4.0, how, value=float("nan"))
    assert scaler.get_scale() == 2.0
    param_of(other).grad = param_of(other).grad  # the same gradient, so the same verdict
    scaler.step(other)
    assert param_of(other).tolist() == [0.0] * 4


def test_a_joint_verdict_of_the_other_optimizer_stays_bad_across_the_update():
    """Nothing was clipped, since one of them was bad; then the good one must not step either."""
    scaler = ShardedGradScaler("cpu", init_scale=4.0)
    bad, good = sgd(float("inf")), sgd(4.0)
    scaler.begin()
    scaler.clip_grad_norm_([bad, good], max_norm=0.5)
    for optimizer in (bad, good):
        scaler.step(optimizer)
        scaler.update()
        assert param_of(optimizer).tolist() == [0.0] * 4


WRITES = {
    "torch's clipping": lambda p: torch.nn.utils.clip_grad_norm_([p], 1e9),
    "in place": lambda p: p.grad.clamp_(-10, 10),
    "behind autograd's back": lambda p: p.grad.data.mul_(1.0),
    "nothing": lambda p: None,
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_gradients_written_to_since_then_are_still_unscaled(write, fused):
    """Whoever clips or repairs them does so on unscaled ones; on some ranks only, perhaps."""
    scaler, _, other = unscaled_then_updated(4.0, "unscale_", fused=fused)
    WRITES[write](param_of(other))
    scaler.step(other)
    assert param_of(other).tolist() == [-1.0] * 4


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how", ["by hand", "new iteration"])
def test_gradients_made_since_then_are_scaled_ones(how, fused):
    scaler, _, other = unscaled_then_updated(4.0, "unscale_", fused=fused)
    param = param_of(other)
    param.grad = None
    if how == "by hand":  # nothing begins, so its stamp is that of the iteration
        (param.sum() * 4.0).backward()
    else:
        scaler.scale(param.sum()).backward()
    scaler.step(other)
    assert param.tolist() == [-1.0] * 4


@pytest.mark.parametrize("fused", [False, True])
def test_of_one_optimizer_each_gradient_is_unscaled_once(fused):
    """One was there before the update, another came after it, a third was dropped."""
    scaler = ShardedGradScaler("cpu", init_scale=4.0)
    one, other = sgd(), sgd(fused=fused)
    late, gone = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    other.add_param_group({"params": [gone]})
    scaler.scale(param_of(one).sum() + param_of(other).sum() + gone.sum()).backward()
    scaler.unscale_(one)
    scaler.unscale_(other)
    scaler.step(one)
    scaler.update(8.0)
    gone.grad = None
    other.add_param_group({"params": [late]})
    (late.sum() * 4.0).backward()
    scaler.step(other)
    assert [p[0].item() for p in (param_of(other), late, gone)] == [-1.0, -1.0, 0.0]


@pytest.mark.parametrize("coalesced", [False, True])
def test_sparse_gradients_are_unscaled_once_too(coalesced):
    table = torch.nn.Embedding(4, 2, sparse=True)
    torch.nn.init.zeros_(table.weight)
    scaler, one = ShardedGradScaler("cpu", init_scale=4.0), sgd()
    other = torch.optim.SGD(table.parameters(), lr=1.0)
    for _ in range(2):
        one.zero_grad()
        other.zero_grad()
        rows = torch.tensor([1] if coalesced else [1, 1])
        scaler.scale(param_of(one).sum() + table(rows).sum()).backward()
        scaler.unscale_(one)
        scaler.unscale_(other)
        scaler.step(one)
        scaler.update()
        scaler.step(other)
        scaler.update()
    assert table.weight[1].tolist() == [-2.0 if coalesced else -4.0] * 2


def test_a_scaler_that_has_never_begun_goes_by_the_update_as_torchs():
    """It is scaled by hand, and nothing tells that gradients are new."""
    scaler, optimizer = ShardedGradScaler("cpu", init_scale=4.0), sgd(16.0)
    scaler.unscale_(optimizer)
    scaler.update()
    scaler.unscale_(optimizer)
    assert param_of(optimizer).grad.tolist() == [1.0] * 4


def test_a_parameter_of_two_optimizers_is_refused_across_the_update_too():
    """Contract 14: its one gradient would be unscaled and applied twice."""
    param = torch.nn.Parameter(torch.zeros(4))
    one, other = (torch.optim.SGD([param], lr=1.0) for _ in range(2))
    scaler = ShardedGradScaler("cpu", init_scale=4.0)
    scaler.scale(param.sum()).backward()
    scaler.step(one)
    scaler.update()
    with pytest.raises(LayoutError, match="is in two optimizers"):
        scaler.step(other)
    scaler.scale(param.sum()).backward()
    param.grad = torch.full((4,), 4.0)
    scaler.step(other)
    assert param.tolist() == [-2.0] * 4


def test_no_optimizer_is_kept_alive():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    scaler = ShardedGradScaler("cpu", model=model)
    for _ in range(2):
        scaler.scale(model(torch.ones(3)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    scaler.scale(model(torch.ones(3)).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.update()
    remains = [weakref.ref(x) for x in (model, optimizer, model.weight, model.weight.grad)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in remains] == [None] * 4


def test_between_two_steps_such_a_scaler_can_be_pickled():
    scaler, _, _ = unscaled_then_updated(4.0, "unscale_")
    assert pickle.loads(pickle.dumps(scaler)).get_scale() == 8.0


# ---------------------------------------------------------------------------------- over two scales


def window(scale, next_scale, *, between=lambda other: None, fused=False, model=None, rounds=1):
    """One optimizer steps and the scale changes; the gradients of the other are added up.

    ``between`` is done to the other optimizer before each new iteration. The last value of one of
    its gradients.
    """
    scaler = ShardedGradScaler("cpu", init_scale=scale)
    if model is not None:
        scaler.attach(model)
    one = sgd(fused=fused)
    other = sgd(fused=fused)
    if model is not None:
        other = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    for _ in range(rounds):
        for new_scale in (next_scale, None):
            scaler.scale(param_of(one).sum() + param_of(other).sum()).backward()
            scaler.step(one)
            one.zero_grad()
            if new_scale is not None:
                scaler.update(new_scale)
                between(other)
        scaler.step(other)
        other.zero_grad()
        scaler.update(scale)
    scaler.scale(param_of(one).sum()).backward()
    scaler.step(one)
    scaler.update()  # where a fused optimizer's numbers are read
    return scaler


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("scale", "next_scale"), [(4.0, 8.0), (4.0, 2.0), (4.0, 3.0)])
def test_gradients_added_up_over_two_scales_are_told_once_and_named(scale, next_scale, fused):
    """Contract 34: one ``.grad`` that adds gradients of two scales cannot be unscaled."""
    model = torch.nn.Linear(3, 2)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        window(scale, next_scale, fused=fused, model=model, rounds=4)
    (message,) = [str(w.message) for w in caught]
    assert "SGD (of weight)" in message
    assert f"two scales, {scale:g} and {next_scale:g}" in message
    assert f"counts {scale / next_scale:g} times" in message


@pytest.mark.parametrize("order", ["seen before", "first seen"])
def test_gradients_of_an_attached_model_are_told_of_in_the_first_window(order):
    """Before its optimizer was ever passed to the scaler, the model is all there is to know."""
    model = torch.nn.Linear(3, 2)
    scaler = ShardedGradScaler("cpu", init_scale=4.0, model=model)
    one, other = sgd(), torch.optim.SGD(model.parameters(), lr=1.0)
    if order == "seen before":
        scaler.scale(model(torch.ones(3)).sum()).backward()
        scaler.step(other)
        scaler.update()
        other.zero_grad()
    for _ in range(2):
        scaler.scale(param_of(one).sum() + model(torch.ones(3)).sum()).backward()
        scaler.step(one)
        scaler.update(8.0)
    scaler.unscale_(other)
    scaler.update()
    with pytest.warns(
        UserWarning, match=r"SGD \(of weight\) were added up over two scales, 4 and 8"
    ):
        scaler.update(8.0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_that_were_zeroed_carry_no_scale(set_to_none, fused):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        window(
            4.0,
            8.0,
            between=lambda other: other.zero_grad(set_to_none=set_to_none),
            fused=fused,
            rounds=3,
        )
    assert [str(w.message) for w in caught] == []


def test_a_scale_that_stays_is_none_of_two():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        window(4.0, 4.0, rounds=3)
    assert [str(w.message) for w in caught] == []


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("updates", ["after each", "after all"])
def test_two_discriminator_steps_to_one_of_the_generator(updates, set_to_none):
    """The generator's loss leaves gradients in the discriminator, which are zeroed, not stepped.

    While the scale moves at every update, each optimizer moves by the gradient of its own losses.
    """
    scaler = ShardedGradScaler("cpu", init_scale=4.0, growth_interval=1)
    critic, maker = sgd(), sgd()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for _ in range(2):
                critic.zero_grad(set_to_none=set_to_none)
                scaler.scale(param_of(critic).sum() * 3.0).backward()
                scaler.step(critic)
                scaler.update()
            maker.zero_grad(set_to_none=set_to_none)
            scaler.scale(param_of(critic).sum() * 5.0 + param_of(maker).sum()).backward()
            scaler.step(maker)
            scaler.update()
    assert [str(w.message) for w in caught] == []
    assert scaler.get_scale() == 4.0 * 2.0**9
    assert param_of(critic).tolist() == [-18.0] * 4
    assert param_of(maker).tolist() == [-3.0] * 4


def test_a_new_loss_on_gradients_that_are_unscaled_already_is_told():
    """Their scale is 1."""
    scaler = ShardedGradScaler("cpu", init_scale=4.0)
    optimizer = sgd()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            scaler.scale(param_of(optimizer).sum()).backward()
            scaler.unscale_(optimizer)
            scaler.update()
    (message,) = [str(w.message) for w in caught]
    assert "two scales, 1 and 4" in message
