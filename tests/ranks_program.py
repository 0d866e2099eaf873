"""What test_parallel starts in several processes: python tests/ranks_program.py RANK RANKS PORT FOLDER."""

import itertools
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

import effzoo
import effzoo.parallel
from effzoo.attention import Context, Mask, create
from effzoo.attention.flash import Flash
from effzoo.errors import IncompatibleError
from effzoo.parallel import Split, attention, counted, multiple_of

CASES = {
    "full": ("full", False), "full causal": ("full", True), "zigzag": ("full", True),
    "longformer": ("longformer[window=6]", False), "longformer causal": ("longformer[window=6]", True),
    "dilated": ("longformer[window=4, dilation=(1, 3)]", False),
    "wide": ("longformer[window=40]", False), "local": ("local[chunk=4]", False),
    "streaming": ("streaming[window=5, sinks=3]", False), "streaming causal": ("streaming[window=5, sinks=3]", True),
    "local causal": ("local[chunk=4]", True), "linformer": ("linformer[k=5]", False),
    "perceiver": ("perceiver[latents=3]", False), "blockwise": ("blockwise[blocks=3]", False),
    "blockwise causal": ("blockwise[blocks=4, permutations=((3, 1, 2, 4), (1, 2, 3, 4))]", True),
    "blocks of 5": ("blockwise[blocks=7, block=5]", False), "many blocks": ("blockwise[blocks=64, block=1]", False),
    "linear": ("linear", False), "linear causal": ("linear", True),
    "nystromformer": ("nystromformer[landmarks=5]", False), "convolved": ("nystromformer[landmarks=40, conv=7]", False),
    "convolved only": ("nystromformer[landmarks=none, conv=3]", False),
    "performer": ("performer[features=6]", False), "performer causal": ("performer[features=6]", True),
}  # fmt: skip


def inputs(core, n, padded, marked, remembers):
    """The whole sequence, its mask and a memory, the same on every rank."""
    torch.manual_seed(n)
    heads, d = core.context.heads, core.context.head_dim
    uses = len(core.projections)
    projected = [torch.randn(2, heads, n, d, dtype=torch.float64) for _ in range(uses)]
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[1, n - 3 :] = False
    is_global = torch.zeros(2, n, dtype=torch.bool)
    is_global[0, [0, n // 2, n - 1]] = True
    is_global[1, 2] = True
    memory = tuple(torch.randn(heads, 4, d, dtype=torch.float64) for _ in range(2)) if remembers else None
    return projected, valid if padded else None, is_global if marked else None, memory


@contextmanager
def scored():
    """The scores that kernels compute inside the `with` block, of a head of an example, as a list of counts."""
    found, forward = [], Flash.forward

    def counting(kernel, tile, index):
        queries, keys = tile.q.shape[2], tile.k.shape[2]
        found.append(queries * (queries + 1) // 2 if tile.causal else queries * keys)
        return forward(kernel, tile, index)

    Flash.forward = counting
    try:
        yield found
    finally:
        Flash.forward = forward


def compare(core, n, padded, marked, remembers, split):
    """The largest difference of outputs and gradients from those of one process, and the scores computed."""
    projected, valid, is_global, memory = inputs(core, n, padded, marked, remembers)
    if is_global is None and len(projected) > 3:
        projected[3:] = [None] * (len(projected) - 3)
    weight = torch.randn(2, core.context.heads, n, core.context.head_dim, dtype=torch.float64)
    parameters = list(core.parameters())

    def leaves(tensors):
        return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]

    whole, remembered = leaves(projected), leaves(memory) if remembers else None
    out = core(*whole, mask=Mask(valid, is_global), memory=remembered)
    wanted = torch.autograd.grad(
        (out * weight).sum(), [x for x in (*whole, *(remembered or ()), *parameters) if x is not None]
    )
    here = [None if x is None else split.own(x, 2).contiguous() for x in projected]
    here, remembered = leaves(here), leaves(memory) if remembers else None
    mask = Mask(*(None if x is None else split.own(x) for x in (valid, is_global)))
    with scored() as scores:
        mine = attention(core, split, *here, mask=mask, memory=remembered)
    shared = [*(remembered or ()), *parameters]
    got = torch.autograd.grad(
        (mine * split.own(weight, 2)).sum(), [*(x for x in here if x is not None), *shared], allow_unused=True
    )
    worst = [(mine - split.own(out, 2)).abs().max()]
    for number, (mine_grad, grad) in enumerate(zip(got, wanted, strict=True)):
        if number < len(got) - len(shared):
            mine_grad, grad = mine_grad, split.own(grad, 2)
        else:
            mine_grad = torch.zeros_like(grad) if mine_grad is None else mine_grad.contiguous()
            dist.all_reduce(mine_grad)
        worst.append((mine_grad - grad).abs().max())
    return float(torch.stack([x.detach() for x in worst]).max()), sum(scores)


SIZES = {"dim": 16, "layers": 2, "heads": 2, "mlp": 24, "vocab": 53, "max_length": 64, "dropout": 0.0}
SIZES["attention_dropout"] = 0.0
MODELS = [  # name, options of build, whether the batch is padded
    ("bert", {"task": "masked_lm", "peft": "lora"}, True),
    ("bert", {"task": "classification", "attention": "local[chunk=4]", "peft": "houlsby|bitfit"}, True),
    ("roberta", {"task": "token_classification", "attention": "longformer[window=6]", "peft": "prefix[length=3]"}, 1),
    ("longformer", {"task": "classification", "attention": "longformer[window=6]", "peft": "prompt[length=3]"}, True),
    ("longformer", {"task": "classification", "attention": "longformer[window=6]", "pooling": "mean"}, False),
    ("bert", {"task": "classification", "pooling": "late"}, True),
    ("gpt2", {"task": "causal_lm", "peft": "ia3"}, False),
    ("gpt2", {"task": "causal_lm", "peft": "prompt[length=3]|lora", "order": "contiguous"}, True),
    ("llama", {"task": "causal_lm", "peft": "prompt[length=3]", "kv_heads": 1}, True),
    ("llama", {"task": "classification", "kv_heads": 1, "attention": ("full", "longformer[window=6]")}, True),
    ("llama", {"task": "causal_lm", "attention": "longformer[window=6]", "peft": "lora", "kv_heads": 2}, True),
    ("llama", {"task": "classification", "peft": "lora|prefix[length=3]", "kv_heads": 1}, True),
    ("llama", {"task": "causal_lm", "attention": "blockwise[blocks=3]", "heads": 4, "kv_heads": 2}, True),
    ("bert", {"task": "classification", "attention": "blockwise[blocks=3]", "heads": 4, "peft": "prefix|lora"}, True),
    ("gpt2", {"task": "causal_lm", "residual": "reversible", "tied": False, "peft": "lora|prefix"}, True),
    ("bert", {"task": "masked_lm", "residual": "reversible", "norm": "pre", "attention": "longformer[window=6]"}, True),
    ("bert", {"task": "classification", "residual": "reversible", "norm": "pre", "peft": "prompt[length=3]"}, True),
    ("bert", {"task": "masked_lm", "experts": 2, "router": "switch[capacity=0.8, z=0.1]"}, True),
    ("gpt2", {"task": "causal_lm", "experts": 3, "router": "switch[capacity=0.8]", "peft": "lora"}, True),
    ("bert", {"task": "classification", "experts": 3, "router": "top_k[noise=false]", "attention": "perceiver"}, 0),
    ("bert", {"task": "masked_lm", "experts": 2, "router": "soft", "residual": "reversible", "norm": "pre"}, False),
    ("modernbert", {"task": "masked_lm", "attention": ("full", "longformer[window=6]")}, True),
    ("bert", {"task": "masked_lm", "attention": "linformer[k=5, sharing=key_value]", "peft": "lora"}, True),
    ("albert", {"task": "masked_lm", "attention": "perceiver[latents=3]", "peft": "dora"}, False),
    ("llama", {"task": "causal_lm", "attention": "linear", "peft": "prefix[length=3]|lora", "kv_heads": 1}, True),
    ("bert", {"task": "classification", "attention": "linear", "peft": "prompt[length=3]"}, True),
]  # fmt: skip


def compare_models(name, options, padded, level, group):
    """The largest difference of loss, logits and gradients of a model from those of one process; bytes sent."""
    torch.manual_seed(0)
    options = dict(options)
    order = options.pop("order", None)
    model = effzoo.build(name, **{**SIZES, "pad_token": 1, **options}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.train().recompute = level
    ids, n = torch.randint(2, 53, (2, 29)), 29
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 24:] = 0
        ids[1, 24:] = 1
    per_token = options["task"] != "classification"
    labels = torch.randint(0, 2, (2, n)) if per_token else torch.tensor([0, 1])
    if per_token:
        labels[0, ::3], labels[1, 20:] = -100, -100
    batch = {"input_ids": ids, "attention_mask": mask if padded else None, "labels": labels}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    whole = model(**batch)
    whole.loss.backward()
    wanted = [None if parameter.grad is None else parameter.grad.clone() for parameter in trained]
    model.zero_grad()
    spread = effzoo.parallel.OverRanks(model, group, order)
    with counted() as traffic:
        mine = spread(**batch)
        mine.loss.backward()
        spread.sum_gradients()
    worst = [(mine.loss - whole.loss).abs()]
    if per_token:
        positions = [torch.empty(0)] * group.size()
        dist.all_gather_object(positions, mine.positions)
        assert torch.equal(torch.cat(positions).sort().values, torch.arange(n)), "each position on one rank"
        worst.append((mine.logits - whole.logits[:, mine.positions]).abs().max())
    else:
        worst.append((mine.logits - whole.logits).abs().max())
    for parameter, grad in zip(trained, wanted, strict=True):
        worst.append((parameter.grad - (0 if grad is None else grad)).abs().max())
    return float(torch.stack([x.detach() for x in worst]).max()), dict(traffic.sent)


def refusals(rank, group):
    """What OverRanks says when the last rank differs from the others, by what differs."""
    other, said = rank == group.size() - 1, {}

    def call(
        what, *, version=effzoo.__version__, peft="lora[rank=2]", dtype=torch.float32, change=0.0, length=29, **how
    ):
        torch.manual_seed(0)
        model = effzoo.build("bert", task="masked_lm", peft=peft, **SIZES).to(dtype).train(how.get("train", True))
        with torch.no_grad():
            model.blocks[1].mlp.up.weight[3, 5] += change
        ids, number, effzoo.__version__ = torch.randint(2, 53, (2, 29))[:, :length], effzoo.__version__, version
        ids[1, 7] = how.get("token", 9)
        try:
            effzoo.parallel.OverRanks(model, group)(ids).logits.sum().backward()
        except IncompatibleError as error:
            said[what] = str(error)
        effzoo.__version__ = number

    call("none")
    call("version", version="0.1.7" if other else effzoo.__version__)
    call("adapter", peft="lora[rank=3]" if other else "lora[rank=2]")
    call("dtype", dtype=torch.float64 if other else torch.float32)
    call("weight", change=1e-3 if other else 0.0)
    call("length", length=28 if other else 29)
    call("ids", token=10 if other else 9)
    call("train", train=not other)
    return said


def main(rank, ranks, port, folder):
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    results = {}
    for name, (spec, causal) in CASES.items():
        core = create(spec, Context(heads=2, head_dim=4, causal=causal, max_length=64)).double()
        for padded, marked, remembers in itertools.product((False, True), repeat=3):
            if marked and not core.knows_globals():
                continue
            order = "zigzag" if name == "zigzag" else "contiguous"
            split = Split.of(29, dist.group.WORLD, multiple_of(core), order)
            with counted() as traffic:
                difference, scores = compare(core, 29, padded, marked, remembers, split)
            results[name, padded, marked, remembers] = difference, dict(traffic.sent), scores
    for order in ("contiguous", "zigzag"):  # 48 divides by twice the number of ranks
        core = create("full", Context(heads=2, head_dim=4, causal=True)).double()
        found = compare(core, 48, False, False, False, Split.of(48, dist.group.WORLD, order=order))
        results[f"{order} of 48", False, False, False] = found[0], {}, found[1]
    for number, (name, options, padded) in enumerate(MODELS):
        level = ("nothing", "hidden", "blocks")[number % 3]
        difference, bytes_sent = compare_models(name, options, padded, level, dist.group.WORLD)
        results[name, str(options), padded, level] = difference, bytes_sent, 0
    torch.save((results, refusals(rank, dist.group.WORLD)), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
