"""Tasks that are generated, not downloaded: ListOps (Long Range Arena), duplication (Reformer), and domains with maps
of their own (for routing)."""

from effzoo.tasks.domains import domains
from effzoo.tasks.duplication import duplication
from effzoo.tasks.listops import ListOps, evaluate

__all__ = ["ListOps", "domains", "duplication", "evaluate"]
