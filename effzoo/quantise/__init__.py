"""A frozen base in 8 or 4 bits: codes of a matrix (`codes`), the site that multiplies with them (`linear`), and a whole model (`model`)."""

from effzoo.quantise.linear import QuantisedLinear
from effzoo.quantise.model import Footprint, dequantise, quantise

__all__ = ["Footprint", "QuantisedLinear", "dequantise", "quantise"]
