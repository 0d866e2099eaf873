"""More tokens, or fewer, for a model that has weights: its token embedding and language-model head are resized."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from effzoo.architectures import AnyModel, Perceiver
from effzoo.errors import AdapterError, IncompatibleError, OptionError, TooLargeError, did_you_mean
from effzoo.memory import free
from effzoo.peft.merging import merged_tensors
from effzoo.peft.state import transition
from effzoo.sites import Embedding, Growing, Linear, PeftModule, Site, TiedLinear, opens, sites, unwrap

M = TypeVar("M", bound=nn.Module)
Init = Literal["mean", "normal"]
ROLES = ("embed.token", "lm.out")  # the sites whose weights have an entry for each token
SPREAD = 1e-9  # of the covariance, and of a bias's standard deviation, as in transformers


@torch.no_grad()
def resize_vocabulary(
    model: M, n: int, *, init: Init = "mean", multiple_of: int = 1, shrink: bool = False, seed: int = 0
) -> M:
    """Give the token embedding and the language-model head `n` tokens, in place; return the model.

    What is there keeps its values, dtype, device and requires_grad; a tied head reads the resized embedding. Added
    tokens have, with m the mean and C the covariance of the embeddings that were there,

        e ~ N(m, 1e-9 C)   ("mean": about as likely as an average token; old probabilities hardly move)
        e ~ N(0, 0.02^2)   ("normal": as in a model that is built anew)

    as `resize_token_embeddings` of transformers does (Hewitt 2021, Initializing new word embeddings for pretrained
    language models, nlp.stanford.edu/~johnhew/vocab-expansion.html). m alone is taken where C is not positive definite,
    as with fewer tokens than dimensions. Added biases are 0 in a tied head, and in another about the mean of its
    biases (0 for "normal").

    n: tokens afterwards; they are added, or taken away, at the end.
    init: "mean" or "normal".
    multiple_of: n is rounded up to a multiple of this.
    shrink: whether n may be smaller than before; the last tokens are then lost.
    seed: of the draw, which leaves torch's own random state alone: copies of a model get the same tokens.

    The parameters are new objects: make the optimizer afterwards. Adapters stay attached, and change nothing of an
    added token at first. An adapter that was saved before does not load any more, since the base is another.

    Raises OptionError for numbers that are none, TooLargeError for more tokens than memory has room for,
        IncompatibleError for a model without tokens, a quantised head, or an adapter that cannot follow, AdapterError
        for one that is merged into these weights; the model is then unchanged.
    """
    outer, model = model, unwrap(model)
    token = _token(model)
    old = token.num_embeddings
    n = _checked(n, multiple_of, init, seed, old, shrink)
    if n == old:
        return outer
    tables = {path: site for path, site in sites(model) if site.role in ROLES}
    _check_sites(model, tables, n, old)
    with transition(outer):
        draw = torch.Generator().manual_seed(seed)
        new = {path: _resized(site, n, init, draw) for path, site in tables.items()}
        table = next(tensors for path, tensors in new.items() if tables[path] is token)  # which a tied head reads
        grown = [(module, table | new[path]) for path, site in tables.items() for module in _hung(site)]
        for path, site in tables.items():
            for name, tensor in new[path].items():
                parameter = getattr(site, name)
                setattr(site, name, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
            if isinstance(site, Embedding):
                site.num_embeddings = n
            elif isinstance(site, Linear | TiedLinear):
                site.out_features = n
        for module, tensors in grown:
            added = {name: tensor[old:] for name, tensor in tensors.items()}
            cast(Growing, module).grow(added.get("weight"), added.get("bias"))
        token.added = max(0, token.added + n - old)
        assert isinstance(model, AnyModel)
        model.config = model.embeddings.config = dataclasses.replace(model.config, vocab=n)
        if isinstance(model, Perceiver):
            model.embeddings.sizes = model.config.inputs()
    return outer


def _token(model: nn.Module) -> Embedding:
    """The token embedding."""
    if not isinstance(model, AnyModel):
        raise IncompatibleError(f"resize_vocabulary changes a model of effzoo, got {type(model).__name__}")
    token = model.embeddings.token
    if token is None:
        raise IncompatibleError(
            f"{model.config.name} reads arrays of numbers, so it has no vocabulary; build it "
            "with vocab=... to read tokens"
        )
    return token


def _checked(n: int, multiple_of: int, init: str, seed: int, old: int, shrink: bool) -> int:
    """How many tokens there are afterwards; OptionError for a number that is none, or a smaller one without shrink."""
    for name, value, least in (("n", n, 1), ("multiple_of", multiple_of, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"resize_vocabulary: {name} is a whole number of at least {least}, got {value!r}")
    if seed >= 2**63:
        raise OptionError(f"resize_vocabulary: seed is below 2^63, got {seed}")
    if init not in get_args(Init):
        raise OptionError(
            f"resize_vocabulary: init is 'mean' or 'normal', got {init!r}{did_you_mean(init, get_args(Init))}"
        )
    n = -(-n // multiple_of) * multiple_of
    if n < old and not shrink:
        raise OptionError(
            f"resize_vocabulary: {n} tokens are fewer than the {old} there are, and the last {old - n} "
            "would be lost; give shrink=True"
        )
    return n


def _check_sites(model: nn.Module, tables: dict[str, Site], n: int, old: int) -> None:
    """Raise for what cannot be resized, before anything is allocated."""
    pad = getattr(model.config, "pad_token", None)
    if pad is not None and n < old and pad >= n:
        raise OptionError(f"resize_vocabulary: pad_token {pad} is not in a vocabulary of {n}; keep at least {pad + 1}")
    for path, site in tables.items():
        if getattr(site, "bits", None):
            raise IncompatibleError(
                f"{path} is quantised, and tokens cannot be added to codes; resize first and quantise then, or call "
                "effzoo.dequantise"
            )
        for module in _hung(site):
            grows = isinstance(module, Growing)
            if not grows or n < old:
                what = f"{type(module).__name__} on {path}"
                reason = "cannot lose tokens" if grows else "numbers or mixes the tokens there are, so it cannot follow"
                raise IncompatibleError(
                    f"resize_vocabulary: the adapter's {what} {reason}; detach or merge the "
                    "adapter first, and attach it anew"
                )
    for name, keys in merged_tensors(model).items():
        if touched := [key for key in keys if key.rpartition(".")[0] in tables]:
            raise AdapterError(
                f"adapter {name!r} is merged into {touched[0]}, and unmerge would put {old} tokens back; unmerge it "
                "first, or merge it with undo=False"
            )
    like = next(iter(tables.values()))
    needed = sum(n * p.numel() // len(p) * p.element_size() for site in tables.values() for p in site.base().values())
    if needed > (have := free(next(iter(like.base().values())).device)):
        raise TooLargeError(
            f"resize_vocabulary: {n:,} tokens need {needed:,} bytes, and {max(0, int(have)):,} are free; the model "
            f"has {old:,} tokens now"
        )


def _hung(site: Site) -> list[PeftModule]:
    """What is hung on a site and follows its tokens: all but prompts."""
    return [module for adapter in site.adapters for module in site.hung(adapter) if not opens(module, "prompt")]


def _resized(site: Site, n: int, init: Init, draw: torch.Generator) -> dict[str, Tensor]:
    """Weight and bias of a site with n tokens."""
    resized = {}
    for name, tensor in site.base().items():
        added = n - len(tensor)
        kept = tensor.detach()[:n]
        if added <= 0:
            resized[name] = kept.clone()
            continue
        mean = "normal" if isinstance(site, TiedLinear) else init  # transformers gives the biases of a tied head 0
        new = _embeddings(kept, added, init, draw) if name == "weight" else _biases(kept, added, mean, draw)
        resized[name] = torch.cat([kept, new.to(kept)])
    return resized


def _embeddings(weight: Tensor, added: int, init: Init, draw: torch.Generator) -> Tensor:
    """Added embeddings, [added, dim] in float32 or wider."""
    dim = weight.shape[1]
    noise = torch.randn(added, dim, generator=draw)
    if weight.is_meta:
        return weight.new_empty(added, dim)
    if init == "normal":
        return 0.02 * noise
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    mean = exact.mean(dim=0)
    centred = exact - mean
    root, failed = torch.linalg.cholesky_ex(SPREAD * (centred.T @ centred / len(exact)))
    return mean.expand(added, dim) if int(failed) else mean + noise.to(root) @ root.T


def _biases(biases: Tensor, added: int, init: Init, draw: torch.Generator) -> Tensor:
    """Added biases of a head, [added]."""
    noise = torch.randn(added, generator=draw)
    if biases.is_meta or init == "normal":
        return biases.new_zeros(added)
    exact = biases.to(torch.promote_types(biases.dtype, torch.float32))
    spread = exact.std() if len(exact) > 1 else exact.new_zeros(())
    return exact.mean() + SPREAD * spread * noise.to(exact)
