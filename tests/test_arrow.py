"""Arrow routes LoRA experts by the directions in which they change most, as peft does, without training."""

import copy

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.arrow import ArrowLoraLinearLayer, create_arrow_model
from peft.tuners.lora.config import ArrowConfig

import effzoo
from effzoo import convert, routing
from effzoo.errors import IncompatibleError, IncompatiblePeft, OptionError
from effzoo.peft.modular.routed import Routed
from effzoo.routing.arrow import prototypes

EXACT = {"rtol": 0, "atol": 1e-10}


def base():
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=24,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((0.3 * torch.randn(parameter.shape) + (parameter.ndim == 1)).float())
    return model


def experts(theirs, folder, count=3):
    """Folders of LoRA adapters of peft with drawn weights."""
    for number in range(count):
        config = peft.LoraConfig(r=3, lora_alpha=2 + number, target_modules=["query", "key", "value"])
        model = peft.get_peft_model(copy.deepcopy(theirs), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_((0.4 * torch.randn(parameter.shape)).float())
        model.save_pretrained(folder / str(number))
    return [str(folder / str(number)) for number in range(count)]


def test_prototypes_are_the_first_right_singular_vectors_and_routes_follow_the_largest():
    factors = [(torch.randn(3, 8, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)) for _ in range(4)]
    factors += [(torch.randn(3, 8, dtype=torch.float64), torch.zeros(10, 3, dtype=torch.float64))]  # a fresh LoRA
    factors += [(torch.randn(12, 8, dtype=torch.float64), torch.randn(10, 12, dtype=torch.float64))]  # above full rank
    v, x = prototypes(factors), torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    for (A, B), row in zip(factors, v, strict=True):
        wanted = torch.linalg.svd(B @ A).Vh[0] if B.any() else torch.zeros(8, dtype=torch.float64)
        assert torch.allclose(row[:, None] @ row[None], wanted[:, None] @ wanted[None], **EXACT)  # up to the sign
    found = routing.create("arrow[k=3, temperature=0.7]", 8, 6)(x, factors)
    for token, weights in zip(x.detach(), found.weights.detach(), strict=True):
        powers = [float((token @ row).abs() / 0.7) for row in v]
        chosen = sorted(range(6), key=lambda i, powers=powers: powers[i])[-3:]
        wanted = torch.zeros(6, dtype=torch.float64)
        wanted[chosen] = torch.tensor([powers[i] for i in chosen], dtype=torch.float64).softmax(dim=0)
        assert torch.allclose(weights, wanted, **EXACT)
    assert torch.autograd.gradcheck(lambda x: routing.create("arrow", 8, 6)(x, factors).weights, (x,))


def test_experts_of_peft_are_routed_as_in_peft(tmp_path):
    """Logits and gradients. peft finds the vectors by some steps in float32: they are compared apart, then ours are
    put in."""
    plain = base()
    folders = experts(plain, tmp_path)
    model = convert.from_transformers(plain)
    for number, folder in enumerate(folders):
        effzoo.load_adapter(model, folder, name=f"of_{number}")
    names = [f"of_{number}" for number in range(3)]
    effzoo.peft.gather(model, names, name="all", how="routed[router='arrow[k=2, temperature=0.8]']")
    model.eval()
    config = ArrowConfig(top_k=2, router_temperature=0.8, rng_seed=1)
    theirs = create_arrow_model(copy.deepcopy(plain), folders, config).double().eval()
    ids = torch.randint(5, 31, (2, 7))
    theirs(input_ids=ids)
    mixed = {path: m for path, m in model.named_modules() if isinstance(m, Routed)}
    arrows = [m for m in theirs.modules() if isinstance(m, ArrowLoraLinearLayer)]
    assert len(mixed) == len(arrows) == 6
    ours, of_peft = [], []
    for number, layer in enumerate(theirs.base_model.model.bert.encoder.layer):
        of_layer = layer.attention.self
        for role, site in {"attn.q": of_layer.query, "attn.k": of_layer.key, "attn.v": of_layer.value}.items():
            (mixture,) = [m for path, m in mixed.items() if path.startswith(f"blocks.{number}.{role}.")]
            v, arrow = prototypes(mixture.factors()), site.lora_arrow["arrow_router"]
            assert ((v * arrow.prototypes).sum(dim=1).abs() > 0.99).all()
            arrow.prototypes.copy_(v)
            ours += [factor for pair in mixture.factors() for factor in pair]
            tasks = [f"task_{expert}" for expert in range(3)]
            of_peft += [part[task].weight.requires_grad_() for task in tasks for part in (site.lora_A, site.lora_B)]
    found, expected = model(ids).logits, theirs(input_ids=ids).logits
    assert torch.allclose(found, expected, **EXACT)
    mixture = torch.randn_like(found)
    one, other = (
        torch.autograd.grad((out * mixture).sum(), leaves) for out, leaves in ((found, ours), (expected, of_peft))
    )
    for mine, wanted in zip(one, other, strict=True):
        assert torch.allclose(mine, wanted, **EXACT) and mine.abs().max() > 1e-3
    effzoo.activate(model)
    assert (model(ids).logits - found).abs().max() > 1e-2


def test_what_arrow_cannot_route_is_refused(tiny):
    model = effzoo.build("minilm", **tiny)
    for spec in ("ia3", "lora|ia3", "lora[init=pissa]", "dora"):
        with pytest.raises(IncompatiblePeft, match="it reads A and B of one LoRA of each expert"):
            effzoo.attach(model, f"routed[of='{spec}', router=arrow]")
    with pytest.raises(IncompatiblePeft, match="it reads A and B of one LoRA of each expert"):
        effzoo.attach(model, "routed[of=('lora[targets=attn.q]', 'lora[targets=attn.v]'), router=arrow]")
    with pytest.raises(OptionError, match="reads the experts of a site"):
        effzoo.attach(model, "routed[router=arrow, scope=model, level=example]")
    with pytest.raises(OptionError, match="k is between 1 and the number of experts, 2, got 3"):
        effzoo.attach(model, "routed[experts=2, router='arrow[k=3]']")
    with pytest.raises(IncompatibleError, match="these are feed-forwards"):
        effzoo.build("minilm", **tiny, experts=4, router="arrow")
    with pytest.raises(IncompatibleError, match="reads A and B of 4 LoRA experts, got 0"):
        routing.create("arrow", 8, 4)(torch.randn(3, 8))
    assert effzoo.attach(model, "routed[router=arrow]") is model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_half_precision_and_decoding(tiny, dtype):
    model = effzoo.attach(effzoo.build("gpt2", task="causal_lm", **tiny), "routed[router=arrow]").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.4)
    ids = torch.randint(5, 50, (2, 5))
    assert model.to(dtype)(ids).logits.isfinite().all()
    if dtype == torch.float32:
        generated = [effzoo.generate(model, ids, max_new_tokens=4, use_cache=cached) for cached in (True, False)]
        assert torch.equal(*generated)
