"""Models as graphs: torch.export with lengths of every size, ONNX in onnxruntime, and both without effzoo."""

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from support import small
from torch.export import Dim, export

import effzoo
from effzoo.architectures import Output
from effzoo.attention.features import FeatureAttention
from effzoo.export import portable

SMALL = {"layers": 2, "dim": 32, "heads": 2, "mlp": 32, "vocab": 60, "max_length": 64}
KINDS = effzoo.attention.names()


def built(kind, name="bert", **more):
    torch.manual_seed(0)
    task = "causal_lm" if name in ("gpt2", "llama") else "classification"
    return effzoo.build(name, task=task, attention=small(kind), **(SMALL | {"kv_heads": 0} | more)).eval()


def given(rows=3, n=24, padded=4):
    draw = torch.Generator().manual_seed(n)
    mask = torch.ones(rows, n, dtype=torch.long)
    mask[0, n - padded :] = 0
    return {"input_ids": torch.randint(5, 60, (rows, n), generator=draw), "attention_mask": mask}


def shapes():
    """More than one chunk of each kind, and less than max_length, where linformer's E is whole."""
    batch, n = Dim("batch", min=1, max=64), Dim("n", min=17, max=63)
    return {"input_ids": {0: batch, 1: n}, "attention_mask": {0: batch, 1: n}}


def exported(model):
    return export(model, (), given(), dynamic_shapes=shapes())


def ours(program):
    return {str(node.target) for node in program.graph.nodes if "effzoo" in str(node.target)}


def shown(logits, inputs, model):
    """Logits at tokens, of a decoder."""
    return logits[inputs["attention_mask"].bool()] if model.task == "causal_lm" else logits


def test_an_output_goes_through_a_graph():
    values, spec = torch.utils._pytree.tree_flatten(Output.of(logits=torch.ones(1), loss=torch.zeros(1)))
    again = torch.utils._pytree.tree_unflatten(values, spec)
    assert type(again) is Output and list(again) == ["loss", "logits"] and again.loss is values[0]
    plain = torch.utils._pytree.treespec_loads(torch.utils._pytree.treespec_dumps(spec))
    assert plain == spec


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) if kind not in ("longformer", "linear")
                                  else kind for kind in KINDS])  # fmt: skip
def test_a_graph_serves_other_batches_and_lengths(kind):
    """With the operators of effzoo, at the cost of the kind; and with torch's own alone."""
    model = built(kind)
    program = exported(model)
    sums = issubclass(effzoo.attention.get(kind), FeatureAttention)  # by the operators of torch in any case
    assert ("effzoo.attention.default" in ours(program)) is not sums
    with portable():
        plain = exported(model)
    assert not ours(plain)
    for rows, n in ((1, 17), (5, 37), (2, 63)):
        inputs = given(rows, n)
        expected = model(**inputs).logits
        for graph in (program, plain):
            out = graph.module()(**inputs)
            assert type(out) is Output
            torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) if kind != "longformer" else kind
                                  for kind in KINDS])  # fmt: skip
def test_decoders_and_adapters_are_exported(name, kind):
    try:
        model = built(kind, name)
    except effzoo.EffzooError:
        assert effzoo.attention.get(kind).not_causal
        return
    effzoo.attach(model, "lora[rank=2]")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".adapters." in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.eval()
    with portable():
        program = exported(model)
    inputs = given(4, 41)
    found, expected = (shown(x.logits, inputs, model) for x in (program.module()(**inputs), model(**inputs)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


READ = """
import sys, torch
assert "effzoo" not in sys.modules
program = torch.export.load(sys.argv[1])
ids, mask = torch.load(sys.argv[2])
print(program.module()(input_ids=ids, attention_mask=mask)[0].double().sum().item())
"""


@pytest.mark.slow
def test_a_portable_graph_runs_where_effzoo_is_not(tmp_path):
    model = wrapped = built("longformer")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = wrapped

        def forward(self, input_ids, attention_mask):
            return (self.model(input_ids, attention_mask).logits,)

    with portable():
        program = export(Logits().eval(), (), given(), dynamic_shapes=shapes())
    torch.export.save(program, tmp_path / "model.pt2")
    inputs = given(2, 50)
    torch.save(tuple(inputs.values()), tmp_path / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "model.pt2"), str(tmp_path / "inputs.pt")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(model(**inputs).logits.double().sum().item(), abs=1e-5)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) if kind != "longformer"
                                  else kind for kind in KINDS])  # fmt: skip
def test_onnx_gives_the_logits(kind, tmp_path):
    model = built(kind)
    file = str(tmp_path / "model.onnx")
    with portable():
        torch.onnx.export(model, (), file, kwargs=given(), dynamic_shapes=shapes(), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file)
    for rows, n in ((1, 17), (4, 45)):
        inputs = given(rows, n)
        logits = session.run(None, {key: value.numpy() for key, value in inputs.items()})[0]
        np.testing.assert_allclose(logits, model(**inputs).logits.detach(), rtol=0, atol=1e-5)
