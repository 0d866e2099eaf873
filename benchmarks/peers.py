"""The same computation by effzoo and by what people use, in one process and in turns: time, and what autograd keeps.

Each pair starts from the same weights and is compared first, output and gradients, in float32; a pair that differs is
not timed. reformer-pytorch draws its rotations anew in every call, so it is not compared here (tests/test_parity_lsh.py
does, with its rotations fixed).

Like is compared with like: where transformers has fused attention (SDPA, FlexAttention) it runs with that. Rivals that
have none are in UNFUSED; beside these, ours is timed a second time in plain PyTorch (`backend="reference"`), so that
one sees what is the fused kernel's.
"""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import effzoo
from effzoo.attention import AttentionCore, Context, Mask
from effzoo.blocks import Attention
from effzoo.measure import Ratio, Times, interleaved, ratio
from effzoo.measure.layer import DTYPES
from effzoo.plans.shadow import key
from effzoo.recompute import Level, save_memory
from effzoo.spec import parse_one

DIM, HEADS = 512, 8
Forward = Callable[[Tensor], Tensor]


@dataclass
class Pair:
    """Ours and theirs: functions from an input to an output, the modules in them, and how far outputs and gradients may
    differ (of their norm)."""

    ours: Forward
    theirs: Forward
    input: Tensor  # floats, with a gradient, or token ids
    modules: tuple[nn.Module, nn.Module]
    tolerance: float | None = 1e-4  # None: not comparable, because both draw
    # parameters whose gradients are compared, when the input has none
    compared: list[tuple[nn.Parameter, nn.Parameter]] | None = None

    def to(self, device: str, dtype: str = "float32") -> Pair:
        """The pair on a device; modules keep their parameters when they move."""
        for module in self.modules:
            module.to(device, DTYPES[dtype])
        kind = DTYPES[dtype] if self.input.is_floating_point() else self.input.dtype
        self.input = self.input.detach().to(device, kind).requires_grad_(self.input.requires_grad)
        return self


def layer(spec: str, n: int, *, causal: bool = False, out: bool = True, bias: bool = True) -> Attention:
    torch.manual_seed(0)
    context = Context(heads=HEADS, head_dim=DIM // HEADS, causal=causal, max_length=n)
    made = Attention(DIM, parse_one(spec), context, bias=bias, out_bias=True, out_dim=None if out else 0)
    made.core.initialise()
    return made


def given(n: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, n, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()


def copied(pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    """Weights and biases of linear layers, from the second to the first."""
    with torch.no_grad():
        for mine, theirs in pairs:
            mine.weight.copy_(theirs.weight)
            if theirs.bias is not None:
                mine.bias.copy_(theirs.bias)


def pair(ours: nn.Module, call: Forward, theirs: nn.Module, their_call: Forward, x: Tensor, **more: Any) -> Pair:
    return Pair(call, their_call, x, (ours, theirs), **more)


def hf_longformer(n: int, batch: int = 1) -> Pair:
    """Self-attention with a window of 512 and no global token, without the output projection."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        attention_window=[512],
        attention_probs_dropout_prob=0.0,
        num_hidden_layers=1,
    )
    torch.manual_seed(0)
    theirs, ours = LongformerSelfAttention(config, 0), layer("longformer[window=512]", n, out=False)
    copied([(ours.q, theirs.query), (ours.k, theirs.key), (ours.v, theirs.value)])

    def their(x: Tensor) -> Tensor:
        zeros, nowhere = x.new_zeros(batch, n), torch.zeros(batch, n, dtype=torch.bool, device=x.device)
        return theirs(
            x, attention_mask=zeros, is_index_masked=nowhere, is_index_global_attn=nowhere, is_global_attn=False
        )[0]

    return pair(ours, lambda x: ours(x, Mask()), theirs, their, given(n, batch))


def hf_reformer(n: int, batch: int = 1) -> Pair:
    """LSH self-attention with 4 rounds and chunks of 64, the same rotations, without the output projection."""
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    logging.getLogger("transformers").setLevel(logging.ERROR)
    buckets = max(2, n // 64 * 2)
    factors = (
        buckets if buckets < 128 else [2 ** (buckets.bit_length() // 2), buckets // 2 ** (buckets.bit_length() // 2)]
    )
    config = ReformerConfig(
        hidden_size=DIM, num_attention_heads=HEADS, attention_head_size=DIM // HEADS, num_hashes=4,
        lsh_attn_chunk_length=64, num_buckets=factors,
        lsh_attention_probs_dropout_prob=0.0, is_decoder=False, hash_seed=5, max_position_embeddings=n,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = LSHSelfAttention(config)
    said = buckets if isinstance(factors, int) else tuple(factors)
    ours = layer(f"lsh[rounds=4, chunk=64, circular=true, buckets={said}]", n, out=False, bias=False)
    copied([(ours.qk, theirs.query_key), (ours.v, theirs.value)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        drawn = torch.randn(HEADS, DIM // HEADS, 4, sum(factors if isinstance(factors, list) else [factors]) // 2)
    ours.core.rotate_by(drawn.permute(2, 0, 1, 3))
    return pair(
        ours, lambda x: ours(x, Mask()), theirs, lambda x: theirs(x, num_hashes=4).hidden_states, given(n, batch)
    )


def reformer_pytorch(n: int, batch: int = 1) -> Pair:
    """LSH self-attention with 4 rounds and buckets of 64."""
    from reformer_pytorch import LSHSelfAttention

    torch.manual_seed(0)
    theirs = LSHSelfAttention(DIM, heads=HEADS, bucket_size=64, n_hashes=4, causal=False)
    ours = layer("lsh[rounds=4, chunk=64]", n, bias=False)
    return pair(ours, lambda x: ours(x, Mask()), theirs, theirs, given(n, batch), tolerance=None)


def linformer(n: int, batch: int = 1) -> Pair:
    """Headwise shared projections to 256 rows, keys and values apart."""
    from linformer.linformer import LinformerSelfAttention

    torch.manual_seed(0)
    theirs = LinformerSelfAttention(DIM, n, k=256, heads=HEADS)
    ours = layer("linformer[k=256, sharing=headwise]", n, bias=False)
    copied([(ours.q, theirs.to_q), (ours.k, theirs.to_k), (ours.v, theirs.to_v), (ours.o, theirs.to_out)])
    with torch.no_grad():
        ours.core.E.weight.copy_(theirs.proj_k.T)
        ours.core.F.weight.copy_(theirs.proj_v.T)
    return pair(ours, lambda x: ours(x, Mask()), theirs, theirs, given(n, batch))


def hf_perceiver(n: int, batch: int = 1) -> Pair:
    """The text Perceiver: n bytes, 256 latents of 512, one cross-attention, 4 blocks."""
    import transformers

    config = transformers.PerceiverConfig(
        num_latents=256, d_latents=DIM, d_model=DIM, num_blocks=1, num_self_attends_per_block=4,
        num_self_attention_heads=HEADS,
        num_cross_attention_heads=HEADS, attention_probs_dropout_prob=0.0, max_position_embeddings=n, vocab_size=262,
        num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.PerceiverForSequenceClassification(config).train()
    ours = effzoo.convert.from_transformers(theirs).train()
    ids = torch.randint(10, 200, (batch, n), generator=torch.Generator().manual_seed(1))
    both = pair(ours, lambda x: ours(x).logits, theirs, lambda x: theirs(inputs=x).logits, ids)
    both.compared = [
        (ours.latents.weight, next(p for name, p in theirs.named_parameters() if name.endswith("latents")))
    ]
    return both


def perceiver_pytorch(n: int, batch: int = 1) -> Pair:
    """n inputs of 64 channels, 256 latents of 512, one cross-attention with one head, 4 blocks; weights are not copied
    (the tests do that)."""
    from perceiver_pytorch import Perceiver

    torch.manual_seed(0)
    theirs = Perceiver(
        num_freq_bands=16, depth=1, max_freq=32.0, input_channels=64, input_axis=1, num_latents=256, latent_dim=DIM,
        cross_heads=1, latent_heads=HEADS, cross_dim_head=64, latent_dim_head=64, num_classes=2, self_per_cross_attn=4,
    )  # fmt: skip
    ours = effzoo.build(
        "perceiver", task="classification", num_labels=2, channels=64, grid=(n,), positions="fourier", bands=16,
        latents=256, dim=DIM, layers=4,
        heads=HEADS, head_dim=64, mlp=4 * DIM, cross_attends=1, cross_heads=1, cross_head_dim=64, gated=True,
        attn_bias=False, head_norm=True, attention_dropout=0.0, dropout=0.0,
    ).train()  # fmt: skip
    x = torch.randn(batch, n, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    return pair(ours, lambda x: ours(inputs_embeds=x).logits, theirs, theirs, x, tolerance=None)


class Fused(nn.Module):
    """Projections around a fused attention of others, which takes [batch, n, heads, d]."""

    def __init__(self, attention: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.attention = attention
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (HEADS, DIM // HEADS)) for linear in (self.q, self.k, self.v))
        return self.o(self.attention(q, k, v).flatten(2))


def fused(attention: Callable[[Tensor, Tensor, Tensor], Tensor], n: int, batch: int) -> Pair:
    """Full attention."""
    torch.manual_seed(0)
    theirs, ours = Fused(attention), layer("full", n)
    copied([(ours.q, theirs.q), (ours.k, theirs.k), (ours.v, theirs.v), (ours.o, theirs.o)])
    return pair(ours, lambda x: ours(x, Mask()), theirs, theirs, given(n, batch))


def sdpa(n: int, batch: int = 1) -> Pair:
    """Full attention by torch's scaled_dot_product_attention."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        ).transpose(1, 2)

    return fused(attention, n, batch)


def xformers(n: int, batch: int = 1) -> Pair:
    """Full attention by xformers' memory_efficient_attention."""
    from xformers.ops import memory_efficient_attention

    return fused(memory_efficient_attention, n, batch)


def peft_bert(method: str, dropout: float, recompute: Level = "hidden", attention: str = "sdpa") -> Callable[..., Pair]:
    """A step of a 6 x 384 BERT, batch 4 unless told otherwise, fine-tuned by `peft` on transformers and by us as
    `finetune` does it; with dropout both draw, so they are compared without. attention: that of transformers."""

    def made(n: int, batch: int = 4) -> Pair:
        import peft
        import transformers

        config = transformers.BertConfig(
            vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
            max_position_embeddings=n, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=2,
        )  # fmt: skip
        torch.manual_seed(0)
        base = transformers.BertForSequenceClassification._from_config(config, attn_implementation=attention)
        ours = effzoo.convert.from_transformers(base)
        feedforward = r".*\.layer\.\d+\.output\.dense"
        configs = {
            "lora": peft.LoraConfig(
                r=8, lora_alpha=8, target_modules=["query", "value"], modules_to_save=["classifier"]
            ),
            "ia3": peft.IA3Config(
                target_modules=rf".*\.self\.(key|value)|{feedforward}",
                feedforward_modules=feedforward,
                modules_to_save=["classifier"],
            ),
        }
        effzoo.attach(ours, {"lora": "lora[rank=8, alpha=8, targets=(attn.q, attn.v)]"}.get(method, method))
        if method == "bitfit":
            theirs = base.requires_grad_(False)
            for name, parameter in theirs.named_parameters():
                parameter.requires_grad_(name.endswith("bias") or name.startswith("classifier"))
        elif method == "full":
            theirs = base
        else:
            theirs = peft.get_peft_model(base, configs[method])
        compared = _same_start(method, ours, theirs)
        ids = torch.randint(5, 1000, (batch, n), generator=torch.Generator().manual_seed(1))
        ours.train(), theirs.train()
        save_memory(ours, recompute)
        both = pair(
            ours,
            lambda x: ours(x).logits,
            theirs,
            lambda x: theirs(input_ids=x).logits,
            ids,
            tolerance=None if dropout else 1e-5,
        )
        both.compared = compared
        return both

    return made


def merged(n: int, batch: int = 4) -> Pair:
    """A step of all weights of a 6 x 384 BERT into which LoRA has been merged, against the model that never had it."""
    sizes = {"layers": 6, "dim": 384, "heads": 12, "mlp": 1536, "vocab": 1000, "dropout": 0.0, "attention_dropout": 0.0}
    torch.manual_seed(0)
    theirs = effzoo.build("bert", task="classification", num_labels=2, max_length=n, **sizes).train()
    ours = effzoo.merge(effzoo.attach(copy.deepcopy(theirs), "lora[rank=8]")).train()
    ours.requires_grad_(True)
    ids = torch.randint(5, 1000, (batch, n), generator=torch.Generator().manual_seed(1))
    both = pair(ours, lambda x: ours(x).logits, theirs, lambda x: theirs(x).logits, ids)
    both.compared = [(ours.blocks[0].attn.q.weight, theirs.blocks[0].attn.q.weight)]
    return both


def _same_start(method: str, ours: nn.Module, theirs: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Give both the same adapter; the parameters that correspond."""
    layers = theirs.base_model.model.bert.encoder.layer if method in ("lora", "ia3") else theirs.bert.encoder.layer
    tensors = []
    for i, block in enumerate(layers):
        attention, mine = block.attention.self, ours.blocks[i]
        if method == "lora":
            for role, their in (("q", attention.query), ("v", attention.value)):
                site = getattr(mine.attn, role).adapters["default"]["lora"]
                tensors += [(site.A, their.lora_A["default"].weight), (site.B, their.lora_B["default"].weight)]
        elif method == "ia3":
            tensors.append((mine.attn.v.adapters["default"]["ia3"].scale, attention.value.ia3_l["default"]))
        elif method == "bitfit":
            tensors.append((mine.attn.q.adapters["default"]["bitfit"].own_bias, attention.query.bias))
        else:
            tensors.append((mine.attn.q.adapters["default"]["full"].own_weight, attention.query.weight))
    with torch.no_grad():
        for ours, their in tensors:
            if method in ("lora", "ia3"):
                ours.add_(0.02 * torch.randn_like(ours))
            their.copy_(ours.view_as(their))
    return tensors


IMPORT = "import torch, against import effzoo"
PEERS: dict[str, Callable[..., Pair]] = {
    "torch SDPA, full attention": sdpa,
    "HF Longformer, window 512": hf_longformer,
    "HF Reformer, 4 rounds, chunk 64": hf_reformer,
    "reformer-pytorch, 4 rounds, bucket 64": reformer_pytorch,
    "linformer, k = 256": linformer,
    "HF Perceiver, 256 latents": hf_perceiver,
    "perceiver-pytorch, 256 latents": perceiver_pytorch,
    "peft LoRA on HF BERT, 4 x n": peft_bert("lora", 0.0),
    "peft LoRA on HF BERT, recompute=blocks, 4 x n": peft_bert("lora", 0.0, "blocks"),
    "peft LoRA on HF BERT, dropout 0.1, 4 x n": peft_bert("lora", 0.1),
    "BitFit on HF BERT, 4 x n": peft_bert("bitfit", 0.0),
    "peft (IA)3 on HF BERT, 4 x n": peft_bert("ia3", 0.0),
    "effzoo before LoRA was merged, 4 x n": merged,
    "full fine-tuning of HF BERT, 4 x n": peft_bert("full", 0.0),
}
FUSED = {  # what needs a GPU: FlexAttention has no backward pass on the CPU, xformers no kernels
    "xformers, full attention": xformers,
    "HF BERT with FlexAttention, full fine-tuning": peft_bert("full", 0.0, attention="flex_attention"),
    "peft LoRA on HF BERT with FlexAttention": peft_bert("lora", 0.0, attention="flex_attention"),
}
# they write the scores out
UNFUSED = {name for name in PEERS if name.startswith(("HF ", "reformer-pytorch", "linformer", "perceiver-pytorch"))}


def of_device(device: str) -> dict[str, Callable[..., Pair]]:
    """The peers that can run on a device; on a GPU those that take minutes to say the same are left to the CPU."""
    return PEERS if torch.device(device).type == "cpu" else {**PEERS, **FUSED}


def steps_of_models(name: str) -> bool:
    """Whether the peer is a training step of a whole model, which is measured at one length."""
    return "BERT" in name or "merged" in name


def step(forward: Forward, x: Tensor, parameters: list[nn.Parameter]) -> Callable[[], object]:
    """Forward and backward, the gradients forgotten before."""

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        x.grad = None
        forward(x).square().mean().backward()

    return run


def differs(pair: Pair) -> str:
    """What differs between ours and theirs, or nothing."""
    if pair.tolerance is None:
        return ""
    outs, gradients = [], []
    for forward, side in ((pair.ours, 0), (pair.theirs, 1)):
        out = forward(pair.input)
        leaves = [couple[side] for couple in pair.compared or ()] or [pair.input]
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.device)
        gradients.append([g.flatten() for g in torch.autograd.grad(out, leaves, direction)])
        outs.append(out.detach())
    for what, mine, theirs in [("output", *outs), *(("gradient", a, b) for a, b in zip(*gradients, strict=True))]:
        error = float((mine - theirs).norm() / theirs.norm())
        if not error <= pair.tolerance:
            return f"the {what} differs by {error:.1e} of its norm"
    return ""


def saved(forward: Forward, x: Tensor, parameters: list[nn.Parameter]) -> int:
    """Bytes that autograd keeps of one forward pass, without the parameters and the input; each storage once."""
    inputs = {key(tensor) for tensor in [*parameters, x]}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        if key(tensor) not in inputs:
            kept[key(tensor)] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward(x)
    del out
    return sum(kept.values())


def importing(seconds: float) -> dict[str, Any]:
    """`import effzoo` against `import torch`, each in a process of its own."""

    def process(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    times = interleaved({"ours": process("import effzoo"), "theirs": process("import torch")}, seconds=seconds)
    return _compared({"suite": "peers", "peer": IMPORT, "n": 0, "device": "cpu"}, times)


def _compared(row: dict[str, Any], times: dict[str, Times]) -> dict[str, Any]:
    of: Ratio = ratio(times["ours"], times["theirs"])
    return row | {
        "ours_seconds": times["ours"].median, "theirs_seconds": times["theirs"].median,
        "rounds": len(times["ours"].seconds), "ratio": of.median, "ratio_quartiles": list(of.spread),
    }  # fmt: skip


def plainly(module: nn.Module, run: Callable[[], object]) -> Callable[[], object]:
    """The same in plain PyTorch: the cores of the module compute with the backend "reference" meanwhile."""
    cores = [core for core in module.modules() if isinstance(core, AttentionCore)]

    def plain() -> None:
        contexts = [core.context for core in cores]
        for core in cores:
            core.context = replace(core.context, backend="reference")
        try:
            run()
        finally:
            for core, context in zip(cores, contexts, strict=True):
                core.context = context

    return plain


def measure(
    name: str, n: int, seconds: float, device: str = "cpu", dtype: str = "float32", batch: int | None = None
) -> dict[str, Any]:
    """One row: times of both, their ratio, and what each keeps; for an unfused rival also our time in plain PyTorch.

    batch: None is that of the pair.
    """
    if name == IMPORT:
        return importing(seconds)
    row: dict[str, Any] = {"suite": "peers", "peer": name, "n": n, "device": device, "dtype": dtype}
    try:
        made = (PEERS | FUSED)[name](n, *([] if batch is None else [batch])).to(device)
    except ImportError as error:
        return row | {"failed": f"{error.name} is not installed"}
    row["batch"] = len(made.input)
    if problem := differs(made):
        return row | {"failed": problem}
    made = made.to(device, dtype)
    sides = {
        side: (f, list(m.parameters()))
        for side, f, m in zip(("ours", "theirs"), (made.ours, made.theirs), made.modules, strict=True)
    }
    for side, (forward, parameters) in sides.items():
        row[f"{side}_saved"] = saved(forward, made.input, parameters)
    runs = {side: step(f, made.input, parameters) for side, (f, parameters) in sides.items()}
    if name in UNFUSED:
        runs["ours_plain"] = plainly(made.modules[0], runs["ours"])
    times: dict[str, Times] = interleaved(runs, seconds=seconds, device=device)
    row = _compared(row, times)
    if "ours_plain" in times:
        row["plain_ratio"] = ratio(times["ours_plain"], times["theirs"]).median
    return row
