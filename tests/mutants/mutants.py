"""The defects that the tests must catch, as data: what to replace by what, and who must notice."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MUTANTS", "Mutant"]


class Mutant(NamedTuple):
    """One defect. ``old`` occurs once in ``file``; each test of ``caught_by`` must fail on it."""

    name: str
    file: str
    old: str
    new: str
    caught_by: tuple[str, ...]


_VERDICT = "tests/unit/test_verdict.py"
_DISAGREE = "tests/ranks/test_disagreement.py"
_SKIP = "tests/ranks/test_skip_together.py"
_TORCH = "tests/ranks/test_torch_defects.py"
_STATE = "tests/unit/test_round_trip.py"
_VALUES = "tests/unit/test_saved_values.py"
_NO_VALUE = f"{_VALUES}::test_a_value_that_cannot_be_meant_is_refused_by_name_and_changes_nothing"
_RESUME = "tests/conformance/test_resumed_jobs.py"
_RESUMED = f"{_RESUME}::test_a_job_saved_with_dcp_goes_on_bit_for_bit"
_RECONCILE = (
    "tests/ranks/test_reconcile.py"
    "::test_states_that_differ_at_load_are_told_at_the_first_verdict_and_reconciled"
)
_JOIN = "tests/ranks/test_join_then_raise.py"
_WITHHELD = "tests/ranks/test_withheld.py"
_TOO_EARLY = f"{_WITHHELD}::test_a_call_before_the_last_micro_batch_is_an_error_on_every_rank"
_CLIP = "tests/ranks/test_clipping.py"
_LAYOUT = "tests/ranks/test_every_layout.py"
_NORM = f"{_LAYOUT}::test_the_norm_is_that_of_one_process_holding_the_whole_model"
_TRAIN = f"{_LAYOUT}::test_training_equals_one_process_bit_for_bit_and_skips_together"
_BAD = "tests/ranks/test_bad_layouts.py"
_JOB = "tests/conformance/test_whole_job_in_threads.py"
_SHARDS = "tests/unit/test_shards.py"
_STAMPS = "tests/unit/test_stamps.py"
_GATE = "tests/unit/test_gate.py"
_REPLAY = "tests/unit/test_replay.py"
_CAPTURE = "tests/ranks/test_capture.py"
_ORDER = "tests/ranks/test_wrong_order.py"
_LATE = "tests/ranks/test_late_reading.py"
_POLICY = "tests/unit/test_policy.py"
_COMM = "tests/unit/test_comm.py"
_MISSING = "tests/ranks/test_missing_rank.py"
_HANGS = "tests/ranks/test_late_verdicts.py"
_ROLL = "tests/unit/test_roll_call.py"
_MONITOR = "tests/unit/test_monitor.py"
_MANY = "tests/ranks/test_very_many_ranks.py::test_every_rank_reads_the_one_right_verdict"
_SUMS = "tests/unit/test_message_arithmetic.py"
_COMPILE = "tests/compile/test_one_process.py"
_DEVICES = "tests/ranks/test_devices.py"
_FOLD = "tests/ranks/test_fold_clip.py"
_NATIVE = "tests/unit/test_native.py"
_PLAIN = "tests/cluster/test_plain_processes.py"
_LOGS = "tests/cluster/test_logs.py"
_BROKEN = "tests/cluster/test_broken_scalers.py::test_local_verdicts_do_not_pass_the_checker"
_GRID = "tests/kernels/grid.py"
_BITS = f"{_GRID}::test_unscale_gives_torchs_bits_and_the_references_flag"
_NORMS = f"{_GRID}::test_the_sum_of_squares_is_the_float64_formulas"
_TABLE = "tests/kernels/test_table.py"
_STOP = "tests/ranks/test_stopping_together.py"
_STOPPED = f"{_STOP}::test_all_ranks_stop_at_the_same_step_and_train_as_without_a_wish"
_SIGNAL = "tests/unit/test_preemption.py"
_LEDGER = "tests/unit/test_ledger.py"
_EXPORTS = "tests/repo/test_exports.py"
_DOCTOR = "tests/doctor/test_on_ranks.py"
_JUDGING = "tests/doctor/test_judging.py"

_ENV = "tests/unit/test_env.py"
_INNERMOST = f"{_ENV}::test_the_innermost_launcher_says_who_this_is"
_REFUSED = f"{_ENV}::test_a_bad_environment_is_refused_by_variable_value_and_cure"
_NODES = "tests/unit/test_nodelist.py"
_SOCKETS = "tests/unit/test_sockets.py"
_LIVES = "tests/unit/test_incarnation.py"
_BRING_UP = "tests/ranks/test_bring_up.py"
_MPI = "tests/cluster/test_mpi.py"
_OVER_MPI = f"{_MPI}::test_mpi_keeps_the_contract[mpich-2]"
_BATCH = "tests/launch/test_batch_scripts.py"
_SBATCH = "tests/launch/test_sbatch.py"
_SAVED = "tests/launch/test_checkpoints.py"

MUTANTS = [
    Mutant(
        "the verdict is local",
        "shardscale/verdict.py",
        """\
    comm.all_reduce_sum_(message)
    return unpack(message, stats.sum_squares is not None, comm.size, previous)
""",
        """\
    return alone(stats, previous)
""",
        (
            f"{_VERDICT}::test_all_ranks_read_the_same_bits_over_a_real_exchange",
            f"{_SKIP}::test_all_ranks_skip_when_any_overflows[AdamW-2]",
            "tests/ranks/test_accumulation.py"
            "::test_an_overflow_that_no_collective_of_the_model_has_spread_is_skipped_by_all",
            f"{_PLAIN}::test_the_others_raise_in_time_and_share_one_history",
            f"{_PLAIN}::test_all_ranks_go_on_alike[nan]",
        ),
    ),
    Mutant(
        "the message is packed and read, but never reduced",
        "shardscale/verdict.py",
        "    comm.all_reduce_sum_(message)\n",
        "",
        (
            f"{_VERDICT}::test_all_ranks_read_the_same_bits_over_a_real_exchange",
            f"{_SKIP}::test_no_gradient_on_any_rank_is_a_good_step",
        ),
    ),
    Mutant(
        "found_inf is the number of bad ranks",
        "shardscale/verdict.py",
        "flags = torch.tensor([found, drifted, faulted, wished]",
        "flags = torch.tensor([counts or found, drifted, faulted, wished]",
        (
            f"{_VERDICT}::test_found_inf_is_exactly_one_if_any_rank_is_bad_and_zero_otherwise[all-2]",
            f"{_TORCH}::test_f2_inf_on_every_rank_is_one_inf_to_a_fused_sgd[ours]",
        ),
    ),
    Mutant(
        "found_inf is the number of bad ranks, read on a device",
        "shardscale/verdict.py",
        "torch.stack([found, drifted, faulted, wished])",
        "torch.stack([torch.where(counts > 0, counts, found), drifted, faulted, wished])",
        (f"{_VERDICT}::test_the_message_reads_alike_on_host_and_device",),
    ),
    Mutant(
        "fused optimizers step on this rank's own findings",
        "shardscale/judge.py",
        "        if comm is None:\n            agreement",
        """\
        if comm is None or (all(map(question.leaves_scaled, question.optimizers))):
            agreement""",
        (
            f"{_TORCH}::test_f1_fused_optimizers_skip_together[ours]",
            f"{_SKIP}::test_all_ranks_skip_when_any_overflows[AdamW-2]",
        ),
    ),
    Mutant(
        "each rank compares the fingerprint of rank 0 with its own",
        "shardscale/verdict.py",
        """\
    message = pack(stats, call, comm.rank, comm.size, previous, faulted)
    if hasattr(comm, "step_under_way"):
        comm.step_under_way = call.num_updates
    comm.all_reduce_sum_(message)
""",
        """\
    term = fingerprint(call, previous) * units_of(comm.size).call
    message = _message(stats, math.nan if faulted else term * (comm.rank == 0))
    comm.all_reduce_sum_(message)
    message[0] -= term
""",
        (f"{_VERDICT}::test_a_different_max_norm_is_found_on_every_rank",),
    ),
    Mutant(
        "all weights are one",
        "shardscale/verdict.py",
        "    term = weight(call.num_updates, rank, size) * ",
        "    term = ",
        (
            f"{_VERDICT}::test_found_inf_is_exactly_one_if_any_rank_is_bad_and_zero_otherwise[none-2]",
        ),
    ),
    Mutant(
        "a call-order mistake is raised before this rank has joined",
        "shardscale/judge.py",
        "        fault: Exception | None = question.mistake\n",
        """\
        fault: Exception | None = None
        if question.mistake is not None:
            raise question.mistake
""",
        (
            f"{_DISAGREE}::test_a_mistake_on_one_rank_is_raised_on_all_and_its_own_error_there[False]",
        ),
    ),
    Mutant(
        "a gradient that cannot be judged is raised before this rank has joined",
        "shardscale/judge.py",
        "        except Exception as error:  # noqa",
        "        except LookupError as error:  # noqa",
        (f"{_JOIN}::test_where_the_host_reads_the_verdict_all_ranks_raise_at_that_step",),
    ),
    Mutant(
        "the call's ordinal is left out of the message",
        "shardscale/verdict.py",
        "(call.num_updates, call.method, call.ordinal, call.scaler,",
        "(call.num_updates, call.method, call.scaler,",
        (
            f"{_VERDICT}::test_a_rank_whose_call_differs_is_seen_by_all_from_the_words_alone"
            "[3-odd1-ordinal]",
        ),
    ),
    Mutant(
        "a skip is clipped",
        "shardscale/verdict.py",
        "    return torch.where(agreement.found_inf > 0, 1.0, factor).float()\n",
        "    return factor.float()\n",
        (
            f"{_VERDICT}::test_a_norm_that_is_not_finite_counts_as_found_and_comes_back_as_it_is[inf]",
            f"{_CLIP}::test_a_norm_that_is_not_finite_is_returned_and_clips_nothing[inf-FSDP2]",
        ),
    ),
    Mutant(
        "a NaN is let through",
        "shardscale/kernels/foreach.py",
        """\
            _amp_op_(group, found_inf, inv_scale)
            # On the host""",
        """\
            torch._foreach_mul_(group, inv_scale)
            for g in group:
                found_inf.copy_(torch.maximum(found_inf, g.isinf().any()))
            # On the host""",
        (
            "tests/unit/test_kernels.py"
            "::test_unscale_gives_the_bits_and_the_flag_of_the_reference_and_touches_nothing_else",
        ),
    ),
    Mutant(
        "a NaN is let through by the kernels in C",
        "shardscale/kernels/native/work.c",
        "            *found |= pass.results[unit].largest >= infinity[tensors[t].dtype];\n",
        "            *found |= pass.results[unit].largest == infinity[tensors[t].dtype];\n",
        (
            f"{_SKIP}::test_all_ranks_skip_when_any_overflows[own step-2]",
            f"{_SKIP}::test_all_ranks_skip_when_any_overflows[Adam-2]",
        ),
    ),
    Mutant(
        "the gradients of a fused optimizer are not checked for NaN",
        "shardscale/kernels/foreach.py",
        "            _amp_op_(group, found_inf, torch.ones_like(inv_scale))",
        "            [found_inf.copy_(torch.maximum(found_inf, g.isinf().any())) for g in group]",
        ("tests/unit/test_kernels.py::test_check_finds_what_unscale_finds_and_leaves_every_bit",),
    ),
    Mutant(
        "the scale grows one step late",
        "shardscale/policy/dynamic.py",
        "due = clean_steps >= self.growth_interval",
        "due = clean_steps > self.growth_interval",
        ("tests/repo/test_docs.py::test_examples_in_docstrings_run[shardscale.policy.dynamic]",),
    ),
    Mutant(
        "loading a state forgets the growth tracker",
        "shardscale/saved_state.py",
        "        state._replace(growth_tracker=tracker),\n",
        "        state,\n",
        (f"{_STATE}::test_the_good_steps_since_the_last_change_come_back", f"{_RESUMED}[False]"),
    ),
    Mutant(
        "loading a state forgets the bad steps still tolerated",
        "shardscale/saved_state.py",
        '    if "hysteresis_tracker" in ours:\n',
        '    if "hysteresis_tracker" not in ours:\n',
        (f"{_STATE}::test_the_bad_steps_still_tolerated_come_back", f"{_RESUMED}[True]"),
    ),
    Mutant(
        "loading a state forgets how many steps were skipped",
        "shardscale/saved_state.py",
        '        ours.get("num_skipped", 0),\n',
        "        0,\n",
        (f"{_STATE}::test_the_counts_come_back", f"{_RESUMED}[False]"),
    ),
    Mutant(
        "what is ours in a state is a dictionary",
        "shardscale/saved_state.py",
        "int(state.growth_tracker.item()), tuple(ours.items())",
        "int(state.growth_tracker.item()), ours",
        (f"{_RESUME}::test_a_state_that_does_not_fit_is_refused_on_every_rank_in_our_words",),
    ),
    Mutant(
        "the bad steps that Megatron still tolerates are dropped",
        "shardscale/saved_state.py",
        '(("hysteresis_tracker", tolerated),)',
        "()",
        ("tests/unit/test_saved_state.py::test_megatrons_state_goes_on_as_megatron_would[0-1]",),
    ),
    Mutant(
        "a saved count may be negative",
        "shardscale/saved_values.py",
        "LARGE_COUNT = whole(0, 2**53)",
        "LARGE_COUNT = whole(-9, 2**53)",
        (f"{_NO_VALUE}[num_updates-0]", f"{_NO_VALUE}[num_skipped-0]"),
    ),
    Mutant(
        "a saved scale may be a truth value",
        "shardscale/saved_values.py",
        "return isinstance(value, int) and not isinstance(value, bool)",
        "return isinstance(value, int)",
        (f"{_NO_VALUE}[scale-6]", f"{_NO_VALUE}[_growth_tracker-3]"),
    ),
    Mutant(
        "NumPy's scalars are no numbers in a saved state",
        "shardscale/saved_values.py",
        "isinstance(value, np.ndarray | np.generic)",
        "isinstance(value, np.ndarray)",
        (f"{_VALUES}::test_numbers_of_numpy_and_of_torch_are_taken_for_plain_ones",),
    ),
    Mutant(
        "a saved state may tolerate more bad steps than its policy",
        "shardscale/saved_state.py",
        'most = getattr(policy, "hysteresis", 2**31 - 1)',
        "most = 2**31 - 1",
        (f"{_NO_VALUE}[hysteresis_tracker-4]",),
    ),
    Mutant(
        "a refused state ends what the scaler remembers",
        "shardscale/scaler.py",
        "        loaded = from_state_dict(",
        "        self._judge.forget()\n        loaded = from_state_dict(",
        (
            f"{_NO_VALUE}[scale-0]",
            f"{_VALUES}::test_anything_loads_or_is_refused_with_nothing_moved",
        ),
    ),
    Mutant(
        "a refused state does not say on which rank",
        "shardscale/saved_state.py",
        "        if where:  #",
        "        if not where:  #",
        (f"{_VALUES}::test_an_error_says_which_rank_of_a_group_it_is_about",),
    ),
    Mutant(
        "a refused state binds the scaler to a group",
        "shardscale/comm/bond.py",
        "        comm = self._timed or self._joined\n        if comm is not None:\n",
        "        comm = self.communicator()\n        if comm is not None:\n",
        (f"{_VALUES}::test_an_error_binds_the_scaler_to_no_group",),
    ),
    Mutant(
        "ranks that tolerate different numbers of bad steps are taken for alike",
        "shardscale/verdict.py",
        "for number in (call.state.growth_tracker, call.state.hysteresis_tracker):",
        "for number in (call.state.growth_tracker,):",
        (f"{_RECONCILE}[middle of three]",),
    ),
    Mutant(
        "reconciled ranks take the largest scale",
        "shardscale/checkpoint.py",
        "chosen = min(holdings",
        "chosen = max(holdings",
        (
            f"{_RECONCILE}[two of four alike]",
            "tests/unit/test_reconcile.py"
            "::test_the_smallest_scale_is_taken_and_of_equals_the_lowest_ranks[scales0-trackers0-taken0]",
        ),
    ),
    Mutant(
        "ranks whose states are equal are left with the verdicts that each remembers",
        "shardscale/checkpoint.py",
        "    scaler.load_state_dict(holdings[chosen].state)\n",
        "    if differing:\n        scaler.load_state_dict(holdings[chosen].state)\n",
        ("tests/ranks/test_reconcile.py::test_reconciled_ranks_agree_at_their_first_verdict",),
    ),
    Mutant(
        "ranks reconcile without the one that does not come",
        "shardscale/checkpoint.py",
        "    if missing:\n",
        "    if len(missing) == comm.size:\n",
        (
            "tests/ranks/test_reconcile.py::test_a_rank_that_does_not_come_is_named_and_nothing_is_changed",
        ),
    ),
    Mutant(
        "a save that never ended is a checkpoint",
        "launch/checkpoints.py",
        "_NAME.fullmatch(name)",
        "_NAME.match(name)",
        (
            f"{_SAVED}::test_a_job_killed_while_it_saves_goes_on_from_the_checkpoint_before[writing]",
        ),
    ),
    Mutant(
        "what only has the name of a checkpoint is loaded",
        "launch/checkpoints.py",
        "        if found.is_complete():\n            return found\n",
        "        return found\n",
        (f"{_SAVED}::test_what_has_the_name_of_a_checkpoint_but_is_none_is_passed_over_and_named",),
    ),
    Mutant(
        "a folder that cannot be read has no checkpoints",
        "launch/checkpoints.py",
        "except FileNotFoundError:\n        return []",
        "except OSError:\n        return []",
        (f"{_SAVED}::test_a_folder_that_cannot_be_read_is_not_one_without_checkpoints",),
    ),
    Mutant(
        "a step saved again takes the place of the one before",
        "launch/checkpoints.py",
        "    taken = [found.again for found in _named(partial.parent) if found.step == step]\n",
        """\
    taken: list[int] = []
    for found in _named(partial.parent):
        if found.step == step:
            shutil.rmtree(found.path)
""",
        (
            f"{_SAVED}::test_a_step_that_is_saved_again_is_there_wherever_the_job_is_killed"
            "[both there]",
        ),
    ),
    Mutant(
        "a step lower than the newest is saved in vain",
        "launch/checkpoints.py",
        "if newest and newest.step > step:",
        "if False and newest:",
        (f"{_SAVED}::test_what_would_be_saved_in_vain_is_an_error_on_every_rank[a lower step]",),
    ),
    Mutant(
        "fewer steps than the checkpoint has are none",
        "launch/train.py",
        "if num_done > steps:",
        "if num_done > steps + 1:",
        (
            "tests/launch/test_train.py"
            "::test_fewer_steps_than_the_checkpoint_has_are_refused_on_every_rank",
        ),
    ),
    Mutant(
        "a run that goes on claims the overflow of the run before",
        "shardscale/demo/table.py",
        "    if result.overflowed is None:\n",
        "    if result.overflowed is None and not result.ticks:\n",
        (
            "tests/launch/test_train.py"
            "::test_a_rank_that_is_told_to_stop_saves_and_the_next_one_goes_on",
        ),
    ),
    Mutant(
        "step unscales what unscale_ has unscaled",
        "shardscale/judge.py",
        """\
            if not question.leaves_scaled(optimizer):
                entry.is_unscaled = True
""",
        """\
            if question.method == "step" and not question.leaves_scaled(optimizer):
                entry.is_unscaled = True
""",
        (f"{_SKIP}::test_all_ranks_skip_when_any_overflows[AdamW-2]",),
    ),
    Mutant(
        "clip_grad_norm_ unscales what unscale_ has unscaled",
        "shardscale/examine.py",
        "    if entry.is_unscaled:\n        return torch.ones_like(state.scale)\n",
        "",
        (f"{_NORM}[DDP-2]",),
    ),
    Mutant(
        "a rank without an optimizer does not join",
        "shardscale/stages.py",
        "        if self.num_unused_empty == 0:\n            return True\n",
        "        if self.num_unused_empty == 0:\n            return False\n",
        (f"{_SKIP}::test_ranks_with_nothing_to_judge_join_and_agree[True]",),
    ),
    Mutant(
        "a gradient of two optimizers goes unnoticed where they are judged one by one",
        "shardscale/stages.py",
        "if e.iteration is iteration), *optimizers]",
        "if e.iteration is not iteration), *optimizers]",
        (
            "tests/conformance/test_unscale.py::test_a_gradient_of_two_optimizers_is_refused"
            "[False-unscale_]",
        ),
    ),
    Mutant(
        "step reads only its own optimizers' verdicts",
        "shardscale/obey.py",
        "            self._judge.read_all()\n",
        "",
        (f"{_JOB}::test_trouble_in_one_call_stops_the_optimizer_of_another[layout-loop_sgd]",),
    ),
    Mutant(
        "a fused step knows only its own optimizers' verdicts",
        "shardscale/obey.py",
        "if all(agreement is not own for own, _ in found):",
        "if False:",
        (f"{_JOB}::test_trouble_in_one_call_stops_the_optimizer_of_another[layout-fused_sgd]",),
    ),
    Mutant(
        "a mistake of all ranks is taken for a mistake of some",
        "shardscale/verdict.py",
        "faulted = stopped and sum_squares != -size",
        "faulted = stopped",
        (f"{_JOB}::test_a_mistake_that_all_ranks_share_leaves_their_earlier_verdicts_standing",),
    ),
    Mutant(
        "a disabled scaler does not read its verdicts",
        "shardscale/scaler.py",
        "Judge(bond, sync or not self._enabled)",
        "Judge(bond, sync)",
        (f"{_JOB}::test_a_disabled_scaler_that_clips_raises_where_the_ranks_disagree",),
    ),
    Mutant(
        "only the last late verdict is told of",
        "shardscale/ledger.py",
        "for u in self._unread.values()]",
        "for u in list(self._unread.values())[-1:]]",
        (f"{_JOB}::test_the_late_error_names_the_verdict_that_drifted_whichever_it_was[first]",),
    ),
    Mutant(
        "a copy decides alone",
        "shardscale/scaler.py",
        "        copied._judge.bond = self._judge.bond.twin()",
        "        copied._judge.bond = Bond()",
        (f"{_JOB}::test_a_copy_in_the_same_process_agrees_in_the_same_group",),
    ),
    Mutant(
        "a flag has torch's default dtype",
        "shardscale/kernels/dispatch.py",
        "flag = torch.zeros((), dtype=torch.float32, device=device)",
        "flag = torch.zeros((), device=device)",
        (f"{_DEVICES}::test_what_is_found_on_one_device_counts_where_no_norm_would_tell",),
    ),
    Mutant(
        "who never begins is unscaled by the first scale",
        "shardscale/stamps.py",
        "        if not iteration.has_begun:\n            return\n",
        "",
        (f"{_STAMPS}::test_who_never_begins_is_unscaled_by_the_newest_scale",),
    ),
    Mutant(
        "a rank's stamp is its own affair",
        "shardscale/verdict.py",
        "    for number in (call.stamp, call.state.scale):\n",
        "    for number in (call.state.scale, call.state.scale):\n",
        (f"{_DISAGREE}::test_a_rank_without_a_loss_that_forgets_to_begin_is_a_disagreement",),
    ),
    Mutant(
        "an update forgets which gradients are unscaled",
        "shardscale/judge.py",
        "(state.scale, stages.left_unscaled(), stages.num_unused_empty, captured)",
        "(state.scale, (), stages.num_unused_empty, captured)",
        (
            f"{_STAMPS}::test_an_update_in_between_does_not_make_unscaled_gradients_scaled_again",
            f"{_STAMPS}::test_a_joint_verdict_of_the_other_optimizer_stays_bad_across_the_update",
        ),
    ),
    Mutant(
        "gradients made after an update are taken for unscaled ones",
        "shardscale/examine.py",
        "            since = earlier.made_since(params_of(optimizer)) if earlier else ()\n",
        "            since = ()\n",
        (
            f"{_STAMPS}::test_gradients_made_since_then_are_scaled_ones[by hand-False]",
            f"{_STAMPS}::test_of_one_optimizer_each_gradient_is_unscaled_once[True]",
        ),
    ),
    Mutant(
        "gradients set to zero in place are taken for old ones",
        "shardscale/stamps.py",
        "torch.where(_any_nonzero(params, newest), before, newest)",
        "before",
        (f"{_STAMPS}::test_gradients_that_were_zeroed_carry_no_scale[False-False]",),
    ),
    Mutant(
        "a late flag is dropped",
        "shardscale/judge.py",
        "        if disagreed:\n",
        "        if disagreed and self.sync:\n",
        (
            f"{_DISAGREE}::test_where_it_does_not_all_raise_at_the_next_update_and_nothing_moved",
            f"{_LATE}::test_a_verdict_nobody_read_surfaces_at_the_next_update_of_every_rank",
        ),
    ),
    Mutant(
        "two scalers share one ordinal",
        "shardscale/comm/bond.py",
        "        return next(self._of.setdefault(group, itertools.count(self._first)))",
        "        return self._first",
        (f"{_ORDER}::test_two_scalers_whose_calls_interleave_differently_disagree",),
    ),
    Mutant(
        "a gated optimizer's state is not put back",
        "shardscale/gate.py",
        "    for param, key, value in copies:\n        now",
        "    for param, key, value in [c for c in copies if not c.key]:\n        now",
        (f"{_GATE}::test_a_gated_optimizer_ends_where_one_ends_that_the_host_skips",),
    ),
    Mutant(
        "state made by a skipped first step is kept",
        "shardscale/gate.py",
        "        if fresh and found_inf.item():\n",
        "        if fresh and not found_inf.item() > -1:\n",
        (
            f"{_GATE}::test_a_gated_optimizer_ends_where_one_ends_that_the_host_skips"
            "[as on a device-Adam, foreach-{0}]",
        ),
    ),
    Mutant(
        "an optimizer may run inside backward",
        "shardscale/judge.py",
        "        fault = fault or mistake_inside_backward(question.method, ",
        "        fault = fault or (lambda *_: None)(question.method, ",
        (f"{_ORDER}::test_a_step_inside_backward_is_refused_with_the_reason",),
    ),
    Mutant(
        "the compiler traces the bookkeeping",
        "shardscale/untraced.py",
        "setattr(marked, name, _disable_dynamo(getattr(marked, name)))",
        "setattr(marked, name, getattr(marked, name))",
        (
            f"{_COMPILE}::test_a_step_breaks_less_often_than_with_torchs_scaler_and_is_compiled_once"
            "[step-loop SGD]",
        ),
    ),
    Mutant(
        "a compiled scale is a constant of its graph",
        "shardscale/outputs.py",
        "    return _wide(output) * scale.to(output.device, non_blocking=not output.is_cpu)\n",
        """\
    if torch.compiler.is_compiling():
        return _wide(output) * 16.0
    return _wide(output) * scale.to(output.device, non_blocking=not output.is_cpu)
""",
        (f"{_COMPILE}::test_forward_loss_and_scale_are_one_graph_that_reads_the_scale",),
    ),
    Mutant(
        "a compiled scale begins no iteration",
        "shardscale/scaler.py",
        "            self._judge.stamps.open()  #",
        "            pass  #",
        (f"{_COMPILE}::test_gradients_of_a_compiled_scale_keep_its_stamp_across_an_update",),
    ),
    Mutant(
        "a compiled iteration is numbered",
        "shardscale/stamps.py",
        "        self.iteration = Iteration(has_begun=True)\n",
        """\
        self.iteration = Iteration(has_begun=True)
        self.num = getattr(self, "num", 0) + 1
""",
        (
            f"{_COMPILE}::test_a_step_breaks_less_often_than_with_torchs_scaler_and_is_compiled_once"
            "[step-loop SGD]",
        ),
    ),
    Mutant(
        "every rank counts what it holds",
        "shardscale/layouts.py",
        "        return known.is_owner\n",
        "        return True\n",
        (f"{_NORM}[DDP-2]", f"{_NORM}[HSDP-4]"),
    ),
    Mutant(
        "rank 0 alone counts what it holds",
        "shardscale/layouts.py",
        "_holders(known, param, members).owner == members.here",
        "members.here == 0",
        (f"{_NORM}[FSDP2-2]", f"{_NORM}[TP-2]"),
    ),
    Mutant(
        "the first of two replicated mesh axes is counted twice",
        "shardscale/holders.py",
        "slice(None) if placement.is_replicate() else at",
        "slice(None) if placement.is_replicate() and placements[-1].is_replicate() else at",
        (f"{_NORM}[HSDP-4]",),
    ),
    Mutant(
        "copies of copies are counted by the first of each",
        "shardscale/owners.py",
        "return Holders(text, holders[0] if members.here == copies[0] else None)",
        "return Holders(text, members.here if members.here == copies[0] else None)",
        (f"{_NORM}[DDP and hand-sharded TP-4]",),
    ),
    Mutant(
        "a Partial gradient is taken as reduced",
        "shardscale/placements.py",
        "        message = torch.cat(pieces)\n        comm.all_reduce_sum_(message)\n",
        "        message = torch.cat(pieces)\n",
        (f"{_NORM}[TP sequence-2]", f"{_TRAIN}[TP sequence-2]"),
    ),
    Mutant(
        "the norm is summed in float16",
        "shardscale/kernels/foreach.py",
        "torch.linalg.vector_norm(wide).square()",
        "torch.linalg.vector_norm(wide.half()).square()",
        ("tests/unit/test_kernels.py::test_the_sum_of_squares_is_the_float64_formulas",),
    ),
    Mutant(
        "a mesh may reach out of the agreeing group",
        "shardscale/owners.py",
        "    outside = layout.ranks - members.ranks if",
        "    outside = layout.ranks - layout.ranks if",
        (f"{_BAD}::test_a_mesh_that_reaches_out_of_the_agreeing_group_is_refused",),
    ),
    Mutant(
        "an optimizer of replaced parameters trains nothing, in silence",
        "shardscale/layouts.py",
        "        if stale and waiting:\n",
        "        if stale and not waiting:\n",
        (f"{_BAD}::test_an_optimizer_of_replaced_parameters_is_refused[step]",),
    ),
    Mutant(
        "a wrapped loss is a view",
        "shardscale/outputs.py",
        "        return loss.clone()",
        "        return loss.view_as(loss)",
        ("tests/ranks/test_pipelines.py::test_a_scheduled_pipeline_is_one_process[ZBV-alone-2]",),
    ),
    Mutant(
        "the host reads a factor that has not arrived",
        "shardscale/kernels/dispatch.py",
        'factor = inv_scale.to(device, non_blocking=device.type != "cpu")',
        "factor = inv_scale.to(device, non_blocking=True)",
        (
            f"{_DEVICES}::test_a_scale_elsewhere_trains_what_lies_on_the_host_as_one_process_would[DDP-2]",
        ),
    ),
    Mutant(
        "ranks sum what not all of them have",
        "shardscale/placements.py",
        "        if intent.is_cpu and differs:\n",
        "        if intent.is_cpu and not differs and comm.size == 0:\n",
        (
            "tests/ranks/test_tensor_parallel.py::test_a_gradient_that_cannot_be_summed_is_an_error_on_every_rank",
        ),
    ),
    Mutant(
        "the weights of more than 512 ranks do not sum to zero",
        "shardscale/verdict.py",
        "_draw(step, (rank + 1) % size, size)",
        "_draw(step, (rank + 1) % min(size, 512), size)",
        (
            f"{_MANY}[1024-nobody]",
            f"{_SUMS}::test_weights_of_large_groups_are_small_never_zero_and_sum_to_zero",
        ),
    ),
    Mutant(
        "a group may be larger than the message can count",
        "shardscale/verdict.py",
        "MAX_RANKS = 2**17",
        "MAX_RANKS = 2**18",
        (f"{_SUMS}::test_what_is_counted_is_read_again",),
    ),
    Mutant(
        "more than 510 bad ranks read as a wish",
        "shardscale/verdict.py",
        "    wish = size + 1\n",
        "    wish = min(size + 1, 511)\n",
        (f"{_MANY}[1024-all are bad]",),
    ),
    Mutant(
        "a large group warns on any transport",
        "shardscale/comm/process_group.py",
        '    if transport != "gloo":\n        return\n',
        "",
        (f"{_COMM}::test_no_other_transport_warns",),
    ),
    Mutant(
        "a large group on Gloo warns once for each scaler",
        "shardscale/comm/process_group.py",
        "if group not in _roll_calls and self.size >=",
        "if self.size >=",
        (f"{_COMM}::test_a_large_group_on_gloo_warns_once_of_what_a_verdict_costs",),
    ),
    Mutant(
        "a store is not asked for the rest of a batch in which one rank is missing",
        "shardscale/comm/roll_call.py",
        "written += batch if store.check(batch) else [key for key in batch if store.check([key])]",
        "written += batch if store.check(batch) else []",
        (f"{_COMM}::test_a_store_keeps_what_many_ranks_tell_alike_only_once",),
    ),
    Mutant(
        "the keys of all worlds are the same",
        "shardscale/comm/roll_call.py",
        """        return f"shardscale/{self._register.count(self._job_store)}"
""",
        """        return "shardscale"
""",
        (
            f"{_ROLL}::test_what_an_earlier_world_has_written_is_not",
            "tests/ranks/test_elastic_keys.py",
        ),
    ),
    Mutant(
        "a process that joins divides those that call the roll",
        "shardscale/comm/roll_call.py",
        "            if (prefix := self._prefix()) != under:\n",
        "            if not under and (prefix := self._prefix()):\n",
        (f"{_ROLL}::test_a_process_that_joins_during_a_roll_call_does_not_divide_the_others",),
    ),
    Mutant(
        "a process that could not join counts as one that did",
        "shardscale/comm/register.py",
        "        if self._number is None:\n            self._enter(store)\n",
        "",
        (f"{_ROLL}::test_who_could_not_join_at_once_does_so_when_it_matters",),
    ),
    Mutant(
        "a host of an earlier world is believed",
        "shardscale/comm/register.py",
        "            if is_first_world or int(number) >= (self._number or 0)\n",
        "",
        (f"{_ROLL}::test_what_an_earlier_world_has_written_is_not",),
    ),
    Mutant(
        "every verdict is written to the store",
        "shardscale/comm/process_group.py",
        "        self._roll_call.last = place\n",
        "        self._roll_call.last = place\n        self._roll_call.look(place, is_late=True)\n",
        (f"{_HANGS}::test_good_steps_and_skips_ask_nothing_of_the_store",),
    ),
    Mutant(
        "a store that died is not told from ranks that did not come",
        "shardscale/comm/roll_call.py",
        """            body = (
                f"Who is missing cannot be told: the store does not answer ({error}). It probably "
                "died with the rank that hosted it (rank 0, unless a launcher holds it)."
            )
""",
        """            body = tell(Attendance({}, {}, {}), self.crew, place, self.last)
""",
        (
            f"{_MISSING}::test_if_the_store_died_with_its_rank_the_error_says_so",
            f"{_ROLL}::test_a_store_that_is_gone_is_an_alarm_and_the_report_says_so",
        ),
    ),
    Mutant(
        "a store that is stopped for a while ends the job",
        "shardscale/comm/roll_call.py",
        "            return error.is_gone\n",
        "            return True\n",
        (f"{_ROLL}::test_a_store_that_does_not_answer_is_no_alarm_and_is_asked_only_once",),
    ),
    Mutant(
        "who waited for an earlier verdict has come to this one",
        "shardscale/comm/attendance.py",
        "    late = {r for r, at in found.late.items() if at.verdict == place.verdict}\n",
        "    late = set(found.late)\n",
        (
            "tests/unit/test_attendance.py"
            "::test_a_mark_of_an_earlier_verdict_is_no_sign_of_this_one",
        ),
    ),
    Mutant(
        "a rank that wrote nothing is not missed",
        "shardscale/comm/attendance.py",
        "    missing = set(range(crew.size)) - {crew.rank} - here - elsewhere.keys() - silent\n",
        "    missing = late & here\n",
        (f"{_MISSING}::test_survivors_of_a_stop_share_one_history_and_name_the_stopped",),
    ),
    Mutant(
        "a checkpoint without a rank's file is published",
        "launch/checkpoints.py",
        "    if missing:\n",
        "    if not files:\n",
        (f"{_SAVED}::test_ranks_that_write_to_different_places_have_saved_nothing",),
    ),
    Mutant(
        "torch's error of a checkpoint passes for no Exception",
        "launch/checkpoints.py",
        "    except CheckpointException as error:",
        "    except KeyError as error:",
        (f"{_SAVED}::test_a_broken_checkpoint_is_told_in_a_sentence",),
    ),
    Mutant(
        "who joined since the last look at the register is not heard",
        "shardscale/comm/roll_call.py",
        "+ _GLANCE_S)):",
        "+ _GLANCE_S)) or time.monotonic() >= deadline:",
        (
            "tests/unit/test_roll_call.py::"
            "test_who_joins_while_another_one_gathers_is_heard_however_short_the_time",
        ),
    ),
    Mutant(
        "a missing rank is named without its host",
        "shardscale/comm/roll_call.py",
        "{rank: hosts[number] for rank, number in enumerate(in_job) if number in hosts}",
        "{}",
        (f"{_MISSING}::test_survivors_of_a_stop_share_one_history_and_name_the_stopped",),
    ),
    Mutant(
        "nobody tells the communicator the step",
        "shardscale/verdict.py",
        "        comm.step_under_way = call.num_updates\n",
        "        pass\n",
        (f"{_MISSING}::test_every_rank_that_waited_names_the_one_that_did_not_come",),
    ),
    Mutant(
        "a rank whose own GPU is late waits for others",
        "shardscale/comm/monitor.py",
        "self._ask_others(late) if is_reached else self._blame_itself(late)",
        "self._ask_others(late)",
        (
            f"{_MONITOR}::test_a_rank_whose_own_gpu_is_late_writes_nothing_and_says_so_once",
            f"{_MONITOR}::test_a_rank_whose_own_gpu_is_late_to_the_end_blames_no_other",
        ),
    ),
    Mutant(
        "the host comes back before it can be told why",
        "shardscale/comm/monitor.py",
        """        self.finding = finding  # before the host comes back
        group = self._find_group()
        if group is not None:
            group.abort()
""",
        """        group = self._find_group()
        if group is not None:
            group.abort()
        self.finding = finding
""",
        (
            f"{_MONITOR}"
            "::test_when_the_time_is_over_it_is_logged_then_kept_and_then_the_group_is_aborted",
        ),
    ),
    Mutant(
        "an event that was over once is over for good",
        "shardscale/comm/monitor.py",
        "        return self.is_launched and bool(self.after.query())\n",
        "        return bool(self.after.query())\n",
        (
            f"{_MONITOR}"
            "::test_an_event_used_before_does_not_speak_for_a_verdict_still_being_launched",
        ),
    ),
    Mutant(
        "events are recorded into a graph and asked for meanwhile",
        "shardscale/comm/monitor.py",
        "        if is_capturing(self._device):\n",
        "        if False:\n",
        (f"{_MONITOR}::test_while_a_graph_is_captured_no_event_is_recorded_or_asked_for",),
    ),
    Mutant(
        "after an abort the host waits for the device",
        "shardscale/judge.py",
        "() if self.bond.is_aborted else self.ledger.unread()",
        "self.ledger.unread()",
        (f"{_HANGS}::test_what_the_monitor_has_found_is_raised_by_whatever_is_called_next",),
    ),
    Mutant(
        "gradients that are held back are judged",
        "shardscale/examine.py",
        "        self._layouts.require_synced(params, self._members)\n",
        "",
        (
            _TOO_EARLY,
            f"{_WITHHELD}::test_where_some_ranks_hold_back_all_raise_and_nothing_moves[step]",
        ),
    ),
    Mutant(
        "a model that is held back keeps another one from stepping",
        "shardscale/layouts.py",
        "next((param for param in held if id(param) in asked), None)",
        "next((param for param in held if asked), None)",
        (f"{_WITHHELD}::test_a_model_may_be_held_back_while_another_one_steps",),
    ),
    Mutant(
        "the flag of DDP is believed whatever its forward did",
        "shardscale/withheld.py",
        "    if model.require_backward_grad_sync or model.require_forward_param_sync:\n",
        "    if model.require_backward_grad_sync:\n",
        (
            f"{_WITHHELD}::test_gradients_that_have_met_may_be_stepped_whatever_the_flag_says"
            "[step_within_no_sync_after_a_synchronised_backward]",
        ),
    ),
    Mutant(
        "FSDP1 is seen to hold back only while its flag is off",
        "shardscale/withheld.py",
        "    if flat.grad.shape == flat.shape if is_sharded else unit._sync_gradients:\n",
        "    if unit._sync_gradients:\n",
        (_TOO_EARLY,),
    ),
    Mutant(
        "FSDP2 is seen to hold back only while its flag is off",
        "shardscale/withheld.py",
        "                if not _is_pending(param):\n",
        "                if True:\n",
        (_TOO_EARLY,),
    ),
    Mutant(
        "the flag of FSDP2 is believed though nothing waits",
        "shardscale/withheld.py",
        "for param in trained if is_partial or _is_pending(param)]",
        "for param in trained]",
        (
            f"{_WITHHELD}::test_gradients_that_have_met_may_be_stepped_whatever_the_flag_says"
            "[turn_the_flag_off_early]",
        ),
    ),
    Mutant(
        "replicas of HSDP that have not met go unnoticed",
        "shardscale/withheld.py",
        "    if group.reduce_grads and group._partial_reduce_output is None:\n",
        "    if group.reduce_grads:\n",
        (f"{_WITHHELD}::test_gradients_that_have_not_met_the_other_replicas_are_an_error",),
    ),
    Mutant(
        "a graph repeats the salt of its capture",
        "shardscale/verdict.py",
        "(call.num_replayed * _STRIDE % 2**29 * 2 + 1)",
        "1",
        (f"{_REPLAY}::test_a_miss_is_not_repeated_by_the_next_replay",),
    ),
    Mutant(
        "a replay forgets the verdict before it",
        "shardscale/replay.py",
        "            mine.copy_(new)\n        return self._previous",
        "            pass\n        return agreement",
        (f"{_CAPTURE}::test_ranks_that_drift_apart_during_replays_stop_together_for_good",),
    ),
    Mutant(
        "a gate is opened by the step inside the step",
        "shardscale/gate.py",
        "            self._frames.append(None)\n            return\n",
        "            self._frames[:] = [None]\n            return\n",
        (f"{_GATE}::test_a_step_that_calls_the_one_it_overrides_is_gated_once",),
    ),
    Mutant(
        "calls without an optimizer do not know what is unscaled",
        "shardscale/examine.py",
        "iteration.num_unscaled_empty > 0 and not optimizers",
        "False",
        (f"{_DISAGREE}::test_ranks_of_few_optimizers_unscale_as_the_others[(3, 3, 0)-True-False]",),
    ),
    Mutant(
        "in C the flag is overwritten by each unit",
        "shardscale/kernels/native/work.c",
        "            *found |= pass.results[unit]",
        "            *found = pass.results[unit]",
        (f"{_NATIVE}::test_what_is_bad_is_found_by_whichever_thread_meets_it",),
    ),
    Mutant(
        "in C the flag is written though nothing is bad",
        "shardscale/kernels/native/module.c",
        "    if (found) {\n        *found_inf = 1;\n    }\n",
        "    *found_inf = found;\n",
        (f"{_NATIVE}::test_a_flag_that_is_set_stays_and_a_sum_is_added_to",),
    ),
    Mutant(
        "in C a NaN is no larger than Inf",
        "shardscale/kernels/native/work.c",
        "    if (bits > infinity[dtype]) {\n        return NAN;\n",
        "    if (bits > infinity[dtype]) {\n        return INFINITY;\n",
        (f"{_NATIVE}::test_count_tells_inf_from_nan_and_the_largest_magnitude",),
    ),
    Mutant(
        "in C the sums of units are added in float32",
        "shardscale/kernels/native/work.c",
        "    double sum = 0;\n    for (int64_t t = 0; t < num; t++) {\n",
        "    float sum = 0;\n    for (int64_t t = 0; t < num; t++) {\n",
        (
            f"{_NATIVE}::test_every_size_and_alignment_gives_the_reference_and_the_sum",
            f"{_NATIVE}::test_the_sum_holds_the_square_of_everything_float32_can_hold",
        ),
    ),
    Mutant(
        "in C the rest of a tensor is written back as a whole block",
        "shardscale/kernels/native/work.c",
        "        memcpy(rest, own, (size_t)(num * size));\n",
        "        memcpy(rest, own, (size_t)(BLOCK * size));\n",
        (f"{_NATIVE}::test_every_size_and_alignment_gives_the_reference_and_the_sum",),
    ),
    Mutant(
        "in C inv_scale is rounded to float16",
        "shardscale/kernels/native/module.c",
        "judge(grads.memory, grads.num, *inv_scale, writes,",
        "judge(grads.memory, grads.num, (float)(_Float16)*inv_scale, writes,",
        (
            f"{_NATIVE}::test_unscale_gives_the_bits_of_the_reference_and_of_torch",
            f"{_NATIVE}::test_every_bit_pattern_is_multiplied_as_torch_does",
        ),
    ),
    Mutant(
        "in C spans are compared by their last element, not by their end",
        "shardscale/kernels/native/overlap.c",
        "spans[i].start < spans[i - 1].end)",
        "spans[i].start + 2 < spans[i - 1].end)",
        (f"{_NATIVE}::test_gather_sees_one_overlap_among_thousands",),
    ),
    Mutant(
        "in C only neighbours in the list are looked at for an overlap",
        "shardscale/kernels/native/overlap.c",
        "    if (!all_in_order(spans, num) && !sort(spans, num)) {\n",
        "    if (!all_in_order(spans, num) && spans == NULL) {\n",
        (f"{_NATIVE}::test_gather_sees_gradients_that_overlap",),
    ),
    Mutant(
        "in C the lanes of what pads a block are added",
        "shardscale/kernels/native/work.c",
        "        for (int i = 0; i < num; i++) {\n            lanes[i] += own_lanes[i];",
        "        for (int i = 0; i < BLOCK; i++) {\n            lanes[i] += own_lanes[i];",
        (f"{_NATIVE}::test_sums_of_what_is_not_finite_are_those_of_the_formula",),
    ),
    Mutant(
        "in C workers round and flush as they please",
        "shardscale/kernels/native/pool.c",
        "        fesetenv(&task.environment);\n",
        "",
        (
            f"{_NATIVE}::test_denormals_are_flushed_if_and_only_if_the_caller_flushes_them"
            "[portable-3]",
        ),
    ),
    Mutant(
        "in C a forked child counts on its parent's workers",
        "shardscale/kernels/native/pool.c",
        "    num_workers = 0;\n    pthread_cond_init",
        "    pthread_cond_init",
        (f"{_NATIVE}::test_a_fork_starts_without_workers_and_gets_its_own",),
    ),
    Mutant(
        "in C squares of bfloat16 are summed in the order of registers",
        "shardscale/kernels/native/avx2.c",
        "even_then_odd[i % 2 * (BLOCK / 2) + i / 2]",
        "even_then_odd[i]",
        (f"{_NATIVE}::test_check_sums_the_squares_of_products_that_are_not_rounded",),
    ),
    Mutant(
        "a folded clip is lost when an update comes before the step",
        "shardscale/judge.py",
        "                self.unscale_locally_(optimizer, state)\n",
        "                pass\n",
        (f"{_FOLD}::test_a_clip_is_not_lost_when_an_update_comes_before_the_step",),
    ),
    Mutant(
        "whether a rank folds is no part of the message",
        "shardscale/scaler.py",
        'method = "clip_grad_norm_ with fold_clip"',
        'method = "clip_grad_norm_"',
        (f"{_FOLD}::test_ranks_that_fold_and_ranks_that_do_not_disagree",),
    ),
    Mutant(
        "gradients are divided by the scale alone where the clip was folded",
        "shardscale/examine.py",
        """\
    if entry.divisor is not None:
        return entry.divisor
""",
        "",
        (
            f"{_FOLD}::test_gradients_stay_scaled_until_the_step_which_divides_them_once",
            f"{_FOLD}::test_sharded_training_folds_and_skips_together[FSDP2]",
        ),
    ),
    Mutant(
        "a disabled scaler folds, too",
        "shardscale/scaler.py",
        "if self._fold_clip and self._enabled:",
        "if self._fold_clip:",
        (f"{_FOLD}::test_a_disabled_scaler_clips_in_place",),
    ),
    Mutant(
        "gradients that are one memory are multiplied twice",
        "shardscale/shards.py",
        "        left_out.add(other)\n",
        "",
        ("tests/unit/test_shards.py::test_two_gradients_that_are_one_memory_are_one_shard",),
    ),
    Mutant(
        "autograd is not told that a gradient was written",
        "shardscale/kernels/dispatch.py",
        """\
        _on_each_device("unscale_", grads, inv_scale, found_inf, sum_squares)
    _increment_version(grads)
""",
        """\
        _on_each_device("unscale_", grads, inv_scale, found_inf, sum_squares)
""",
        (
            "tests/unit/test_dispatch.py::test_torch_is_told_of_what_was_written[unscale_]",
            "tests/compile/test_operators.py"
            "::test_an_autograd_graph_notices_that_a_gradient_was_written",
        ),
    ),
    Mutant(
        "an operator does not say what it writes",
        "shardscale/kernels/operators.py",
        '_register("unscale_", "Tensor(a!)[] grads, "',
        '_register("unscale_", "Tensor[] grads, "',
        ("tests/compile/test_operators.py::test_torch_finds_nothing_wrong_with_the_operators",),
    ),
    Mutant(
        "the flags of other devices are forgotten",
        "shardscale/kernels/dispatch.py",
        "found_inf.copy_(torch.maximum(found_inf, flag.to(found_inf.device)))",
        "pass",
        (f"{_DEVICES}::test_what_is_found_on_one_device_counts_where_no_norm_would_tell",),
    ),
    Mutant(
        "the sums of other devices are forgotten",
        "shardscale/kernels/dispatch.py",
        "sum_squares += squares.to(sum_squares.device)",
        "pass",
        (f"{_DEVICES}::test_gradients_of_several_devices_share_one_verdict_and_one_norm",),
    ),
    Mutant(
        "triton: a last segment runs past the end of its gradient",
        "shardscale/kernels/triton/source.py",
        "    end = tl.minimum(tl.load(row + 2) + shift, numel)\n",
        "    end = tl.load(row + 2) + shift\n",
        (f"{_BITS}[torch.float32-0.5]", f"{_BITS}[torch.bfloat16-0.5]"),
    ),
    Mutant(
        "triton: a head is longer than its gradient",
        "shardscale/kernels/triton/source.py",
        "    begin = tl.minimum(first + shift, numel)\n",
        "    begin = first + shift\n",
        (f"{_BITS}[torch.float32-0.5]", f"{_BITS}[torch.bfloat16-0.5]"),
    ),
    Mutant(
        "triton: the flag is overwritten with zero",
        "shardscale/kernels/triton/source.py",
        "    if not good:\n        tl.store(found_inf, 1.0)",
        "    if True:\n        tl.store(found_inf, tl.where(good, 0.0, 1.0))",
        (f"{_GRID}::test_a_flag_is_stored_only_as_one",),
    ),
    Mutant(
        "triton: inv_scale is rounded to float16",
        "shardscale/kernels/triton/source.py",
        "    factor = tl.load(inv_scale)\n",
        "    factor = tl.load(inv_scale).to(tl.float16).to(tl.float32)\n",
        (
            f"{_BITS}[torch.float32-0.3333333333333333]",
            f"{_BITS}[torch.float16-1e-40]",
            f"{_NORMS}[torch.float32-1.0]",
        ),
    ),
    Mutant(
        "triton: a NaN is lost in the largest magnitude",
        "shardscale/kernels/triton/source.py",
        "    return tl.max(tl.max(x, 2), 0)\n",
        "    return tl.max(tl.max(tl.where(x > 0x7F800000, 0, x), 2), 0)\n",
        (
            f"{_GRID}::test_one_bad_element_is_found_wherever_it_is[torch.float32]",
            f"{_GRID}::test_count_counts_what_torch_counts[torch.bfloat16]",
        ),
    ),
    Mutant(
        "triton: partial sums are added in float32",
        "shardscale/kernels/triton/source.py",
        "tl.load(sum_squares) + tl.sum(sums, 0)",
        "tl.load(sum_squares) + tl.sum(sums.to(tl.float32), 0)",
        (
            f"{_NORMS}[torch.float32-3e+38]",
            f"{_GRID}::test_large_and_tiny_values_together[torch.bfloat16]",
        ),
    ),
    Mutant(
        "triton: squares that float32 does not hold are left as they are",
        "shardscale/kernels/triton/source.py",
        "            if good & (amax > 0) & (not safe):\n",
        "            if good & (amax < 0):\n",
        (
            f"{_NORMS}[torch.float32-1e-30]",
            f"{_NORMS}[torch.float32-1e-20]",
            f"{_NORMS}[torch.bfloat16-1e+30]",
            f"{_GRID}::test_large_and_tiny_values_together[torch.float32]",
        ),
    ),
    Mutant(
        "triton: a product too large for its dtype is not judged",
        "shardscale/kernels/triton/source.py",
        '    good = good & ((factor <= 1) | (stored < float("inf")))\n',
        '    good = good & ((factor <= 1) | (product < float("inf")))\n',
        (f"{_GRID}::test_a_product_is_judged_as_it_is_stored[torch.float16]",),
    ),
    Mutant(
        "triton: a factor of one stores what it has multiplied",
        "shardscale/kernels/triton/source.py",
        "    writing = tl.where(factor != 1, BLOCK, 0)\n",
        "    writing = tl.where(factor != 2, BLOCK, 0)\n",
        (f"{_GRID}::test_one_times_anything_leaves_every_bit_of_a_nan[torch.float32]",),
    ),
    Mutant(
        "triton: an address is not compared",
        "shardscale/kernels/triton/table.py",
        "in enumerate(alike) if table.held == addresses)",
        "in enumerate(alike))",
        (
            f"{_GRID}::test_moved_gradients_are_found_again",
            f"{_TABLE}::test_an_address_alone_is_not_trusted[address]",
        ),
    ),
    Mutant(
        "triton: a capture trusts a table of other addresses",
        "shardscale/kernels/triton/table.py",
        "_tables.get(key, []) if table.held == addresses]",
        "_tables.get(key, [])]",
        (f"{_TABLE}::test_a_capture_takes_only_what_an_iteration_has_found_before",),
    ),
    Mutant(
        "triton: memory that two gradients share is multiplied twice",
        "shardscale/kernels/triton/table.py",
        "    overlaps = begins[order[1:]] < (begins + sizes)[order[:-1]]\n",
        "    overlaps = begins[order[1:]] == begins[order[:-1]]\n",
        (f"{_GRID}::test_memory_shared_by_two_gradients_is_refused",),
    ),
    Mutant(
        "a divisor that float32 does not hold is cut off",
        "shardscale/examine.py",
        "torch.where(fits, 1.0, largest / divisor * factor)",
        "torch.ones_like(quotient)",
        (f"{_FOLD}::test_a_divisor_that_float32_does_not_hold_clips_all_the_same",),
    ),
    Mutant(
        "one rank's update raises what the others do not know of",
        "shardscale/judge.py",
        "with contextlib.suppress(LayoutError):",
        "with contextlib.suppress():",
        (f"{_FOLD}::test_an_update_raises_nothing_that_other_ranks_do_not_know_of",),
    ),
    Mutant(
        "memory of two optimizers is divided by both",
        "shardscale/examine.py",
        "            require_apart(shards, name_of)\n",
        "            pass\n",
        (
            "tests/unit/test_shards.py"
            "::test_memory_of_two_optimizers_is_refused_also_where_it_is_the_same",
        ),
    ),
    Mutant(
        "modes that watch operators do not see the kernels",
        "shardscale/kernels/dispatch.py",
        """\
    if is_compiling() or _len_torch_dispatch_stack():
        torch.ops.shardscale.unscale_""",
        """\
    if is_compiling():
        torch.ops.shardscale.unscale_""",
        ("tests/compile/test_operators.py::test_a_mode_that_watches_operators_is_shown_ours",),
    ),
    Mutant(
        "a wish is counted as a bad rank",
        "shardscale/verdict.py",
        "        term = term + units.wish\n",
        "        term = term + 1\n",
        (f"{_VERDICT}::test_a_wish_of_any_rank_is_read_and_changes_nothing_else", _STOPPED),
    ),
    Mutant(
        "a rank hears nothing but its own wish",
        "shardscale/verdict.py",
        """\
    return unpack(message, stats.sum_squares is not None, comm.size, previous)
""",
        """\
    agreement = unpack(message, stats.sum_squares is not None, comm.size, previous)
    agreement.flags[3] = float(stats.wishes)
    return agreement
""",
        (
            f"{_STOPPED}[3-step]",
            f"{_STOP}::test_a_signal_to_one_rank_ends_the_loops_of_all_at_one_step",
        ),
    ),
    Mutant(
        "one wish of every rank is one too many",
        "shardscale/verdict.py",
        "min(room, size + 1)",
        "min(room, size)",
        (
            f"{_VERDICT}::test_a_wish_of_any_rank_is_read_and_changes_nothing_else[1-3]",
            f"{_SUMS}::test_up_to_3259_ranks_every_wish_is_heard_in_every_step",
        ),
    ),
    Mutant(
        "a message holds one wish more than it has room for",
        "shardscale/verdict.py",
        "min(room, size + 1)",
        "min(room + 1, size + 1)",
        (f"{_SUMS}::test_every_partial_sum_is_exact_in_every_order",),
    ),
    Mutant(
        "of a large group the same ranks are heard in every step",
        "shardscale/verdict.py",
        "(rank + step) % math.ceil",
        "rank % math.ceil",
        (f"{_SUMS}::test_in_larger_groups_rank_0_is_heard_and_the_others_take_turns",),
    ),
    Mutant(
        "who has read a wish stops at once",
        "shardscale/stopping.py",
        "knew_of_a_wish(judge.num_updates - 1)",
        "knew_of_a_wish(judge.num_updates)",
        (
            f"{_STOPPED}[3-step]",
            f"{_SIGNAL}::test_a_group_of_one_that_a_communicator_makes_is_told_an_iteration_later",
        ),
    ),
    Mutant(
        "a wish is heard only in a verdict that an optimizer still has",
        "shardscale/ledger.py",
        "for _, flags in self._read.values())",
        "for own, flags in self._read.values() if any(own is a for a, _ in agreements))",
        (f"{_LEDGER}::test_a_wish_is_known_with_its_iteration_however_its_verdict_was_read",),
    ),
    Mutant(
        "a verdict is taken for another one that had its id",
        "shardscale/ledger.py",
        "self._read[id(agreement)] = (agreement, flags)",
        "self._read[id(agreement)] = (None, flags)",
        (f"{_LEDGER}::test_a_verdict_is_not_taken_for_one_that_is_gone",),
    ),
    Mutant(
        "a graph is captured with the wish of that moment",
        "shardscale/judge.py",
        "not captured and comm is not None and bool",
        "comm is not None and bool",
        (f"{_STOP}::test_a_captured_verdict_carries_no_wish",),
    ),
    Mutant(
        "a wish that raises is raised before this rank has joined",
        "shardscale/judge.py",
        "        stats = nothing_found(state)\n        grads:",
        "        stats = nothing_found(state)\n        self.wish()\n        grads:",
        (f"{_STOP}::test_a_wish_that_raises_is_a_fault_of_its_rank",),
    ),
    Mutant(
        "a signal may be whatever is equal to its number",
        "shardscale/preemption.py",
        "    if isinstance(number, bool) or not isinstance(number, int) or number not in usable:\n",
        "    if number not in usable:\n",
        (f"{_SIGNAL}::test_a_signal_that_cannot_be_used_is_refused_with_a_list_of_those_that_can",),
    ),
    Mutant(
        "the handler of the signal to stop is the default one",
        "shardscale/preemption.py",
        "signal.signal(number, self._note)",
        "signal.signal(number, signal.SIG_DFL)",
        (f"{_SIGNAL}::test_a_signal_during_start_up_is_not_lost_if_the_parent_has_blocked_it",),
    ),
    Mutant(
        "a signal that was blocked stays blocked",
        "shardscale/preemption.py",
        "signal.SIG_UNBLOCK",
        "signal.SIG_BLOCK",
        (f"{_SIGNAL}::test_a_signal_during_start_up_is_not_lost_if_the_parent_has_blocked_it",),
    ),
    Mutant(
        "the handler that was there before is not called",
        "shardscale/preemption.py",
        "if callable(self._before) and",
        "if not callable(self._before) and",
        (f"{_SIGNAL}::test_handlers_that_were_there_before_are_called_too",),
    ),
    Mutant(
        "the package imports torch",
        "shardscale/__init__.py",
        "import typing\n",
        "import typing\n\nimport torch\n",
        (f"{_EXPORTS}::test_what_comes_before_torch_does_not_import_it[shardscale.preemption]",),
    ),
    Mutant(
        "a rank that is alone is never told to stop",
        "shardscale/stopping.py",
        "if not self._enabled or judge.bond.communicator() is None:",
        "if not self._enabled:",
        (
            f"{_SIGNAL}::test_a_scaler_that_is_alone_gives_its_own_wish_at_once",
            f"{_STOP}::test_what_a_rank_wished_alone_does_not_stop_it_in_a_group_made_later",
        ),
    ),
    Mutant(
        "over MPI each rank keeps its own numbers",
        "shardscale/comm/mpi.py",
        "np.add.accumulate(rows)[-1]",
        "rows[self.rank]",
        (_OVER_MPI, f"{_MPI}::test_all_ranks_skip_when_one_has_nan[openmpi-3]"),
    ),
    Mutant(
        "over MPI each rank adds from its own number on",
        "shardscale/comm/mpi.py",
        "np.add.accumulate(rows)[-1]",
        "np.add.accumulate(np.roll(rows, -self.rank, axis=0))[-1]",
        (f"{_MPI}::test_mpi_keeps_the_contract[mpich-3]",),
    ),
    Mutant(
        "over MPI the largest number is taken",
        "shardscale/comm/mpi.py",
        "np.add.accumulate(rows)[-1]",
        "rows.max(axis=0)",
        (_OVER_MPI,),
    ),
    Mutant(
        "over MPI no time is too long",
        "shardscale/comm/mpi_talk.py",
        "waited >= timeout_s or is_hopeless()",
        "is_hopeless()",
        ("tests/unit/test_mpi.py::test_waiting_ends_with_the_time_or_with_hope",),
    ),
    Mutant(
        "over MPI a broken communicator goes on",
        "shardscale/comm/mpi_line.py",
        "        if self._why_broken:\n            raise",
        "        if not self:\n            raise",
        (
            f"{_MPI}::test_after_that_every_verdict_raises_at_once_and_objects_are_still_gathered[mpich-3]",
        ),
    ),
    Mutant(
        "over MPI a rank that comes too late takes what it finds",
        "shardscale/comm/mpi_line.py",
        """\
        if gone := self.talk.gave_up(verdict):
            return""",
        """\
        if (gone := self.talk.gave_up(verdict)) and not is_done:
            return""",
        (f"{_MPI}::test_who_does_not_come_is_named_with_host_and_last_step[openmpi-3]",),
    ),
    Mutant(
        "over MPI the patient do not hear who has given up",
        "shardscale/comm/mpi_line.py",
        "bool(self.talk.gave_up(verdict) or self.talk.elsewhere(verdict))",
        "bool(self.talk.elsewhere(verdict))",
        (f"{_MPI}::test_the_patient_give_up_soon_after_the_impatient[mpich-3]",),
    ),
    Mutant(
        "over MPI those who wait do not hear of a disagreement",
        "shardscale/comm/mpi_line.py",
        "bool(self.talk.gave_up(verdict) or self.talk.elsewhere(verdict))",
        "bool(self.talk.gave_up(verdict))",
        (
            f"{_MPI}::test_a_rank_that_waits_hears_of_a_disagreement_that_others_have_read"
            "[openmpi-2]",
        ),
    ),
    Mutant(
        "over MPI the ranks talk beside the program's own messages",
        "shardscale/comm/mpi_line.py",
        "        self.talk = Talk(self._comm, _TAG)",
        "        self.talk = Talk(comm, _TAG)",
        (f"{_MPI}::test_nothing_mixes_with_other_traffic_of_the_program[mpich-2]",),
    ),
    Mutant(
        "a communicator is not told how long the scaler waits",
        "shardscale/comm/bond.py",
        "self._timed = comm.within(timeout_s)",
        "self._timed = comm",
        ("tests/unit/test_mpi.py::test_the_scalers_time_comes_before_its_communicators",),
    ),
    Mutant(
        "each view of a communicator is a group of its own",
        "shardscale/comm/bond.py",
        "return self._comm or (",
        "return self._timed or (",
        (
            "tests/unit/test_mpi.py::test_views_of_one_communicator_are_one_group",
            f"{_MPI}::test_scalers_of_one_communicator_are_told_apart[mpich-2]",
        ),
    ),
    Mutant(
        "several worlds of one rank agree over MPI",
        "shardscale/comm/mpi_checks.py",
        "    check_mpi_size(os.environ, MPI.COMM_WORLD.Get_size(), MPI.Get_library_version())\n",
        "",
        (f"{_MPI}::test_an_mpi_that_cannot_be_used_is_refused_in_a_sentence[mpich]",),
    ),
    Mutant(
        "the doctor is always well",
        "shardscale/doctor/report.py",
        "return self.failures[0].code if self.failures else Code.WELL",
        "return Code.WELL",
        (
            f"{_DOCTOR}::test_a_broken_scaler_of_ours_is_a_failure",
            "tests/doctor/test_command.py"
            "::test_a_wrong_environment_is_one_sentence_and_its_own_exit_code",
        ),
    ),
    Mutant(
        "the doctor breaks off where nobody reads on",
        "shardscale/doctor/report.py",
        "except BrokenPipeError:",
        "except InterruptedError:",
        (
            "tests/doctor/test_command.py"
            "::test_a_report_that_nobody_reads_to_its_end_is_written_all_the_same",
        ),
    ),
    Mutant(
        "the doctor looks at what rank 0 saw alone",
        "shardscale/doctor/checks.py",
        "if all(saw == check.right for saw in seen.values()):",
        "if seen[0] == check.right:",
        (f"{_JUDGING}::test_one_rank_that_is_wrong_fails_our_check_wherever_it_is[2]",),
    ),
    Mutant(
        "the doctor goes on without a rank",
        "shardscale/doctor/rounds.py",
        """silent = {rank: "did not answer" for rank in ranks if rank not in heard}""",
        "silent: dict[int, str] = {}",
        (f"{_DOCTOR}::test_a_rank_that_dies_is_named_with_its_host",),
    ),
    Mutant(
        "the doctor waits for whatever is stuck",
        "shardscale/doctor/rounds.py",
        "found = within(part.limit_s, part.look)",
        "found = part.look()",
        (f"{_DOCTOR}::test_an_all_reduce_that_hangs_is_a_failure",),
    ),
    Mutant(
        "the checker of logs lets ranks hold different entries",
        "tests/cluster/logs.py",
        "        if len(sides) > 1\n",
        "        if not sides\n",
        (f"{_LOGS}::test_a_different_entry_is_named_with_its_step_and_ranks", _BROKEN),
    ),
    Mutant(
        "the checker of logs lets a rank be ahead by two steps",
        "tests/cluster/logs.py",
        "min(lengths.values()) > 1:",
        "min(lengths.values()) > 2:",
        (f"{_LOGS}::test_more_than_the_verdict_under_way_may_not",),
    ),
    Mutant(
        "the checker of logs forgives half a line to everybody",
        "tests/cluster/logs.py",
        "    if rest and not was_killed:\n",
        "    if rest and was_killed is None:\n",
        (f"{_LOGS}::test_half_a_line_is_forgiven_to_who_was_killed",),
    ),
    Mutant(
        "a row of the fault matrix may take as long as it likes",
        "tests/cluster/matrix.py",
        "    assert opened.seconds <= limit_s,",
        "    assert opened.seconds <= limit_s or opened.seconds,",
        ("tests/cluster/test_matrix.py::test_a_row_that_ends_late_or_was_not_measured_fails",),
    ),
    Mutant(
        "a process in a session of its own is not counted as left",
        "tests/cluster/processes.py",
        "            if wanted <= environment:\n",
        "            if wanted <= environment and os.getsid(int(folder.name)) == os.getsid(0):\n",
        (
            "tests/cluster/test_processes.py"
            "::test_an_orphan_in_a_session_of_its_own_is_found_and_ended",
        ),
    ),
    Mutant(
        "a step of SLURM counts before the mpirun inside it",
        "shardscale/comm/env.py",
        "        if _is_complete(environ, names):\n",
        "        if _is_complete(environ, names) and not slurm.in_step(environ):\n",
        (_INNERMOST,),
    ),
    Mutant(
        "a step of SLURM counts before the torchrun inside it",
        "shardscale/comm/env.py",
        "    if _is_complete(environ, _TORCH):\n        yield",
        "    if _is_complete(environ, _TORCH) and not slurm.in_step(environ):\n        yield",
        (_INNERMOST,),
    ),
    Mutant(
        "a batch script counts as a task",
        "shardscale/comm/slurm.py",
        '    if "SLURM_STEP_ID" not in environ:\n        return False\n',
        '    if "SLURM_STEP_ID" not in environ:\n        return "SLURM_PROCID" in environ\n',
        (
            _INNERMOST,
            _REFUSED,
        ),
    ),
    Mutant(
        "an interactive step counts as one of srun",
        "shardscale/comm/slurm.py",
        "< _FIRST_SPECIAL_STEP\n",
        "< 2 * _FIRST_SPECIAL_STEP\n",
        (f"{_ENV}::test_a_shell_in_an_allocation_is_no_rank",),
    ),
    Mutant(
        "a program started without srun runs alone",
        "shardscale/comm/slurm.py",
        "number(environ, name, 1) > 1:\n",
        "number(environ, name, 1) > 10**9:\n",
        (_REFUSED,),
    ),
    Mutant(
        "launchers may disagree",
        "shardscale/comm/env.py",
        "number(environ, name, 0) != expected:",
        "number(environ, name, 0) < 0:",
        (_REFUSED,),
    ),
    Mutant(
        "variables set by hand win over a larger world",
        "shardscale/comm/env.py",
        "    if outer is None or outer.world_size < env.world_size:\n",
        "    if outer is None or outer.world_size != env.world_size:\n",
        (_REFUSED,),
    ),
    Mutant(
        "a rank may be the size of its world",
        "shardscale/comm/variables.py",
        "    if value >= size:\n",
        "    if value > size:\n",
        (_REFUSED,),
    ),
    Mutant(
        "nodes may have different numbers of tasks",
        "shardscale/comm/slurm.py",
        "    if len({tasks for tasks, _ in runs}) > 1 and",
        "    if len({tasks for tasks, _ in runs}) > 2 and",
        (_REFUSED,),
    ),
    Mutant(
        "a node has as many tasks as the one before it",
        "shardscale/comm/slurm.py",
        "runs[bisect_right(ends, node)][0]",
        "runs[bisect_right(ends, node - 1)][0]",
        (f"{_ENV}::test_uneven_steps_that_were_asked_for_are_counted_per_node",),
    ),
    Mutant(
        "a step whose job has no number is a KeyError",
        "shardscale/comm/env.py",
        "        place = slurm.task(environ)\n",
        "        slurm.step(environ)\n        place = slurm.task(environ)\n",
        (_REFUSED, f"{_ENV}::test_any_environment_is_a_place_or_a_config_error"),
    ),
    Mutant(
        "a master may be a URL",
        "shardscale/comm/variables.py",
        "    if _NAME.fullmatch(text) or _address(text):\n",
        "    if text.strip():\n",
        (_REFUSED,),
    ),
    Mutant(
        "a loopback master is fine for several hosts",
        "shardscale/comm/env.py",
        "    if env.num_nodes > 1 and is_loopback(host)",
        "    if env.num_nodes > 9 and is_loopback(host)",
        (_REFUSED,),
    ),
    Mutant(
        "all steps of a job share a port",
        "shardscale/comm/slurm.py",
        "(job * _STEPS + step) %",
        "(job * _STEPS) %",
        (f"{_ENV}::test_neighbouring_jobs_and_steps_have_different_ports",),
    ),
    Mutant(
        "several worlds of one pass",
        "shardscale/comm/env.py",
        "    if env is None or env.world_size == size:\n",
        "    if env is None or size == 1:\n",
        (f"{_ENV}::test_several_worlds_of_one_are_refused",),
    ),
    Mutant(
        "a node list forgets its zeros",
        "shardscale/comm/nodelist.py",
        "[str(number).zfill(len(low)) for",
        "[str(number) for",
        (
            f"{_NODES}::test_a_list_is_written_out",
            f"{_NODES}::test_expanding_undoes_compressing",
        ),
    ),
    Mutant(
        "a node list has a limit for each of its ranges alone",
        "shardscale/comm/nodelist.py",
        "        if len(numbers) + int(high) - int(low) >= room:\n",
        "        if int(high) - int(low) >= room:\n",
        (f"{_NODES}::test_an_error_says_where_it_is",),
    ),
    Mutant(
        "a node list pads by its upper bound",
        "shardscale/comm/nodelist.py",
        ".zfill(len(low))",
        ".zfill(len(high))",
        (f"{_NODES}::test_a_list_is_written_out",),
    ),
    Mutant(
        "rank 0 tells a port that it has let go",
        "shardscale/comm/mpi_rendezvous.py",
        '    return listener, f"{host}:{listener.getsockname()[1]}"\n',
        """\
    address = f"{host}:{listener.getsockname()[1]}"
    listener.close()
    return listener, address
""",
        (f"{_SOCKETS}::test_ranks_of_one_host_meet_at_a_port_that_rank_0_already_has",),
    ),
    Mutant(
        "an address of this host alone is offered to others",
        "shardscale/comm/sockets.py",
        "    return not (ip.is_loopback or",
        "    return not (",
        (f"{_SOCKETS}::test_ranks_of_several_hosts_need_an_address_that_is_not_each_hosts_own",),
    ),
    Mutant(
        "an earlier life of a rank counts as present",
        "shardscale/comm/incarnation.py",
        "    word = uuid.uuid4().hex\n",
        '    word = f"rank {rank}"\n',
        (
            f"{_LIVES}::test_all_ranks_share_keys_that_no_earlier_life_has_written",
            f"{_LIVES}::test_a_rank_that_came_in_an_earlier_life_only_is_missing_in_this_one",
        ),
    ),
    Mutant(
        "two jobs that were given one port share their keys",
        "shardscale/comm/rendezvous.py",
        'slurm.step(environ) if env.source == "slurm" else ""',
        '""',
        (f"{_BRING_UP}::test_two_jobs_with_one_port_do_not_mix",),
    ),
    Mutant(
        "torch's client waits for a store by itself",
        "shardscale/comm/rendezvous.py",
        "        store = within(timeout_s, connect)\n",
        "        store = connect()\n",
        (f"{_BRING_UP}::test_a_taken_port_is_named_at_once_and_nobody_waits_for_ever",),
    ),
    Mutant(
        "the group keeps the patience of its start",
        "shardscale/bring_up.py",
        "    store.set_timeout(default_pg_timeout)\n",
        "",
        (f"{_BRING_UP}::test_a_slurm_step_meets_on_its_first_host",),
    ),
    Mutant(
        "two ranks on one GPU take NCCL",
        "shardscale/bring_up.py",
        "all(gpus) and len(set(gpus)) == len(gpus)",
        "all(gpus)",
        (f"{_BRING_UP}::test_rank_0_chooses_the_backend_from_the_gpus_of_all",),
    ),
    Mutant(
        "its own variables make a process another launcher's",
        "shardscale/bring_up.py",
        "if _ours.get(name) != value}",
        "if _ours is not value}",
        (f"{_BRING_UP}::test_a_process_alone_becomes_a_group_of_one",),
    ),
    Mutant(
        "jobs that share a node meet at one port",
        "launch/torchrun.py",
        "{_FIRST_PORT + int(job) % _NUM_PORTS}",
        "{_FIRST_PORT}",
        ("tests/launch/test_torchrun.py::test_jobs_that_share_a_node_do_not_meet",),
    ),
    Mutant(
        "every node of a job holds the meeting point",
        "launch/torchrun.py",
        "is_host={int(environ['SLURM_NODEID'] == '0')}",
        "is_host=1",
        ("tests/launch/test_torchrun.py::test_all_nodes_of_a_job_meet_on_the_first",),
    ),
    Mutant(
        "a Slurm that does not answer is said to refuse the job",
        "launch/slurm.py",
        '    "|Unable to contact slurm controller"\n',
        "",
        (f"{_SBATCH}::test_where_no_slurm_answers_it_says_where_to_go",),
    ),
    Mutant(
        "a job is requeued for ever",
        "launch/sbatch.py",
        "if ((restarts >= max_requeues)); then",
        "if ((restarts < 0)); then",
        (f"{_BATCH}::test_a_job_is_not_requeued_for_ever",),
    ),
    Mutant(
        "a job may ask for True nodes",
        "launch/sbatch.py",
        "(type(value) is not int or",
        "(not isinstance(value, int) or",
        ("tests/launch/test_sbatch.py::test_a_job_that_cannot_be_meant_is_refused",),
    ),
    Mutant(
        "a job may ask for any signal to stop at",
        "launch/sbatch.py",
        "if self.stop_signal not in _SIGNALS:",
        "if not self.stop_signal:",
        ("tests/launch/test_sbatch.py::test_a_job_that_cannot_be_meant_is_refused",),
    ),
    Mutant(
        "the number of nodes is copied into the batch script",
        "launch/sbatch.py",
        '--nnodes "$SLURM_JOB_NUM_NODES"',
        "--nnodes 2",
        (f"{_BATCH}::test_torchrun_takes_the_number_of_nodes_from_slurm",),
    ),
    Mutant(
        "the ranks are signalled once",
        "launch/sbatch.py",
        "        sleep 2\n",
        "        break\n",
        (f"{_BATCH}::test_the_signal_is_repeated_until_the_ranks_have_ended",),
    ),
    Mutant(
        "a step is signalled before its tasks can ignore it",
        "launch/sbatch.py",
        "((SECONDS < step_began + 5)) ||\n",
        "false ||\n",
        (f"{_BATCH}::test_a_step_that_has_just_begun_is_not_signalled",),
    ),
    Mutant(
        "a signal ends the rank that has no handler yet",
        "launch/sbatch.py",
        "trap '' $stop_signal",
        ":",
        (f"{_BATCH}::test_a_rank_that_has_no_handler_yet_outlives_the_signal",),
    ),
    Mutant(
        "torchrun says 1, however the rank has ended",
        "launch/torchrun.py",
        "sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)",
        "sys.exit(1)",
        ("tests/launch/test_torchrun.py::test_it_ends_as_its_first_rank_did[['85']-85]",),
    ),
    Mutant(
        "a rank on its way out hears the signal still",
        "shardscale/preemption.py",
        "signal.signal(self._number, signal.SIG_IGN)",
        "pass",
        (
            "tests/unit/test_preemption.py"
            "::test_a_process_on_its_way_out_is_not_ended_by_a_signal_that_is_ignored"
            "[stop.ignore()-0]",
        ),
    ),
]
