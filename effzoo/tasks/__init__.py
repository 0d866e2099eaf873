"""Tasks that are generated, not downloaded: ListOps (Long Range Arena) and duplication (Reformer)."""

from effzoo.tasks.duplication import duplication
from effzoo.tasks.listops import ListOps, evaluate

__all__ = ["ListOps", "duplication", "evaluate"]
