"""One call from end to end: measure the gradients, agree on them, remember and read the verdict."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from shardscale import kernels, verdict
from shardscale.backward import mistake_inside_backward
from shardscale.capturing import is_capturing
from shardscale.comm import Bond, Communicator
from shardscale.dispute import PATIENCE_S, Dispute, answer
from shardscale.errors import LayoutError, MissingRankError, StageError
from shardscale.examine import (
    Examiner,
    Question,
    divisor_of,
    leave_to_step,
    nothing_found,
    stamp_of,
)
from shardscale.fused import is_fused
from shardscale.layouts import Layouts
from shardscale.ledger import Ledger, Unread, summary
from shardscale.policy import ScalePolicy
from shardscale.records import Agreement, Call, ScaleState, ShardStats, StepReport
from shardscale.replay import Replays, refuse_capture
from shardscale.shards import local_shards, params_of
from shardscale.stages import Stages
from shardscale.stamps import Stamps

__all__ = ["Judge"]


class Judge:
    """Every path to ``optimizer.step`` leads through :meth:`judge`.

    Args:
        bond: The group to agree in.
        sync: Whether the host reads every verdict at once.
    """

    def __init__(self, bond: Bond, sync: bool) -> None:
        self.bond = bond
        self.sync = sync
        self.layouts = Layouts()
        self.replays: Replays | None = None  # on an accelerator, once an iteration is over
        self.wish: Callable[[], bool] = lambda: False  # of this rank, that all ranks stop
        self._policy: ScalePolicy | None = None
        self._policy_text = ""
        self.forget()

    def forget(self) -> None:
        """Begin with no history: a state that all ranks share was just loaded."""
        self.num_updates = 0
        self.stages = Stages()
        self.stamps = Stamps(self.layouts)
        self.ledger = Ledger()
        self._previous: Agreement | None = None
        self._dispute = Dispute()
        self._is_captured: bool | None = None  # this iteration; None: nothing was asked yet
        if self.replays is not None:
            self.replays.forget_()

    @torch.no_grad()  # gradients of a graph that is kept require gradients themselves
    def judge(self, question: Question, state: ScaleState, policy: ScalePolicy) -> Agreement:
        """Make one verdict for all optimizers of a question.

        What this rank alone can find wrong is found first and raised last: it joins the all-reduce
        as a faulted rank, so that all skip and all learn of it.

        Raises:
            Exception: what is wrong on this rank.
            DisagreementError: with ``sync``, what is wrong on another.
            MissingRankError: not all ranks came.
            StageError: the group has been destroyed.

        Collective: every rank of the group must call; sends 2 float64, once. Before that, the ranks
            of a mesh that has Partial gradients sum these.
        """
        captured = self.is_captured(state)
        comm = self.bond.communicator()
        fault: Exception | None = question.mistake
        fault = fault or mistake_inside_backward(question.method, self.stamps.iteration.graph_task)
        stats = nothing_found(state)
        grads: list[list[Tensor]] = []
        try:
            examiner = Examiner(self.layouts, self.stages, self.stamps, self.bond.members())
            # In any case: other ranks of a mesh may be waiting for it.
            examiner.prepare(question.optimizers, self.bond.timeout_s)
            if fault is None:
                # In a graph it would be repeated by each replay; alone there is nobody to be told.
                wishes = not captured and comm is not None and bool(self.wish())
                stats, grads = examiner.measure(question, state)
                stats = stats._replace(wishes=True) if wishes else stats
        except Exception as error:  # noqa: BLE001 - raised again, once this rank has joined
            fault = fault or error
        if fault is not None and (comm is None or captured):
            raise fault
        call = self._call(question, state, policy)
        if captured and call.stamp is not state.scale and not self.stamps.iteration.in_graph:
            raise StageError(
                "this iteration began before an update outside of the graph, and each replay would "
                "divide by the scale of that time. Capture all updates of an iteration together, "
                "or call scale() or begin() before the capture and before each replay."
            )
        if comm is None:
            agreement = verdict.alone(stats)  # not kept: a group made later has not seen its bits
        else:
            agreement = self._agree(stats, call, comm, fault)
            self._previous = agreement
            if self.replays is not None and self.replays.has_captured:
                self._previous = self.replays.remember_(agreement)
        self.stages.num_calls += 1
        self._is_captured = captured
        if not captured:
            self.ledger.note(Unread(agreement, call, fault))
        if fault is not None:
            self._tell_fault(question, Unread(agreement, call, fault))
            raise fault
        self._remember(question, agreement, call, list(map(bool, grads)))
        if not captured:
            self._look_for_two_scales(question.optimizers, state)
        if self.sync:
            self.read(agreement, call)
        if question.max_norm is not None:
            # Exactly 1 on a skip, which leaves every bit alone.
            factor = verdict.clip_coefficient(agreement, question.max_norm)
            for optimizer, group in zip(question.optimizers, grads, strict=True):
                rest = factor
                if question.leaves_scaled(optimizer):
                    rest = leave_to_step(self.stages.of(optimizer), self.stamps, state, factor)
                kernels.scale_(group, rest)
        return agreement

    @torch.no_grad()
    def unscale_locally_(self, optimizer: Any, state: ScaleState) -> None:
        """Unscale and clip gradients that were judged but left as they were; nothing is sent."""
        entry = self.stages.of(optimizer)
        inv_scale = kernels.inverse_scale(divisor_of(entry, self.stamps, state))
        grads = local_shards(optimizer, self.layouts.name_of).grads
        kernels.unscale_(grads, inv_scale, torch.zeros_like(inv_scale))  # judged they are already
        entry.is_unscaled, entry.divisor = True, None

    def read(self, agreement: Agreement, call: Call) -> bool:
        """Whether the step must be skipped.

        Raises:
            DisagreementError: the ranks did not belong together in that verdict; names them.

        Collective: only where the ranks disagree, which all of them read alike.
        Sync: one read per verdict.
        """
        unread = self.ledger.find(agreement) or Unread(agreement, call, None)
        flags = self.ledger.read(agreement)
        if flags.drifted or flags.faulted:
            raise self._error_of(unread)
        return flags.found

    def read_all(self) -> None:
        """Read every verdict of the iteration, so that none keeps a disagreement to itself.

        Raises:
            DisagreementError: the ranks did not belong together in one of them; names them.

        Collective: only where the ranks disagree.
        Sync: one read per verdict.
        """
        for agreement, call in self.stages.agreements():
            self.read(agreement, call)

    def read_late(self, floor: float | None) -> None:
        """Read what the iteration before left unread.

        Raises:
            Exception: what was wrong on this rank.
            DisagreementError: the ranks did not belong together in it; names them.

        Collective: only where the ranks disagree.
        """
        disagreed = self.ledger.open(floor)
        if disagreed:
            error = self._error_of(disagreed[0])  # entered by a faulted rank, too
            raise disagreed[0].fault or error

    def settle(self) -> None:
        """Forget an iteration that no update will close."""
        self.stages.clear()
        self.ledger.drop()

    def mark_stepped(self, optimizers: Sequence[Any]) -> None:
        """These optimizers have consumed their gradients."""
        self.stages.mark_stepped(optimizers)
        self.stamps.mark_stepped(optimizers)

    def close(
        self,
        agreements: Sequence[tuple[Agreement, Call]],
        state: ScaleState,
        next_scale: Tensor,
        floor: float | None,
    ) -> None:
        """Close the iteration; the state is about to take over ``next_scale``, () float32.

        Args:
            agreements: The iteration's verdicts.
            state: As it still is.
            next_scale: What the scale will be.
            floor: The smallest scale of the policy, if it has one.

        Sync: none.
        """
        captured = self.is_captured(state)
        stages = self.stages
        for optimizer in stages.left_to_divide():  # the next iteration knows nothing of this clip
            # One rank alone must not raise here. Where gradients have gone bad since their verdict,
            # the next one meets them, and tells all ranks.
            with contextlib.suppress(LayoutError):
                self.unscale_locally_(optimizer, state)
        self.stamps.close(state.scale, stages.left_unscaled(), stages.num_unused_empty, captured)
        if self.replays is not None and self.replays.has_captured and agreements:
            found_inf, norm = summary(agreements)
            self.replays.close_(captured, found_inf, state.scale, next_scale, norm)
        if not captured:
            self.ledger.turn(self.num_updates, state.scale, next_scale, agreements, floor)
            self.num_updates += 1
            if self.replays is None and not state.scale.is_cpu:
                self.replays = Replays(state.scale.device)
        self.stages.clear()
        self._is_captured = None

    def is_captured(self, state: ScaleState) -> bool:
        """Whether this call becomes part of a graph; an iteration is in one as a whole, or not.

        Raises:
            StageError: it cannot be captured, or only a part of its iteration was.
        """
        captured = not state.scale.is_cpu and is_capturing(state.scale.device)
        if captured:
            is_alone = self.bond.communicator() is None
            is_warm = self.replays is not None and (is_alone or self._previous is not None)
            refuse_capture(self.sync, is_warm, has_begun_outside=self._is_captured is False)
            assert self.replays is not None
            self.replays.begin(self._previous)
        elif self._is_captured:
            raise StageError(
                "a verdict of this iteration was captured into a graph, and the calls that belong "
                "to it come outside. Capture unscale_, clip_grad_norm_, step and update together; "
                "after a capture that failed, load a state_dict to begin anew."
            )
        return captured

    def counts(self) -> tuple[int, int]:
        """How many updates were made, and how many of them skipped, replays included.

        Sync: reads the counters of replays, and what was sent to the host an iteration ago.
        """
        if self.replays is None:
            return self.num_updates, self.ledger.num_skipped
        updates, skipped = self.replays.counts()
        return self.num_updates + updates, self.ledger.num_skipped + skipped

    def last_report(self) -> StepReport | None:
        """The newest iteration that the host knows all about.

        Sync: one read where a graph was captured.
        """
        if self.replays is None or not self.replays.has_captured:
            return self.ledger.last_report
        return self.replays.report(self.num_updates) or self.ledger.last_report

    def _agree(
        self, stats: ShardStats, call: Call, comm: Communicator, fault: Exception | None
    ) -> Agreement:
        if fault is not None:
            comm = self.bond.impatient()
        try:
            return verdict.agree(stats, call, comm, self._previous, fault is not None)
        except MissingRankError as missing:
            if fault is not None:
                # They may have met this rank's fault in a sum of Partial gradients already.
                answer(call, fault, self.bond.communicator(), PATIENCE_S)
                raise fault from missing
            # The others may be missing because they have read a disagreement that this rank, with
            # other optimizers, has not: then that is what there is to tell.
            for unread in () if self.bond.is_aborted else self.ledger.unread():
                if unread.agreement.apart.any():
                    raise self._error_of(unread) from missing
            raise

    def _call(self, question: Question, state: ScaleState, policy: ScalePolicy) -> Call:
        return Call(
            self.num_updates,
            question.method,
            self.stages.num_calls,
            self.bond.ordinal,
            question.max_norm,
            self._text_of(policy),
            state,
            stamp_of(question.optimizers, self.stages, self.stamps, state),
            self.replays.num_updates if self.replays and self.replays.has_captured else None,
        )

    def _text_of(self, policy: ScalePolicy) -> str:
        if policy is not self._policy:
            self._policy, self._policy_text = policy, repr(policy)
        return self._policy_text

    def _remember(
        self, question: Question, agreement: Agreement, call: Call, has_grads: list[bool]
    ) -> None:
        if not question.optimizers:
            self.stages.empty.append((agreement, call))
            self.stages.num_unused_empty += question.method != "step"
            iteration = self.stamps.iteration
            iteration.num_unscaled_empty = max(0, iteration.num_unscaled_empty - 1)
        for optimizer, has_some in zip(question.optimizers, has_grads, strict=True):
            entry = self.stages.of(optimizer)
            entry.agreement, entry.call, entry.has_grads = agreement, call, has_some
            entry.iteration = self.stamps.iteration
            if not question.leaves_scaled(optimizer):
                entry.is_unscaled = True
            if question.method != "step":
                entry.stage = OptState.UNSCALED

    def _look_for_two_scales(self, optimizers: Sequence[Any], state: ScaleState) -> None:
        for optimizer in optimizers:
            made_with = self.stamps.made_before(optimizer)
            if made_with is not None:
                first = next(p for p in params_of(optimizer) if p.grad is not None)
                name = f"{type(optimizer).__name__} (of {self.layouts.name_of(first)})"
                self.ledger.suspect(name, made_with, self.stamps.of([optimizer], state.scale))

    def _tell_fault(self, question: Question, unread: Unread) -> None:
        """Let the others know what this rank is about to raise, unless all raise alike."""
        agreement, call, fault = unread
        assert fault is not None
        others_differ = agreement.faulted.item() > 0
        if others_differ or not isinstance(fault, StageError):
            # The others took this as a bad verdict of the iteration, so this rank must, too.
            self.stages.empty.append((agreement, call))
        if not others_differ:
            self.ledger.read(agreement)
            return
        # Those that read it at once come to hear of it now. Those that read it late do so at their
        # next update, and may first wait for this rank in a collective of the model.
        is_late = bool(question.optimizers) and all(map(is_fused, question.optimizers))
        patience_s = 0.0
        if self.sync or not is_late:
            self.ledger.read(agreement)
            patience_s = PATIENCE_S
        self._dispute.tell(unread, self.bond.communicator(), patience_s)

    def _error_of(self, unread: Unread) -> Exception:
        return self._dispute.error_of(unread, self.bond.communicator())
