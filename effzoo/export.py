"""Graphs that run without effzoo: `torch.export`, and from there ONNX.

In compiled code attention is one operator of effzoo, which finds its tiles when it runs. Inside `portable()` a graph
gets the definition in torch's own operators instead.
"""

from effzoo.devices import portable

__all__ = ["portable"]
