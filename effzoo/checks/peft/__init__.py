"""What every PEFT method must hold, the specific before the general: the first red line explains most."""

from __future__ import annotations

from effzoo.checks.peft import against, laws, learning, tensors
from effzoo.checks.peft.subject import Subject
from effzoo.checks.peft.tensors import merges_by_delta
from effzoo.checks.runner import Check

CHECKS: tuple[Check, ...] = (
    learning.declares_itself, learning.attaches, tensors.tensors_are_registered, tensors.sites_share_nothing,
    tensors.evaluation_draws_nothing, learning.starts_as_identity, learning.base_is_frozen,
    learning.everything_learns, tensors.low_rank_scale, tensors.dropout_acts_in_training,
    learning.learns_under_checkpointing,
    learning.learns_in_reversible_blocks, learning.runs_in_half_precision, laws.positions_computed_alone,
    laws.keys_are_kept, laws.saves_and_loads, laws.finishes, laws.detaches, laws.merges,
    laws.adapters_are_independent, laws.serves_mixed_batches, laws.copies,
)  # fmt: skip

__all__ = ["CHECKS", "Subject", "against", "merges_by_delta"]
