"""No method lets a causal language model see the tokens that it predicts."""

import pytest
import torch

import effzoo
from effzoo.errors import EffzooError

SIZES = {"layers": 2, "dim": 16, "heads": 2, "mlp": 24, "vocab": 31, "max_length": 48, "dropout": 0.0}
REFUSED = {"head", "pals", "residual_adapter", "unipelt"}


@pytest.mark.cover
@pytest.mark.parametrize("attention", ["full", "longformer[window=6]"])
@pytest.mark.parametrize("name", effzoo.peft.names())
def test_what_is_written_at_a_token_does_not_change_with_later_ones(name, attention):
    torch.manual_seed(0)
    model = effzoo.build("gpt2", task="causal_lm", attention=attention, attention_dropout=0.0, **SIZES).double().eval()
    if name in REFUSED:
        with pytest.raises(EffzooError):
            effzoo.attach(model, name)
        return
    effzoo.attach(model, name)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(31, (2, 16))
    other = ids.clone()
    other[:, 9:] = (ids[:, 9:] + 1) % 31
    with torch.no_grad():
        one, two = model(ids).logits, model(other).logits
    assert (one - two)[:, 9:].abs().max() > 1e-3
    torch.testing.assert_close(one[:, :9], two[:, :9], rtol=0, atol=1e-10)
