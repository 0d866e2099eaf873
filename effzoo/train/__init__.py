"""Training: `finetune` (`run`), `predict`, the Trainer under it (`trainer`), batches (`batches`), data checks (`examples`), files (`checkpoints`)."""

from effzoo.train.predict import predict
from effzoo.train.run import Result, finetune

__all__ = ["Result", "finetune", "predict"]
