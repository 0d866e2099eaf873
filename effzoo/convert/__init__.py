"""Weights and configurations to and from transformers; the only place that imports its models, and only when called.

One file per layout, named in `layouts.FILES`, holds a reversible key map and the config fields as data.
`peft_files` writes and reads adapters in the files of the `peft` package, for the model of transformers that the key
map leads to.
"""

from effzoo.annotations import check_arguments
from effzoo.convert.exporting import to_transformers
from effzoo.convert.importing import from_transformers, load_pretrained
from effzoo.convert.source import source_of

__all__ = ["from_transformers", "load_pretrained", "source_of", "to_transformers"]

check_arguments(globals())
