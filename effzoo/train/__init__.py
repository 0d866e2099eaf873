"""Training: `finetune` (`run`), `predict`, `embed`, its loop (`loop`), batches (`batches`), data checks
(`examples`), files (`checkpoints`), and learning from a teacher (`distillation`, `teaching`)."""

from effzoo.annotations import check_arguments
from effzoo.train.callbacks import Callback
from effzoo.train.distillation import Distillation
from effzoo.train.predict import embed, predict
from effzoo.train.result import Result
from effzoo.train.run import finetune
from effzoo.train.settings import Optimisation, Saving

__all__ = ["Callback", "Distillation", "Optimisation", "Result", "Saving", "embed", "finetune", "predict"]

check_arguments(globals())
