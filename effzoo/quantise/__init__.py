"""A frozen base in 8 or 4 bits: codes of a matrix (`codes`), the site that multiplies with them (`linear`), and a whole
model (`model`)."""

from functools import partial

from effzoo.annotations import check_arguments
from effzoo.peft import rounded
from effzoo.quantise.codes import BITS, coded, decoded
from effzoo.quantise.linear import QuantisedLinear
from effzoo.quantise.model import Footprint, dequantise, quantise

__all__ = ["Footprint", "QuantisedLinear", "dequantise", "quantise"]

rounded.CODERS.update({bits: (partial(coded, bits=bits), partial(decoded, bits=bits)) for bits in BITS})

check_arguments(globals())
