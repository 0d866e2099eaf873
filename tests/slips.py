"""Right solutions of two assignments, and one-line mistakes in them, each with the words that name its cause."""

WINDOW = "longformer[window=8, global_projections=false]"
ATTENTION = '''
import math
import torch
from torch.nn import functional as F
from effzoo.attention import AttentionCore, register


@register("mine")
class Mine(AttentionCore):
    """softmax(q k^T / sqrt(d)) v over the keys at most window / 2 away."""

    cost = "n^2"

    def __init__(self, context, *, window: int = 8):
        super().__init__(context)
        self.reach = window // 2

    def forward(self, q, k, v, *, mask):
        n = q.shape[2]
        i = torch.arange(n, device=q.device)
        allowed = (i[:, None] - i).abs() <= self.reach
        if self.context.causal:
            allowed = allowed & (i <= i[:, None])
        if mask.valid is not None:
            allowed = allowed & mask.valid[:, None, None, :]
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        some = allowed.any(dim=-1, keepdim=True)
        weights = scores.masked_fill(~allowed & some, -math.inf).softmax(dim=-1) * some
        weights = F.dropout(weights, self.dropout, self.training)
        return weights @ v
'''
LOW_RANK = '''
import torch
from torch import nn
from torch.nn import functional as F
from effzoo.peft import Method, PeftModule, register
from effzoo.sites import Linear


class Low(PeftModule):
    def __init__(self, n_in, n_out, rank, scale, p):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, n_in) / n_in**0.5)
        self.B = nn.Parameter(torch.zeros(n_out, rank))
        self.scale, self.p = scale, p

    def after(self, x, y, context):
        x = F.dropout(x, self.p, self.training)
        change = x @ self.A.T @ self.B.T
        return y + self.scale * change

    def delta(self, weight, bias):
        return self.scale * self.B.to(weight) @ self.A.to(weight), None


@register("mine")
class Mine(Method):
    """W' = W + s B A, s = alpha / rank."""

    accepts, default_targets = (Linear,), ("attn.q*", "attn.v*")

    def __init__(self, *, rank: int = 4, alpha: float = 8.0, dropout: float = 0.0,
                 targets: str | list[str] | None = None, layers: int | list[int] | None = None):
        super().__init__(targets=targets, layers=layers)
        self.rank, self.alpha, self.p = rank, alpha, dropout

    def make(self, site):
        return Low(site.in_features, site.out_features, self.rank, self.alpha / self.rank, self.p)
'''

# name: (what stands in the right solution, what the student wrote, words of which the first red line has one)
ATTENTION_SLIPS = {
    "no_scale": (" / math.sqrt(q.shape[-1])", "", "without 1 / sqrt(d)"),
    "scale_d": ("math.sqrt(q.shape[-1])", "q.shape[-1]", "1 / d"),
    "scale_times": ("/ math.sqrt", "* math.sqrt", "sqrt(d) in place"),
    "scale_length": ("math.sqrt(q.shape[-1])", "math.sqrt(q.shape[-2])", "sqrt(n)"),
    "scale_heads": ("math.sqrt(q.shape[-1])", "math.sqrt(q.shape[1])", "sqrt(heads)"),
    "scale_model": ("math.sqrt(q.shape[-1])", "math.sqrt(q.shape[-1] * q.shape[1])", "all heads together"),
    "softmax_queries": ("softmax(dim=-1)", "softmax(dim=-2).nan_to_num()", "over the queries"),
    "softmax_heads": ("softmax(dim=-1)", "softmax(dim=1).nan_to_num()", "over the heads"),
    "window_narrow": ("<= self.reach", "< self.reach", "1 narrower at both ends"),
    "window_wide": ("<= self.reach", "<= self.reach + 1", "1 wider at both ends"),
    "window_double": ("window // 2", "window", "twice the width"),
    "window_half": ("window // 2", "window // 4", "half the width"),
    "window_past": ("(i[:, None] - i).abs() <= self.reach", "((i[:, None] - i) <= self.reach) & (i[:, None] >= i)",
                    "always on"),
    "window_open": (".abs() <= self.reach", " <= self.reach", "open ahead"),
    "causal_off": ("if self.context.causal:", "if False:", "triangle off"),
    "causal_strict": ("i <= i[:, None]", "i < i[:, None]", "too narrow"),
    "causal_ahead": ("i <= i[:, None]", "i <= i[:, None] + 1", "too wide"),
    "causal_turned": ("i <= i[:, None]", "i >= i[:, None]", "turned over"),
    "causal_always": ("if self.context.causal:", "if True:", "always on"),
    "mask_inverted": ("& mask.valid[", "& ~mask.valid[", "mask inverted"),
    "padding_seen": ("if mask.valid is not None:", "if False:", "padding seen"),
    "padding_queries": ("mask.valid[:, None, None, :]", "mask.valid[:, None, :, None]", "padding of the queries"),
    "padding_first": ("mask.valid[:, None, None, :]", "mask.valid[:1, None, None, :]", "first example"),
    "heads_flipped": ("return weights @ v", "return weights @ v.flip(1)", "values in another order"),
    "heads_mixed": ("return weights @ v", "return (weights @ v).transpose(1, 2).reshape(q.shape)", "reshape"),
    "keys_for_values": ("return weights @ v", "return weights @ k", "keys for values"),
    "keys_exchanged": ("q @ k.mT", "k @ q.mT", "queries and keys exchanged"),
    "masked_zero": ("scores.masked_fill(~allowed & some, -math.inf)", "(scores * allowed)", "set to 0"),
    "masked_behind": ("scores.masked_fill(~allowed & some, -math.inf).softmax(dim=-1) * some",
                      "scores.softmax(dim=-1) * allowed", "behind the softmax"),
    "empty_nan": ("scores.masked_fill(~allowed & some, -math.inf).softmax(dim=-1) * some",
                  "scores.masked_fill(~allowed, -math.inf).softmax(dim=-1)", "NaN"),
    "empty_mean": ("scores.masked_fill(~allowed & some, -math.inf).softmax(dim=-1) * some",
                   "scores.masked_fill(~allowed, -1e4).softmax(dim=-1)", "return 0 there"),
    "dropout_always": ("self.dropout, self.training", "self.context.dropout", "dropout acts in evaluation"),
    "dropout_fixed": ("self.dropout, self.training", "0.1", "dropout acts in evaluation"),
    "dropout_never": ("self.dropout, self.training", "0.0", "in training, the output is that of evaluation"),
    "detached": ("q @ k.mT", "q @ k.detach().mT", "detached"),
    "residual": ("return weights @ v", "return weights @ v + v", "values added"),
    "twice": ("return weights @ v", "return 2 * weights @ v", "taken twice"),
    "batch_mean": ("q @ k.mT", "q @ (k - k.mean(0)).mT", "batch axis"),
    "no_window": (".abs() <= self.reach", ".abs() <= n", "full attention"),
    "device": (", device=q.device", "", "device=q.device"),
    "half": ("weights = F.dropout", "weights = weights.float(); weights = F.dropout", "expected scalar type"),
    "sign": ("q @ k.mT", "-q @ k.mT", "negated"),
}  # fmt: skip
LOW_RANK_SLIPS = {
    "alpha_times": ("self.alpha / self.rank", "self.alpha * self.rank", "alpha * rank"),
    "alpha_alone": ("self.alpha / self.rank", "self.alpha", "alpha in place of"),
    "alpha_lost": ("self.alpha / self.rank", "1.0", "left out"),
    "alpha_turned": ("self.alpha / self.rank", "self.rank / self.alpha", "rank / alpha"),
    "alpha_unused": ("self.alpha / self.rank", "1 / self.rank", "alpha does nothing"),
    "alpha_root": ("self.alpha / self.rank", "self.alpha / self.rank**0.5", "sqrt(rank)"),
    "scale_twice": ("return y + self.scale * change", "return y + self.scale * self.scale * change", "acts twice"),
    "scale_forgotten": ("return y + self.scale * change", "return y + change", "left out"),
    "added_twice": ("y + self.scale * change", "y + self.scale * change + self.scale * change", "twice"),
    "in_two_hooks": (
        "    def after(",
        "    def weight(self, weight):\n        return weight + self.scale * self.B @ self.A\n\n    def after(",
        "twice"),
    "subtracted": ("return y + self.scale * change", "return y - self.scale * change", "subtracted"),
    "no_residual": ("return y + self.scale * change", "return self.scale * change", "the change alone"),
    "one_more_x": ("return y + self.scale * change", "return x + y + self.scale * change", "start from a change of 0"),
    "transposed": ("x @ self.A.T @ self.B.T", "x @ self.B @ self.A", "transposed"),
    "in_a_list": ("self.B = nn.Parameter(torch.zeros(n_out, rank))",
                  "self.more = [nn.Parameter(torch.zeros(n_out, rank).double())]\n        self.B = self.more[0].data",
                  "not registered"),
    "in_a_dict": ("self.A = nn.Parameter(torch.randn(rank, n_in) / n_in**0.5)",
                  "self.of = {'A': nn.Parameter(torch.randn(rank, n_in).double())}\n"
                  "        self.A = self.of['A'].detach()",
                  "not registered"),
    "plain_tensors": ("nn.Parameter(torch.zeros(n_out, rank))",
                      "torch.zeros(n_out, rank).double().requires_grad_()",
                      "not registered"),
    "no_parameters": ("nn.Parameter(torch.zeros(n_out, rank))\n", "torch.zeros(n_out, rank).double()\n",
                      "not registered"),
    "shared": ("return Low(site.in_features, site.out_features, self.rank, self.alpha / self.rank, self.p)",
               "self.one = getattr(self, 'one', None) or Low(site.in_features, site.out_features, self.rank, "
               "self.alpha / self.rank, self.p)\n        return self.one", "one and the same tensor"),
    "both_zero": ("torch.randn(rank, n_in) / n_in**0.5", "torch.zeros(rank, n_in)", "both start at 0"),
    "both_random": ("torch.zeros(n_out, rank)", "torch.randn(n_out, rank)", "start from a change of 0"),
    "detached_A": ("x @ self.A.T", "x @ self.A.detach().T", ".detach()"),
    "detached_x": ("change = x @", "change = x.detach() @", "detached"),
    "no_grad": ("change = x @ self.A.T @ self.B.T",
                "with torch.no_grad():\n            change = x @ self.A.T @ self.B.T", ".detach()"),
    "data": ("@ self.B.T", "@ self.B.data.T", ".data"),
    "dropout_always": ("F.dropout(x, self.p, self.training)", "F.dropout(x, self.p)", "F.dropout takes training"),
    "dropout_fixed": ("F.dropout(x, self.p, self.training)", "F.dropout(x, 0.1)", "F.dropout takes training"),
    "dropout_lost": ("F.dropout(x, self.p, self.training)", "x", "two calls in training give the same"),
    "nothing": ("return y + self.scale * change", "return y", "a tensor that no hook uses"),
    "renamed_hook": ("def after(", "def after_(", "a tensor that no hook uses"),
    "in_place": ("return y + self.scale * change", "return y.add_(self.scale * change).mul_(1.01)",
                 "start from a change of 0"),
    "targets": ('("attn.q*", "attn.v*")', '("attn.q*", "attn.k*")', "default_targets"),
    "targets_one": ('("attn.q*", "attn.v*")', '("attn.q*",)', "default_targets"),
    "targets_all": ('("attn.q*", "attn.v*")', '("attn.*",)', "hangs on Linear sites"),
    "delta_transposed": ("self.B.to(weight) @ self.A.to(weight)", "(self.B.to(weight) @ self.A.to(weight)).T",
                         "`delta`"),
    "delta_unscaled": ("self.scale * self.B.to(weight)", "self.B.to(weight)", "`delta`"),
    "delta_whole": ("return self.scale * self.B", "return weight + self.scale * self.B", "`delta`"),
    "positional": ("self, *, rank: int", "self, rank: int", "by position"),
    "nan": ("torch.zeros(n_out, rank)", "torch.empty(n_out, rank).fill_(float('nan'))", "finite"),
    "neighbours": ("change = x @", "change = (x - x.mean(1, keepdim=True)) @", "formula of the reference"),
    "batch": ("change = x @", "change = (x - x.mean(0, keepdim=True)) @", "formula of the reference"),
    "activation": ("x @ self.A.T @", "torch.relu(x @ self.A.T) @", "formula of the reference"),
    "rank_one": ("Low(site.in_features, site.out_features, self.rank,", "Low(site.in_features, site.out_features, 1,",
                 "the sizes are part of the formula"),
    "trains_bias": ("self.scale, self.p = scale, p",
                    "self.scale, self.p = scale, p\n        self.c = nn.Parameter(torch.zeros(n_out))",
                    "a tensor that no hook uses"),
}  # fmt: skip
