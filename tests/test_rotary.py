"""Rotary positions of today's decoders: frequencies, whole models and decoding equal those of transformers, below and
above the original length."""

import copy

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import effzoo
from effzoo import convert
from effzoo.attention import Cache
from effzoo.blocks import Rotary
from effzoo.errors import ConversionError, IncompatibleError, InputError, OptionError

ORIGINAL, DIM = 16, 8
LONGROPE = {"short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.0, 2.5, 4.0, 9.0]}
SCALINGS = {
    "linear": {"factor": 3.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "yarn, places as they are": {"factor": 4.0, "truncate": False, "beta_fast": 4.0, "beta_slow": 0.5},
    "yarn, two numbers": {"factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    "yarn, attention": {"factor": 1.0, "attention_factor": 1.3, "beta_fast": 0},
    "dynamic": {"factor": 2.5},
    "longrope": LONGROPE,
    "longrope, factor": LONGROPE | {"factor": 6.0},
    "longrope, attention": LONGROPE | {"attention_factor": 1.25},
}
OF_LENGTH = [name for name in SCALINGS if name.startswith(("dynamic", "longrope"))]


def config(scaling, family="Llama", **more):
    kind = scaling.split(",")[0]
    parameters = {"rope_type": kind, "rope_theta": 50.0, **SCALINGS.get(scaling, {})}
    if kind in ("llama3", "yarn", "longrope"):
        parameters["original_max_position_embeddings"] = ORIGINAL
    sizes = {
        "vocab_size": 37, "hidden_size": 2 * DIM, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 12, "pad_token_id": 0, "bos_token_id": None,
        "eos_token_id": None, "max_position_embeddings": ORIGINAL if kind == "dynamic" else 64,
        "rope_parameters": parameters, "attn_implementation": "eager",
    }  # fmt: skip
    return getattr(transformers, f"{family}Config")(**sizes | more)


def model(made, head="ForCausalLM"):
    theirs = getattr(transformers, f"{type(made).__name__.removesuffix('Config')}{head}")(made).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if key.endswith("norm.weight") else 0.0, 0.3)
    return theirs


def phi3(scaling="longrope", **more):
    """With a quarter of each head left as it is, as in Phi-4-mini."""
    made = {name: numbers[:3] for name, numbers in LONGROPE.items()}
    parameters = {"rope_type": scaling, "rope_theta": 50.0, "partial_rotary_factor": 0.75}
    parameters |= made if scaling == "longrope" else {}
    return config(scaling, "Phi3", rope_parameters=parameters, original_max_position_embeddings=ORIGINAL, **more)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_and_the_factor_on_cos_and_sin_are_those_of_transformers(scaling):
    made = config(scaling)
    ours = convert.from_transformers(model(made)).config.rotary()
    for length in (1, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 3 * ORIGINAL):
        expected, magnitude = ROPE_INIT_FUNCTIONS[made.rope_parameters["rope_type"]](made, None, seq_len=length)
        found = ours.frequencies(length=torch.tensor(length))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert ours.magnitude == pytest.approx(magnitude, rel=1e-12)
    if scaling in OF_LENGTH:
        assert ours.changes_at == ORIGINAL and not found.allclose(ours.frequencies(length=torch.tensor(ORIGINAL)))


def test_yarn_is_the_formula_of_its_paper():
    """Peng et al. 2023, arXiv:2309.00071, section 3.2, with ramps over places instead of wavelengths as in its code."""
    theta, length, factor, dim = 10_000.0, 4096, 16.0, 64
    rotary = Rotary.of(
        dim, theta, {"type": "yarn", "factor": factor, "original_max_position_embeddings": length, "truncate": False}
    )
    exact = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turns = length * exact / (2 * torch.pi)
    # log turns falls linearly with the place, so the ramp is linear in it
    ramp = ((torch.log(turns / 32) / torch.log(torch.tensor(1 / 32))).clamp(0, 1)).double()
    expected = ramp * exact / factor + (1 - ramp) * exact
    torch.testing.assert_close(rotary.frequencies().double(), expected, rtol=2e-5, atol=0)
    assert ramp[0] == 0 and ramp[-1] == 1 and rotary.magnitude == pytest.approx(0.1 * torch.tensor(16.0).log() + 1)


@pytest.mark.cover()
@pytest.mark.parametrize("length", [7, ORIGINAL, ORIGINAL + 9])
@pytest.mark.parametrize("scaling", [*SCALINGS, "phi3", "phi3, default"])
def test_outputs_losses_and_gradients_equal_transformers_both_ways(scaling, length):
    torch.manual_seed(1)
    made = phi3(*scaling.split(", ")[1:] or ["longrope"]) if scaling.startswith("phi3") else config(scaling)
    theirs = model(made)
    ours = convert.from_transformers(theirs)
    back = convert.to_transformers(ours)
    assert back.config.max_position_embeddings == made.max_position_embeddings
    ids = torch.randint(1, 37, (2, length))
    mask = torch.ones_like(ids)
    mask[1, length - 3 :] = 0
    results = []
    for each in (theirs, ours, back):
        each.zero_grad()
        out = each(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        (out.loss + (out.logits[mask.bool()] ** 2).sum() / 100).backward()
        weight = next(p for key, p in each.named_parameters() if key.endswith(("embed_tokens.weight", "token.weight")))
        results.append((out.logits[mask.bool()].detach(), out.loss.detach(), weight.grad))
    for found in results[1:]:
        for mine, expected in zip(found, results[0], strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scaling", ["yarn", "dynamic", "longrope", "phi3"])
def test_decoding_with_a_cache_equals_transformers_below_and_above_the_original_length(scaling):
    """Call by call: a prompt and single tokens; a text that longrope turns anew begins a new cache."""
    torch.manual_seed(2)
    fresh = model(phi3() if scaling == "phi3" else config(scaling))
    ours = convert.from_transformers(fresh).eval()
    ids = torch.randint(1, 37, (2, ORIGINAL + 6))
    switches = scaling in ("longrope", "phi3")
    for start, end in [(5, ORIGINAL if switches else ORIGINAL + 6), (ORIGINAL + 2, ORIGINAL + 6)]:
        theirs, cache, past = copy.deepcopy(fresh), Cache(), transformers.DynamicCache()
        for first, last in [(0, start), *((n, n + 1) for n in range(start, end))]:
            with torch.no_grad():
                expected = theirs(ids[:, first:last], past_key_values=past).logits
                found = ours(ids[:, first:last], cache=cache).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    if switches:
        cache = Cache()
        ours(ids[:, :ORIGINAL], cache=cache)
        with pytest.raises(InputError, match=f"passes {ORIGINAL} positions.*start a new cache with the whole text"):
            ours(ids[:, ORIGINAL : ORIGINAL + 1], cache=cache)


@pytest.mark.parametrize("scaling", ["phi3", "dynamic", "yarn"])
def test_generated_texts_are_those_of_transformers_past_the_original_length(scaling):
    torch.manual_seed(3)
    theirs = model(phi3() if scaling == "phi3" else config(scaling))
    ours = convert.from_transformers(theirs).eval()
    ids = torch.randint(1, 37, (2, 9))
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    found = effzoo.generate(ours, ids, max_new_tokens=20)
    assert torch.equal(found, expected)
    if scaling == "phi3":
        assert torch.equal(effzoo.generate(ours, ids, max_new_tokens=20, use_cache=False), expected)


def test_what_depends_on_the_longest_text_of_a_batch_is_refused_where_texts_stand_for_themselves():
    ours = convert.from_transformers(model(config("longrope"))).eval()
    ids, mask = torch.randint(1, 37, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    effzoo.generate(ours, ids, mask, max_new_tokens=ORIGINAL - 9)
    with pytest.raises(IncompatibleError, match=f"texts of more than {ORIGINAL}; generate from one prompt"):
        effzoo.generate(ours, ids, mask, max_new_tokens=ORIGINAL)
    with pytest.raises(IncompatibleError, match="prompt lookup"):
        effzoo.generate(ours, ids[:1], max_new_tokens=3, prompt_lookup_num_tokens=2)
    packed = torch.tensor([[1] * 5 + [2] * (ORIGINAL + 1)])
    tokens = torch.randint(1, 37, packed.shape)
    with pytest.raises(InputError, match=f"texts of more than {ORIGINAL}, so shorter ones"):
        ours(tokens, document_ids=packed)
    alone = ours(tokens[:, :5]).logits
    torch.testing.assert_close(ours(tokens[:, :-2], document_ids=packed[:, :-2]).logits[:, :5], alone)
    short = convert.from_transformers(model(config("longrope")), max_length=ORIGINAL)
    assert short.config.angles_change_at is None


def test_a_model_of_transformers_that_has_seen_a_long_text_is_the_same_model():
    for made in (config("dynamic"), config("longrope"), phi3()):
        theirs = model(made)
        theirs(torch.randint(1, 37, (1, ORIGINAL + 9)))
        ours = convert.from_transformers(theirs)
        ids = torch.randint(1, 37, (1, 7))
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-4)
    theirs = model(config("dynamic"))
    theirs.model.rotary_emb.inv_freq *= 2
    with pytest.raises(ConversionError, match="inv_freq was changed"):
        convert.from_transformers(theirs)


@pytest.mark.parametrize(("fields", "said"), [
    ({"rotary_fraction": 0.4}, "head_dim 8 times rotary_fraction is even, got 3"),
    ({"rotary_fraction": (1.0, 0.5, 0.5)}, "3 values of rotary_fraction for 2 layers"),
    ({"rotary_scaling": {"type": "longrope", "original_max_position_embeddings": 8, "short_factor": [1.0] * 4,
                         "long_factor": [1.0] * 3, "factor": 2.0}},
     "long_factor has a number for each of 4 pairs, got 3"),
    ({"rotary_scaling": {"type": "longrope", "original_max_position_embeddings": 8, "short_factor": [1.0] * 4,
                         "long_factor": [1.0] * 4}}, "takes factor or attention_factor, got neither"),
    ({"rotary_scaling": {"type": "dynamic", "original_max_position_embeddings": 8, "factor": 0.5}}, "at least 1"),
    ({"rotary_scaling": {"type": "yarn", "original_max_position_embeddings": 8, "factor": 2.0, "slow": 1.0}},
     "got type='yarn' with factor, original_max_position_embeddings, slow"),
    ({"rotary_theta": 1.0, "rotary_scaling": {"type": "yarn", "original_max_position_embeddings": 8, "factor": 2.0}},
     "needs rotary_theta above 1"),
])  # fmt: skip
def test_scalings_that_have_no_meaning_say_so(fields, said):
    with pytest.raises(OptionError, match=said):
        effzoo.build("llama", layers=2, dim=16, heads=2, kv_heads=0, mlp=8, vocab=9, max_length=32,
                     **{"rotary_scaling": None} | fields)  # fmt: skip


@pytest.mark.parametrize(("layout", "fields", "said"), [
    ("llama", {"rotary_fraction": 0.5}, "llama of transformers turns whole heads, got rotary_fraction=0.5"),
    ("llama", {"rotary_scaling": ({}, {"type": "linear", "factor": 2.0})}, "one rotary_scaling for all layers"),
    ("modernbert", {"rotary_scaling": {"type": "linear", "factor": 2.0}, "rotary_fraction": 0.5},
     "no counterpart for rotary_fraction=0.5"),
])  # fmt: skip
def test_what_a_layout_does_not_turn_is_refused(layout, fields, said):
    more = {"kv_heads": 0} if layout == "llama" else {"attention": "full", "rotary_theta": 10.0}
    ours = effzoo.build(layout, layers=2, dim=16, heads=2, mlp=8, vocab=9, max_length=32, pad_token=0, bos_token=None,
                        eos_token=None, **more | {"rotary_scaling": None} | fields)  # fmt: skip
    with pytest.raises(ConversionError, match=said):
        convert.to_transformers(ours)


def test_layers_without_positions_turn_nothing():
    torch.manual_seed(4)
    sizes = {"layers": 2, "dim": 16, "heads": 2, "kv_heads": 0, "mlp": 8, "vocab": 9, "max_length": 32}
    none = effzoo.build("llama", rotary_scaling=None, rotary_fraction=(0.0, 0.0), **sizes).eval()
    assert none.config.rotary_fraction == 0 and all(block.attn.rotary is None for block in none.blocks)
    ids, far = torch.randint(9, (1, 6)), torch.tensor([[0, 1, 2, 3, 4, 11]])
    mask = torch.ones_like(ids)
    torch.testing.assert_close(none(ids, mask).last_hidden_state, none(ids, mask, position_ids=far).last_hidden_state)
    some = effzoo.build("llama", rotary_scaling=None, rotary_fraction=(0.0, 1.0), **sizes).eval()
    some.load_state_dict(none.state_dict())
    moved = some(ids, mask, position_ids=far).last_hidden_state
    assert not torch.allclose(some(ids, mask).last_hidden_state, moved)
