"""The lab: every experiment of the lectures at one command, `effzoo lab NAME`, and its analyses as plain functions.

`experiment.py` is the contract, `experiments/` holds one file per experiment, `analyses/` what they compute, for any
    model. `texts.py` and
`images.py` bring the data, `fit.py` trains.
"""

from effzoo.lab.experiment import DECKS, Claim, Experiment, Findings, Run, Table, catalogue, experiment, get
from effzoo.lab.report import perform

__all__ = ["DECKS", "Claim", "Experiment", "Findings", "Run", "Table", "catalogue", "experiment", "get", "perform"]
