from effzoo import attach, finetune
from effzoo.train import Saving

LENGTH = 256  # tokens of a review that are read, at most 2,048
LAYERS = 1  # of MiniLM that are kept, at most 6
ATTENTION = "full"  # a kind of the zoo, or one that this file registers


def adapt(model, train):
    """Attach a method to the frozen model and fine-tune it, in place.

    train: 400 reviews, each {"input_ids": list of at most LENGTH tokens, "labels": 0 or 1}.
    """
    raise NotImplementedError("attach and finetune here")
