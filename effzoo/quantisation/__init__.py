"""A frozen base in 8 or 4 bits: the site that multiplies with codes (`linear`), and a whole model (`model`)."""

from effzoo.annotations import check_arguments
from effzoo.quantisation.linear import QuantisedLinear
from effzoo.quantisation.model import Footprint, dequantise, quantise

__all__ = ["Footprint", "QuantisedLinear", "dequantise", "quantise"]

check_arguments(globals())
