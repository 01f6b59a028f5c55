"""The scaler: torch's method names over one agreed verdict."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self

from shardscale.arguments import as_max_norm, as_number, is_usable, require_device_type
from shardscale.backward import refuse_optimizers_in_backward
from shardscale.capturing import is_capturing
from shardscale.comm import Bond, Communicator
from shardscale.errors import ConfigError, StageError, StateError
from shardscale.examine import Question
from shardscale.factors import Factors
from shardscale.fused import can_fold
from shardscale.judge import Judge
from shardscale.kernels import backend_name
from shardscale.layouts import Copies
from shardscale.obey import Obedience, refuse_closure
from shardscale.outputs import map_tensors, scale_gradient, times_scale
from shardscale.policy import ConstantScale, DynamicScale, ScalePolicy
from shardscale.records import Agreement, ScaleState, StepReport, Verdict
from shardscale.replay import refuse_capture
from shardscale.saved_state import from_state_dict, to_state_dict
from shardscale.stages import as_list
from shardscale.stopping import Stopping
from shardscale.torch_names import TorchNames
from shardscale.untraced import leave_untraced
from shardscale.verdict import joint_found_inf

__all__ = ["ShardedGradScaler"]


# Where torch has attributes ours are properties, and one optimizer may be a sequence of them.
@leave_untraced("clip_grad_norm_", "last_report", "step", "unscale_", "update", "verdict")
class ShardedGradScaler(  # type: ignore[override,misc]
    TorchNames, Factors, Stopping, torch.amp.GradScaler
):
    """A gradient scaler whose every rank skips or steps together.

    Takes the place of ``torch.amp.GradScaler`` and of torch's ``ShardedGradScaler``. Whatever the
    optimizers, dtypes, devices and shards, one small all-reduce per call gives all ranks of the job
    the same verdict. Alone, or before a process group exists, it is torch's scaler bit for bit.

    Wherever a method takes optimizers, it takes one or a sequence of them, possibly empty: one call
    is one verdict. Every rank makes the same sequence of calls; a rank without an optimizer passes
    ``()``.

    Args:
        device: The type of device on which scale and trackers live. "cuda" without CUDA warns and
            disables the scaler, as torch does.
        init_scale: The scale to begin with.
        growth_factor: See :class:`~shardscale.DynamicScale`.
        backoff_factor: See there.
        growth_interval: See there.
        enabled: If False every method but ``clip_grad_norm_`` passes through.
        process_group: The agreeing group; None for the whole job. Where some ranks never train it
            must be named.
        comm: A communicator instead of a process group; not both.
        policy: How the scale moves, instead of the three numbers above.
        model: Short for ``attach(model)``.
        timeout_s: Seconds that a verdict may take. None: 60 for the first one, the group's own
            timeout after that; with ``comm`` what that was made with. Given beside a ``comm`` it
            comes before, where there is a ``within`` to tell it; others wait as they do.
        fold_clip: Have fused optimizers clip in their own pass: ``clip_grad_norm_`` then writes no
            gradient, and their step divides by scale over factor. In between, ``.grad`` stays
            scaled and unclipped. Others are clipped as usual.
        sync: Read every verdict at once, also with fused optimizers. For debugging: errors come at
            the call that made them, for one host read per call.

    Raises:
        ConfigError: an argument is out of range; says the value and what is allowed.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.SGD([weight], lr=0.5)
    >>> scaler = ShardedGradScaler("cpu")
    >>> scaler.scale(weight.sum()).backward()
    >>> scaler.step(optimizer)
    >>> scaler.update()
    >>> weight.tolist(), scaler.get_scale()
    ([0.5, 0.5], 65536.0)
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        *,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        process_group: dist.ProcessGroup | None = None,
        comm: Communicator | None = None,
        policy: ScalePolicy | None = None,
        model: nn.Module | None = None,
        timeout_s: float | None = None,
        fold_clip: bool = False,
        sync: bool = False,
    ) -> None:
        self._device = device
        self._enabled = enabled and is_usable(device)
        if self._enabled:
            require_device_type(device)
        numbers = (growth_factor, backoff_factor, growth_interval)
        if policy is not None and numbers != (2.0, 0.5, 2000):
            raise ConfigError(
                "growth_factor, backoff_factor or growth_interval is given beside policy=. "
                "Give these numbers to the policy."
            )
        if self._enabled:
            self._policy = policy or DynamicScale(*numbers)
            self._state = self._policy.init(init_scale, "cpu")
        else:
            self._policy = ConstantScale()
            self._state = self._policy.init(1.0, "cpu")
        self._fold_clip = fold_clip
        self._is_placed = False
        # A disabled scaler clips, but has no update() to read anything late.
        bond = Bond(process_group, comm, timeout_s, is_numbered=self._enabled)
        self._judge = Judge(bond, sync or not self._enabled)
        if model is not None:
            self.attach(model)

    def attach(self, model: nn.Module, *, copies: Copies | None = None) -> Self:
        """Learn a model's parameter names and layouts, for the norm and for messages.

        Args:
            model: The model, wrapped as it will be trained; attach it again if wrapping or loading
                replaces its parameters. Several models are attached one by one. The scaler keeps
                none of them alive, but for a ParameterList or ParameterDict given here.
            copies: Where ranks of the group are left over that a parameter's own layout does not
                speak of: ``copies(name, param)`` returns the process group, the mesh or the ranks
                that hold the same gradient besides, this rank included, or None for nowhere else.
                ``shardscale.distinct`` says None for all. Where the layout has copies, too, the
                ranks must form a grid that ascends along both, as those of a mesh do.

        Raises:
            ConfigError: ``copies`` is no function.
            StageError: optimizers of its parameters run inside backward.

        Collective: none.
        """
        names = {id(p): name for name, p in model.named_parameters()}
        refuse_optimizers_in_backward(model.parameters(), lambda param: names[id(param)])
        self._judge.layouts.attach(model, copies)
        return self

    def describe(self) -> str:
        """A table of the attached parameters: layout, who holds it, who counts it, kernel.

        Collective: none; every rank has its own table.
        """
        layouts = self._judge.layouts
        return layouts.describe(layouts.params(), self._judge.bond.members(), backend_name)

    def scale(self, outputs: Any) -> Any:
        """Multiply by the scale; begins a new iteration.

        Args:
            outputs: A tensor, or a list, tuple, namedtuple, dict or iterable of them.

        Returns:
            The same structure. 16-bit tensors are scaled in float32 and stay float32.

        Raises:
            ValueError: something in ``outputs`` is neither.

        Collective: none.
        """
        if not self._enabled:
            return outputs
        self.begin()
        return map_tensors(functools.partial(times_scale, scale=self._state.scale), outputs)

    def wrap_loss(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """A loss function with the same values, whose gradient alone is scaled.

        For pipeline schedules, which call ``backward`` themselves. Begins a new iteration whenever
        it is called.

        Collective: none.
        """

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            loss = loss_fn(*args, **kwargs)
            if not self._enabled:
                return loss
            self.begin()
            return map_tensors(functools.partial(scale_gradient, scale=self._state.scale), loss)

        return wrapped

    def begin(self) -> None:
        """Begin a new iteration on a rank that sees no loss; ``scale`` does so by itself.

        Gradients made from here on are unscaled by the scale of now, however often ``update`` is
        called before their optimizer steps.

        Collective: none.
        """
        if self._enabled and torch.compiler.is_compiling():
            self._judge.stamps.open()  # the state is placed by the first call that judges
        elif self._enabled:
            self._judge.stamps.begin(self._place().scale)

    def unscale_(self, optimizers: Any) -> None:
        """Divide the gradients by the scale, in place, and agree on whether all are finite.

        Args:
            optimizers: One optimizer or a sequence of them, possibly empty.

        Raises:
            StageError: one of them is unscaled already, or has stepped; or an attached model still
                holds gradients of theirs back (``no_sync``).
            LayoutError: a gradient cannot be judged; names the parameter.
            DisagreementError: the ranks do not make the same call in the same state; raised here
                with ``sync``, else by ``step`` or the next ``update``.
            MissingRankError: a rank did not come.

        Collective: every rank of the group must call; sends 2 float64, once. Before that, the ranks
            of a mesh that has Partial gradients sum these.
        Sync: none.
        """
        if not self._enabled:
            return
        listed, _ = as_list(optimizers)
        mistake = self._judge.stages.mistake_in_unscaling(listed)
        self._ask(Question("unscale_", listed, mistake))

    def clip_grad_norm_(self, optimizers: Any, max_norm: float | Tensor) -> Tensor:
        """Unscale, unless that is done, and clip the norm of all gradients on all ranks.

        Nothing is clipped where the verdict is a skip. A disabled scaler clips, too.

        Args:
            optimizers: One optimizer or a sequence of them, clipped jointly; possibly empty.
            max_norm: The largest L2 norm; ``math.inf`` only measures. A tensor of one element on
                the scale's device is not read, so it may change between replays of a graph; one
                that is negative or NaN counts as found.

        Returns:
            The norm before clipping, () float32, the same bits on every rank. Finite gradients give
            a finite norm; one that is not finite counts as found. A finite norm is no promise of a
            step: of several copies it counts one, while the verdict judges all.

        Raises:
            ConfigError: ``max_norm`` is negative or NaN.
            StageError: one of the optimizers has stepped, or only some are unscaled; or an attached
                model still holds gradients of theirs back (``no_sync``).
            LayoutError: it is not known which ranks hold copies of a gradient; see ``attach``.
            DisagreementError: as for ``unscale_``.
            MissingRankError: a rank did not come.

        Collective: every rank of the group must call; sends 2 float64, once. Before that, the ranks
            of a mesh that has Partial gradients sum these.
        Sync: none on an accelerator.
        """
        listed, _ = as_list(optimizers)
        largest = as_max_norm(max_norm, self._place().scale.device)
        mistake = self._judge.stages.mistake_in_clipping(listed)
        question = Question("clip_grad_norm_", listed, mistake, largest)
        if self._fold_clip and self._enabled:  # a disabled scaler is not asked when to step
            # The ranks must fold alike: the two ways round differently.
            method = "clip_grad_norm_ with fold_clip"
            question = question._replace(method=method, leaves_scaled=can_fold)
        agreement = self._ask(question)
        if not self._enabled:
            self._judge.settle()
        return agreement.grad_norm

    def step(  # type: ignore[override]
        self, optimizers: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Step the optimizers if all gradients on all ranks are finite; else skip on all ranks.

        Unscales first what is not unscaled yet. All optimizers of one call step, or all skip.

        Args:
            optimizers: One optimizer or a sequence of them, possibly empty.
            *args: For each ``optimizer.step``.
            **kwargs: For each ``optimizer.step``; no closure.

        Returns:
            What ``optimizer.step`` returned, a list of that for a sequence; None on a skip.

        Raises:
            RuntimeError: a closure was passed.
            StageError: an optimizer has stepped since the last update, only some of a sequence have
                a verdict, an optimizer of the older kind never asked for one, or an attached model
                still holds gradients of theirs back (``no_sync``).
            DisagreementError: the ranks do not make the same call in the same state.
            LayoutError: a gradient cannot be judged; names the parameter.
            MissingRankError: a rank did not come.

        Collective: every rank of the group must call; sends 2 float64, once, unless the optimizers
            have a verdict already. Before that, the ranks of a mesh that has Partial gradients sum
            these.
        Sync: none for fused optimizers, one read otherwise.
        """
        if not self._enabled:
            if hasattr(optimizers, "step"):
                return optimizers.step(*args, **kwargs)
            return [optimizer.step(*args, **kwargs) for optimizer in optimizers]
        listed, single = as_list(optimizers)
        refuse_closure(args, kwargs)
        call = Obedience(self, self._judge, self._place(), self._ask, (args, kwargs))
        results = call.step(listed)
        return results[0] if single and results is not None else results

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Close the iteration: move the scale by the policy, or set it.

        With fused optimizers this is also where the host learns what the iteration before brought.

        Args:
            new_scale: A number or a tensor of one element; the trackers are kept.

        Raises:
            StateError: no verdict was made since the last update.
            ConfigError: ``new_scale`` is not finite, not positive or outside the policy's range;
                nothing was changed.
            DisagreementError: in the iteration before, the ranks did not make the same calls.

        Collective: none, but where the ranks disagree.
        Sync: none; reads what was sent to the host an iteration ago.
        """
        if not self._enabled:
            return
        floor = getattr(self._policy, "min_scale", None)
        state = self._place()
        if not self._judge.is_captured(state):
            self._judge.read_late(floor)
        elif new_scale is not None:
            raise StageError("update(new_scale) cannot be captured. Call it between two replays.")
        agreements = self._judge.stages.agreements()
        if new_scale is None:
            self._require_records()
            found_inf = joint_found_inf([agreement for agreement, _ in agreements])
            after = self._policy.next_state(state, found_inf.to(state.scale.device))
        else:
            chosen = self._policy.init(as_number(new_scale), state.scale.device)
            after = state._replace(scale=chosen.scale)
        self._judge.close(agreements, state, after.scale, floor)
        for old, new in zip(state, after, strict=True):
            old.copy_(new)

    def verdict(self, optimizers: Any) -> Verdict:
        """What the ranks decided about these optimizers since the last update.

        Args:
            optimizers: One optimizer or a sequence of them, as passed to the call that judged them.

        Returns:
            Joint over the sequence; ``grad_norm`` is NaN unless one ``clip_grad_norm_`` covered it.

        Raises:
            StageError: one of them has no verdict yet.

        Collective: none.
        Sync: none.
        """
        listed, _ = as_list(optimizers)
        found = self._judge.stages.verdicts(listed)
        if not found or not all(self._judge.stages.of(o).was_judged for o in listed):
            raise StageError(
                "verdict() was called before there is one. Call unscale_(), clip_grad_norm_() or "
                "step() with these optimizers first, and verdict() before update()."
            )
        if len(found) == 1:
            mine = found[0][0].verdict
            return Verdict(mine.found_inf.clone(), mine.grad_norm.clone())  # the step reads its own
        found_inf = joint_found_inf([agreement for agreement, _ in found])
        return Verdict(found_inf, torch.full_like(found_inf, math.nan))

    def last_report(self) -> StepReport | None:
        """The newest iteration that the host knows all about, or None before the first.

        With fused optimizers, or a scale on an accelerator, that is one iteration behind.

        Collective: none; may be called on one rank.
        Sync: none, but one read where iterations were captured into a graph: then it is the newest.
        """
        return self._judge.last_report()

    def state_dict(self) -> dict[str, Any]:
        """Torch's five keys and, under "shardscale", ours; plain numbers. Empty if disabled.

        Collective: none.
        Sync: reads the scale and the trackers.
        """
        if not self._enabled:
            return {}
        return to_state_dict(self._policy, self._state, *self._judge.counts())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state of this class, of torch's or Megatron-Core's; ignored if disabled.

        Must be done on all ranks alike: it also ends a disagreement. Where the ranks have loaded
        different states, :func:`shardscale.checkpoint.reconcile` brings them together.

        Raises:
            StateError: the state is no dictionary, empty, of an unknown layout, of another policy
                or of a newer version.
            KeyError: one of torch's keys is missing; a StateError, too.
            ConfigError: a saved value is not of its kind, or out of range. Whatever is raised,
                nothing was changed; a rank that raises does so alone.

        Collective: none.
        """
        if not self._enabled:
            return
        loaded = from_state_dict(state_dict, self._policy, self._judge.bond.whereabouts())
        self._policy = loaded.policy
        for mine, saved in zip(self._state, loaded.state, strict=True):
            mine.copy_(saved)
        self._judge.forget()
        self._judge.num_updates = loaded.num_updates
        self._judge.ledger.num_skipped = loaded.num_skipped

    def get_scale(self) -> float:
        """The scale, 1.0 if disabled.

        Sync: one read.
        """
        return float(self._state.scale.item())

    def is_enabled(self) -> bool:
        """Whether anything is scaled."""
        return self._enabled

    def __getstate__(self) -> dict[str, Any]:
        if self._judge.stages.entries or self._judge.stages.empty:
            raise StateError(
                "A GradScaler instance may only be pickled at the beginning "
                "of an iteration, or at the end after scaler.update()."
            )
        bond = self._judge.bond
        saved: dict[str, Any] = {
            "arguments": {
                "device": self._device,
                "enabled": self._enabled,
                "fold_clip": self._fold_clip,
                "sync": self._judge.sync,
                "timeout_s": bond.timeout_s,
            },
            # A group belongs to the processes that made it; the whole job can be found again.
            "is_lost": bond.is_lost or bond.names_a_group,
            "state_dict": self.state_dict(),
            "attributes": {k: v for k, v in vars(self).items() if k not in _OWN_ATTRIBUTES},
        }
        if self._enabled:
            saved["arguments"] |= {"policy": self._policy, "init_scale": self.get_scale()}
        return saved

    def __setstate__(self, state: dict[str, Any]) -> None:
        ShardedGradScaler.__init__(self, **state["arguments"])
        self._judge.bond = self._judge.bond.twin()  # a copy is not one of those all ranks make
        self._judge.bond.is_lost = state["is_lost"]
        self.load_state_dict(state["state_dict"])
        vars(self).update(state["attributes"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copied._judge.bond = self._judge.bond.twin()  # in the same process the group is still there
        return copied

    def _place(self, device: torch.device | None = None) -> ScaleState:
        """The state on its device: the current one of that type at first use, then for good."""
        if not self._is_placed:
            target = torch.device(device or self._device)
            if is_capturing(target):
                refuse_capture(self._judge.sync, is_warm=False, has_begun_outside=False)
            self._state = ScaleState(*(t.to(target) for t in self._state))
            self._is_placed = True
        return self._state

    def _ask(self, question: Question) -> Agreement:
        return self._judge.judge(question, self._place(), self._policy)

    def _require_records(self) -> None:
        stages = self._judge.stages
        nothing_checked = not stages.agreements()
        if self._judge.bond.communicator() is None and not stages.empty:
            nothing_checked = not any(entry.has_grads for entry in stages.entries.values())
        if nothing_checked:
            raise StateError(
                "No inf checks were recorded prior to update. "
                "Call step() with every optimizer of the iteration first."
            )


_OWN_ATTRIBUTES = {
    "_device",
    "_enabled",
    "_fold_clip",
    "_is_placed",
    "_judge",
    "_policy",
    "_state",
}
