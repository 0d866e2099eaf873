"""Time, memory and saved activations, measured: ratios of what runs in turns, peaks of processes of their own, results
as JSON lines."""

from effzoo.measure.layer import Case, Mode, wrong
from effzoo.measure.memory import Peak, peak
from effzoo.measure.scaling import Scaling, crossovers
from effzoo.measure.timing import Ratio, Times, interleaved, ratio

__all__ = ["Case", "Mode", "Peak", "Ratio", "Scaling", "Times", "crossovers", "interleaved", "peak", "ratio", "wrong"]
