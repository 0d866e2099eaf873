"""What every attention kind must hold, the cause before what follows from it: the first red line explains most."""

from __future__ import annotations

from effzoo.checks import cost, definition, diagnose, masking, sources, state
from effzoo.checks.runner import Check
from effzoo.checks.subject import Subject

CHECKS: tuple[Check, ...] = (
    definition.declares_itself, definition.projections_match, definition.shape_and_dtype, definition.every_length,
    state.evaluation_draws_nothing, state.dropout_only_in_training, diagnose.is_no_known_slip,
    masking.rows_are_independent, masking.padding_is_invisible, masking.empty_queries_are_zero,
    state.calls_leave_nothing, masking.future_is_unseen, masking.ragged_equals_alone,
    masking.future_changes_nothing, definition.equals_definition, definition.gradients_are_derivatives,
    masking.global_tokens, sources.memory_is_attended, sources.crosses_to_a_source, sources.cache_equals_forward,
    sources.project_is_the_linear, state.dropout_keeps_the_mean, state.copies_are_equal,
    state.decisions_are_replayed, definition.runs_under_autocast, state.devices, state.compiles,
    cost.cost_grows_as_declared,
)  # fmt: skip

__all__ = ["CHECKS", "Subject"]
