"""A model of effzoo with the methods and outputs of transformers."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.hub import convert_file_size_to_int

from effzoo import generation, zoo
from effzoo.architectures import AnyModel, EncoderDecoder, Transformer
from effzoo.architectures.heads import known_problem, problem_of
from effzoo.attention.core import Cache
from effzoo.checked import IGNORED
from effzoo.errors import IncompatibleError, InputError, OptionError, shown
from effzoo.folder.description import GENERATION
from effzoo.folder.saving import write
from effzoo.peft.attach import attached, disabled
from effzoo.sharding import is_split
from effzoo.sites import Around, TiedLinear, unwrap
from effzoo.transformers.config import TOKENS, EffzooConfig
from effzoo.transformers.loading import has_labels, inner_of_folder
from effzoo.vocabulary import resize_vocabulary

Inner = AnyModel
FOR_THE_HUB = ("repo_id", "token", "commit_message", "private")
NEUTRAL = {"safe_serialization": True, "save_peft_format": True, "save_original_format": True}  # ask for nothing


class EffzooPreTrainedModel(Around, PreTrainedModel):  # type: ignore[no-untyped-call]
    """A model of effzoo for the task that the class names, as a PreTrainedModel.

    config: an EffzooConfig. The model is drawn from it, as `effzoo.build` draws it.
    model: one that is there instead, which is shared, not copied (`wrap`).

    `inner` is the model of effzoo.
    """

    config_class = EffzooConfig
    config: EffzooConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch
    task: ClassVar[str] = "features"
    output_class: ClassVar[Any] = BaseModelOutputWithPooling

    def __init__(self, config: EffzooConfig, *, model: Inner | None = None):
        PreTrainedModel.__init__(self, config)
        if model is None:
            model = zoo.made(config.sizes, self.task, (config.num_labels or 2) if has_labels(self.task) else 2)
            config.follow(model)
        if isinstance(model, EncoderDecoder) and self.task == "features":
            raise IncompatibleError(
                f"{type(self).__name__} reads one text, and an encoder-decoder two; build it with task='seq2seq_lm', "
                "which EffzooForSeq2SeqLM computes"
            )
        if model.task != self.task:
            raise IncompatibleError(
                f"{type(self).__name__} computes the task {self.task!r}, and the model {model.task!r}; "
                "effzoo.transformers.wrap(model) chooses the class"
            )
        self.__dict__["inner"] = model
        for shared in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[shared] = model.__dict__[shared]
        self.training = model.training
        self.all_tied_weights_keys: dict[str, str] = {}
        self._seen = dataclasses.replace(model.config)
        self._noted = known_problem(model)
        self._entries = frozenset(f.name for f in dataclasses.fields(self.output_class))

    @property
    def num_labels(self) -> int:
        """How many labels the head that acts tells apart."""
        return self.inner.num_labels

    # loading and saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **given: Any) -> Any:
        """The model of a folder that `effzoo.save` or `save_pretrained` wrote, in evaluation mode.

        config, dtype, device_map, output_loading_info, generation_config, and where the hub keeps files (cache_dir,
        revision, subfolder, token, force_download, local_files_only) are those of transformers. The files are compared
        with their hashes as `effzoo.load` does. Another head than that of the folder (another class, or another
        num_labels) is new, which a warning says.

        Raises FileError for damaged and strange files, OptionError for what has no meaning here.
        """
        config, generation_config = given.pop("config", None), given.pop("generation_config", None)
        wants_info = given.pop("output_loading_info", False)
        if args:
            raise OptionError(f"from_pretrained takes a folder and keywords, got {shown(args[0])} besides")
        inner, config, info, folder = inner_of_folder(cls, pretrained_model_name_or_path, config, given)
        model = cls(config, model=inner)
        if model.can_generate():
            if generation_config is not None:
                model.generation_config = copy.deepcopy(generation_config)
            elif (folder / GENERATION).is_file():
                model.generation_config = GenerationConfig.from_pretrained(folder)
        model.name_or_path = config.name_or_path
        return (model, info) if wants_info else model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        **given: Any,
    ) -> None:
        """`effzoo.save`: a folder that `effzoo.load` and `from_pretrained` open.

        Names of labels are those of `config.id2label`, and `generation_config` is kept. Tensors of adapters are also
        among the weights, where a Trainer looks for them.

        is_main_process: whether this process writes.
        state_dict: has to be that of the model.
        max_shard_size: of a file, such as "2GB"; 5 GB where it is left out.
        push_to_hub: also upload it, to `repo_id`, or the name of the folder.
        """
        if Path(save_directory).is_file():
            raise OptionError(f"{save_directory} is a file; give a folder")
        for name, value in given.items():
            if name not in FOR_THE_HUB and value not in (None, NEUTRAL.get(name)):
                raise OptionError(f"save_pretrained takes no {name}={shown(value)} here; leave it out")
        if any(is_split(tensor) for tensor in self.parameters()):
            raise IncompatibleError(
                "the model is split over processes; call effzoo.save(model, folder) in each, and the first writes"
            )
        if state_dict is not None:
            self._check_state(state_dict)
        self._follow()
        self._note_problem()
        if not is_main_process:
            return
        also = {key: value for key in ("problem_type",) if (value := getattr(self.config, key, None)) is not None}
        files = {}
        if self.can_generate():
            self._keep_generation()
            files[GENERATION] = self.generation_config.to_json_string().encode()
        labels = self.config.label_names if has_labels(self.task) else ()
        write(
            self.inner, save_directory, labels=labels or None, also=also, adapters_too=bool(attached(self.inner)),
            files=files, limit=None if max_shard_size is None else convert_file_size_to_int(max_shard_size),
        )  # fmt: skip
        if push_to_hub:
            named = {name: given[name] for name in FOR_THE_HUB[1:] if name in given}
            self.push_to_hub(given.get("repo_id", Path(save_directory).name), **named)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload a model of effzoo",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Save the model to a temporary folder, and upload that to a repository of the hub.

        The repository is made if there is none. Return the commit. The arguments are those of huggingface_hub.
        """
        hub = HfApi(token=token)
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision,
                create_pr=create_pr,
            )  # fmt: skip

    def _check_state(self, state: dict[str, Tensor]) -> None:
        """Raise for tensors that are not those of the model."""
        mine = self.state_dict()
        for key in (*state, *mine):
            if key not in state or key not in mine or not torch.equal(state[key].to(mine[key].device), mine[key]):
                raise IncompatibleError(
                    f"state_dict has another {key} than the model; load it first, with model.load_state_dict"
                )

    def _follow(self) -> None:
        """Special tokens that were set in the configuration, in the model; what was changed there, here."""
        now = {field: self.config.config.get(field) for field in TOKENS.values() if hasattr(self.inner.config, field)}
        now = {field: tuple(value) if isinstance(value, list) else value for field, value in now.items()}
        if now != {field: getattr(self._seen, field) for field in now}:
            self._change(**now)
        elif self.inner.config != self._seen:
            self.config.follow(self.inner)
        else:
            return
        self._seen = dataclasses.replace(self.inner.config)

    def _change(self, **fields: Any) -> None:
        changed: Any = dataclasses.replace(self.inner.config, **fields)
        self.inner.config = self.inner.embeddings.config = changed
        self.config.follow(self.inner)

    def _keep_generation(self) -> None:
        """What was changed in generation_config, in the configuration of effzoo, where `effzoo.generate` reads it."""

    # modules

    def train(self, mode: bool = True) -> Any:
        """Training or evaluation mode, of both."""
        self.inner.training = mode
        return super().train(mode)

    def init_weights(self) -> None:
        """Nothing: effzoo has drawn them."""

    def tie_weights(self, *given: Any, **more: Any) -> None:
        """Nothing: a tied head reads the embedding itself."""

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        token = self.inner.embeddings.token
        if token is None:
            raise IncompatibleError(f"{self.inner.config.name} reads arrays of numbers, so it has no token embedding")
        return token

    def set_input_embeddings(self, value: nn.Module) -> None:
        """IncompatibleError: adapters and files know the embedding that is there."""
        raise IncompatibleError("the token embedding is not replaced; resize_token_embeddings gives it more tokens")

    def get_output_embeddings(self) -> Any:
        """The last layer of a language-model head, with `weight` and `bias`; None without such a head."""
        return LastLayer(self.inner) if self.task.endswith("_lm") else None

    @property
    def base_model(self) -> Any:
        """The model without its head: what it returns has last_hidden_state and no logits."""
        return self if self.task == "features" else Body(self)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """IncompatibleError, as `set_input_embeddings`."""
        self.set_input_embeddings(new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """`effzoo.resize_vocabulary`, which may also shrink here; return the token embedding."""
        wanted = self.inner.config.vocab if new_num_tokens is None else new_num_tokens
        init = "mean" if mean_resizing else "normal"
        resize_vocabulary(self.inner, wanted, init=init, multiple_of=pad_to_multiple_of or 1, shrink=True)  # type: ignore[arg-type]
        self.config.follow(self.inner)
        return self.get_input_embeddings()

    def activation_checkpointing_enable(self, *given: Any, **more: Any) -> None:
        """Gradient checkpointing: `model.inner.recompute = "blocks"`."""
        self.inner.activation_checkpointing_enable(*given, **more)

    def gradient_checkpointing_enable(self, *given: Any, **more: Any) -> None:
        """`activation_checkpointing_enable` under its older name."""
        self.inner.gradient_checkpointing_enable(*given, **more)

    def activation_checkpointing_disable(self) -> None:
        """`model.inner.recompute = "nothing"`, where it was "blocks"."""
        self.inner.activation_checkpointing_disable()

    def gradient_checkpointing_disable(self) -> None:
        """`activation_checkpointing_disable` under its older name."""
        self.inner.activation_checkpointing_disable()

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether only the inputs of blocks are stored."""
        return self.inner.is_activation_checkpointing

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether only the inputs of blocks are stored."""
        return self.inner.is_activation_checkpointing

    # computing

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        task_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """What `inner` computes, as an output of transformers, or as a tuple for return_dict=False.

        See `effzoo.architectures.Transformer.forward`. token_type_ids that are all 0 may be given to a model without
        token types.

        num_items_in_batch: how many labels there are in all parts of an accumulated batch; the loss is then that of
            this part's labels over that number, so that the losses of the parts add up to the mean.
        """
        return self._computed(
            output_hidden_states, output_attentions, return_dict, num_items_in_batch, input_ids=input_ids,
            attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids,
            inputs_embeds=inputs_embeds, global_attention_mask=global_attention_mask, labels=labels, task_ids=task_ids,
        )  # fmt: skip

    def _computed(
        self, hidden_states: bool | None, attentions: bool | None, return_dict: bool | None, items: Any = None,
        **given: Any,
    ) -> Any:  # fmt: skip
        self._follow()
        types = given.get("token_type_ids")
        if types is not None and not getattr(self.inner.config, "types", 0) and not bool(types.any()):
            del given["token_type_ids"]
        if self.config.output_hidden_states if hidden_states is None else hidden_states:
            given["output_hidden_states"] = True
        if self.config.output_attentions if attentions is None else attentions:
            given["output_attentions"] = True
        given = {name: value for name, value in given.items() if value is not None}
        for name in given:
            if name not in _parameters(type(self.inner)):
                raise InputError(f"a {type(self.inner).__name__} takes no {name}; leave it out")
        self._check_problem(given.get("labels"))
        out = self.inner(**given)
        if given.get("labels") is not None and not torch.compiler.is_compiling():
            self._note_problem()
        if items is not None and out.loss is not None:
            labels = given["labels"][:, 1:] if self.task == "causal_lm" else given["labels"]
            out["loss"] = out.loss * (labels != IGNORED).sum() / items
        return self._output(out, given.get("cache"), return_dict)

    def _check_problem(self, labels: Tensor | None) -> None:
        """Raise where `config.problem_type` names another loss than that of the labels' dtype."""
        said = self.config.problem_type
        if labels is None or said in (None, self._noted) or self.task != "classification":
            return
        computed = problem_of(labels, self.inner.num_labels)
        if said != computed:
            raise InputError(
                f"config.problem_type is {said!r}, and labels of {labels.dtype} for {self.inner.num_labels} labels are "
                f"{computed!r} here; give labels of another dtype, or set problem_type to that"
            )

    def _note_problem(self) -> None:
        """Say in the configuration what the labels are, as transformers does, where the user has not said it."""
        known: Any = known_problem(self.inner)
        if self.config.problem_type in (None, self._noted) and self.config.problem_type != known:
            self.config.problem_type = self._noted = known

    def _output(self, out: Any, cache: Cache | None, return_dict: bool | None) -> Any:
        entries = {name: value for name, value in out.items() if name in self._entries}
        if cache is not None:
            entries["past_key_values"] = cache
        made = self.output_class(**entries)
        return made if (self.config.return_dict if return_dict is None else return_dict) else made.to_tuple()


class Body:
    """`body(...)` is the output without a head, of the same arguments as the model's."""

    def __init__(self, outer: EffzooPreTrainedModel, inside: Callable[[], Sequence[Any]] = tuple):
        self.outer, self.inside = outer, inside

    def __call__(self, *args: Any, **given: Any) -> BaseModelOutputWithPooling:
        """last_hidden_state, and hidden_states and attentions where they are asked for."""
        inner = self.outer.inner
        if not isinstance(inner, Transformer):
            raise IncompatibleError(f"a {type(inner).__name__} is not computed without its head; call the model")
        given |= dict(zip(("input_ids", "attention_mask"), args, strict=False))
        with ExitStack() as stack:
            for context in (*self.inside(), inner.without_head()):
                stack.enter_context(context)
            out = inner(**{name: value for name, value in given.items() if name not in ("use_cache", "return_dict")})
        if "balance_loss" in out:
            raise IncompatibleError(
                "who computes the loss outside the model leaves out the loss that balances its experts; train it with "
                "effzoo.finetune or transformers.Trainer, which take the model's own"
            )
        return BaseModelOutputWithPooling(**out)


class LastLayer(nn.Module):
    """The last layer of a language-model head: logits = x W^T + b, with W the token embedding where the head is tied.

    Raises IncompatibleError where an adapter acts on it, which who reads weight and bias would pass by.
    """

    inner: Any

    def __init__(self, inner: Inner):
        super().__init__()
        self.__dict__["inner"] = inner
        site = self.inner.head.out
        for part in (site, self.inner.embeddings.token) if isinstance(site, TiedLinear) else (site,):
            if any(True for _ in part.hung()):
                raise IncompatibleError(
                    f"an adapter hangs on {part.role}, and a trainer that reads the weight of the language-model head "
                    "passes it by; attach the adapter without that target"
                )

    @property
    def weight(self) -> Tensor:
        """W [vocab, dim]."""
        site = self.inner.head.out
        return cast(Tensor, (self.inner.embeddings.token if isinstance(site, TiedLinear) else site).weight)

    @property
    def bias(self) -> Tensor | None:
        """b [vocab], or None."""
        return cast("Tensor | None", self.inner.head.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return nn.functional.linear(x, self.weight, self.bias)


def _cache(given: Any, use_cache: bool | None) -> Cache | None:
    """The cache of a call, a new one where it is wanted and none is given."""
    if given is not None and not isinstance(given, Cache):
        raise InputError(
            f"past_key_values is an effzoo.attention.Cache, got {type(given).__name__}; give use_cache=True in the "
            "first call and take that of its output"
        )
    return Cache() if given is None and use_cache else given


def _parameters(cls: type) -> Any:
    return inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]


class EffzooModel(EffzooPreTrainedModel):  # type: ignore[no-untyped-call]
    """Hidden states, and the pooler's output of models that were trained with a pooler."""


class EffzooForSequenceClassification(EffzooPreTrainedModel):  # type: ignore[no-untyped-call]
    """One label for each sequence."""

    task = "classification"
    output_class = SequenceClassifierOutput


class EffzooForTokenClassification(EffzooPreTrainedModel):  # type: ignore[no-untyped-call]
    """One label for each token."""

    task = "token_classification"
    output_class = TokenClassifierOutput


class EffzooForQuestionAnswering(EffzooPreTrainedModel):  # type: ignore[no-untyped-call]
    """Where the answer starts and ends in the tokens."""

    task = "question_answering"
    accepts_loss_kwargs = False
    output_class = QuestionAnsweringModelOutput

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        task_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """As `EffzooPreTrainedModel.forward`.

        start_positions, end_positions int[batch]: the first and the last token of the answer; one behind the last token
            does not count, as in transformers.
        """
        labels = None
        if start_positions is not None or end_positions is not None:
            if start_positions is None or end_positions is None:
                raise InputError("give start_positions and end_positions together")
            labels = torch.stack([start_positions.flatten(), end_positions.flatten()], dim=1)
            n = cast(Tensor, input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            labels = labels.masked_fill(labels >= n, IGNORED)
        return self._computed(
            output_hidden_states, output_attentions, return_dict, input_ids=input_ids, attention_mask=attention_mask,
            token_type_ids=token_type_ids, position_ids=position_ids,
            inputs_embeds=inputs_embeds, global_attention_mask=global_attention_mask, labels=labels, task_ids=task_ids,
        )  # fmt: skip

    def _output(self, out: Any, cache: Cache | None, return_dict: bool | None) -> Any:
        start, end = (x.contiguous() for x in out["logits"].unbind(-1))
        return super()._output({**out, "start_logits": start, "end_logits": end}, cache, return_dict)


class EffzooForMaskedLM(EffzooPreTrainedModel):  # type: ignore[no-untyped-call]
    """Logits over the vocabulary at each token of an encoder."""

    task = "masked_lm"
    output_class = MaskedLMOutput


class EffzooForCausalLM(EffzooPreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """Logits of the next token at each token of a decoder; `generate` as in transformers."""

    task = "causal_lm"
    output_class: ClassVar[Any] = CausalLMOutputWithPast

    def __init__(self, config: EffzooConfig, *, model: Inner | None = None):
        super().__init__(config, model=model)
        self.generation_config = generation.config_of(self.inner.config)

    def _keep_generation(self) -> None:
        now, before = self.generation_config.to_diff_dict(), generation.config_of(self.inner.config).to_diff_dict()
        if now != before:
            kept = {
                key: value for key, value in now.items() if key not in ("transformers_version", "_from_model_config")
            }
            self._change(generation=json.loads(json.dumps(kept)))

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        task_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """As `EffzooPreTrainedModel.forward`.

        past_key_values: an `effzoo.attention.Cache`, which this call writes on; with use_cache=True a new one.
        logits_to_keep: logits of the last so many positions alone, or of those that a tensor numbers; 0 for all.
        """
        cache = _cache(past_key_values, use_cache)
        out = self._computed(
            output_hidden_states, output_attentions, True, num_items_in_batch, input_ids=input_ids,
            attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids,
            inputs_embeds=inputs_embeds, global_attention_mask=global_attention_mask, labels=labels, task_ids=task_ids,
            cache=cache,
        )  # fmt: skip
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            out.logits = out.logits[:, kept]
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **given: Any
    ) -> Any:
        """Continue token ids, with the arguments of transformers' `generate` and the engine of `effzoo.generate`.

        Settings are those of `generation_config`, or of the model's, and of the keywords.
        """
        self._follow()
        ids = inputs if inputs is not None else given.pop("input_ids", None)
        if given.get("input_ids") is not None:
            raise InputError("give the prompt once, as inputs or as input_ids")
        return generation.continued(self, self.inner, ids, generation_config, given)


class EffzooForSeq2SeqLM(EffzooForCausalLM):  # type: ignore[no-untyped-call]
    """Logits of the target at each token that the decoder reads; `generate` writes a target for each source."""

    task = "seq2seq_lm"
    output_class = Seq2SeqLMOutput

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        task_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """As `effzoo.architectures.EncoderDecoder.forward`; past_key_values, use_cache: as of a decoder."""
        return self._computed(
            output_hidden_states, output_attentions, return_dict, num_items_in_batch, input_ids=input_ids,
            attention_mask=attention_mask, decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask, encoder_outputs=encoder_outputs, inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds, global_attention_mask=global_attention_mask, labels=labels,
            task_ids=task_ids, cache=_cache(past_key_values, use_cache),
        )  # fmt: skip

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """What the decoder reads to predict these labels, as collators of transformers ask for it."""
        return cast(EncoderDecoder, self.inner).shifted(labels)


class WithoutAdapters(EffzooForCausalLM):  # type: ignore[no-untyped-call]
    """A decoder that shares the weights of another and computes what that computes while its adapters are disabled, in
    evaluation mode. Made by `without_adapters`."""

    def forward(self, *given: Any, **more: Any) -> Any:
        """As `EffzooForCausalLM.forward`."""
        with disabled(self.inner), evaluating(self.inner):
            return super().forward(*given, **more)

    @property
    def base_model(self) -> Any:
        """The model without its head."""
        return Body(self, lambda: (disabled(self.inner), evaluating(self.inner)))

    def train(self, mode: bool = True) -> Any:
        """Nothing: the weights are another model's, and this one stays in evaluation mode."""
        return self


def without_adapters(model: nn.Module) -> EffzooPreTrainedModel:
    """A decoder, sharing the weights, that computes what the model computes while its adapters are disabled.

    It is the reference of preference training: `DPOTrainer(model, ref_model=without_adapters(model), ...)` keeps one
    copy of the base. Raises IncompatibleError for what is no decoder with a language-model head.
    """
    inner = unwrap(model)
    if not isinstance(inner, Transformer) or inner.task != "causal_lm":
        raise IncompatibleError(
            f"without_adapters takes a decoder with task='causal_lm', got {type(inner).__name__} with task "
            f"{getattr(inner, 'task', None)!r}"
        )
    made = WithoutAdapters(EffzooConfig.of(inner), model=inner)
    made.training = False
    return made


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; each module then has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


CLASSES: dict[str, type[EffzooPreTrainedModel]] = {
    cls.task: cls
    for cls in (
        EffzooModel,
        EffzooForSequenceClassification,
        EffzooForTokenClassification,
        EffzooForQuestionAnswering,
        EffzooForMaskedLM,
        EffzooForCausalLM,
        EffzooForSeq2SeqLM,
    )
}


def wrap(model: nn.Module) -> EffzooPreTrainedModel:
    """A model of effzoo as a model of transformers, whose class is that of its task. The two share everything.

    It is the same each time, and that whose `generate`, `device`, ... the model of effzoo has.

    Raises IncompatibleError for what is no model of effzoo.
    """
    if isinstance(model, EffzooPreTrainedModel):
        return model
    inner = unwrap(model)
    if not isinstance(inner, AnyModel):
        raise IncompatibleError(f"wrap takes a model of effzoo, got {type(inner).__name__}")
    return cast(EffzooPreTrainedModel, inner._pretrained())


def wrapped(inner: Inner) -> EffzooPreTrainedModel:
    """A new model of transformers around one of effzoo."""
    return CLASSES[inner.task](EffzooConfig.of(inner), model=inner)
