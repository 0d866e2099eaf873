"""Training: `finetune` (`run`), `predict`, the Trainer under it (`trainer`), batches (`batches`), data checks
(`examples`), files (`checkpoints`), and learning from a teacher (`distillation`, `teaching`)."""

from effzoo.annotations import check_arguments
from effzoo.train.distillation import Distillation
from effzoo.train.predict import predict
from effzoo.train.result import Result
from effzoo.train.run import finetune
from effzoo.train.settings import Optimisation, Saving

__all__ = ["Distillation", "Optimisation", "Result", "Saving", "finetune", "predict"]

check_arguments(globals())
