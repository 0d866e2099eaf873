"""Dropout does not ask whether the model trains."""

from effzoo.attention import register
from effzoo.attention.longformer import Longformer

KILLED_BY = "dropout_only_in_training"


@register("mutant")
class Mutant(Longformer):
    """Longformer attention that always drops."""

    @property
    def dropout(self):
        return self.context.dropout
