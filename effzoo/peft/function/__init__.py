"""Function composition, phi(f(x)): methods that transform what a site receives or returns."""

from effzoo.peft.function import houlsby, ia3, parallel, pfeiffer

__all__ = ["houlsby", "ia3", "parallel", "pfeiffer"]
