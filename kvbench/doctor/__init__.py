"""The checks of ``kvbench doctor``: whether the guarantees of the harness hold on this model and machine."""

from collections.abc import Callable

from kvbench.doctor import checks, model_checks
from kvbench.doctor.checks import Check, run_check
from kvbench.doctor.examined import Subject, make_subject

CHECKS: tuple[Callable[[Subject], Check], ...] = (
    checks.targets_are_scored_once, model_checks.rotations_are_those_of_one_pass, model_checks.layers_rotate_as_assumed,
    model_checks.bytes_are_those_cached, checks.nothing_removed_is_full, checks.batches_change_nothing,
    checks.documents_leave_nothing_behind, checks.masked_is_removed, model_checks.chosen_is_masked,
    model_checks.policies_see_attention, checks.removed_is_freed, checks.intervals_are_right, checks.halves_are_alike,
    checks.time_repeats,
)
"""In the order in which they are made; the one that needs an idle machine comes last."""

__all__ = ["CHECKS", "Check", "Subject", "make_subject", "run_check"]
