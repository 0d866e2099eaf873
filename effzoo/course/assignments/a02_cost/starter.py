def operations(n, d, heads, hidden):
    """Operations of one layer on one example of n positions, two for each multiplication.

    n positions, d width, heads of d / heads each, hidden units of the feed-forward
    -> {"projections": int, "attention": int, "feed-forward": int}
    """
    raise NotImplementedError("write the three products here")


def crossover(d, hidden):
    """The smallest n, an int, at which attention takes more operations than projections and feed-forward together."""
    raise NotImplementedError("write the smallest n here")


def parameters(layers, d, hidden, vocabulary, positions):
    """Parameters of a decoder like GPT-2, an int: embeddings, layers with biases and two norms each, a last norm."""
    raise NotImplementedError("count the parameters here")


def kept(batch, n, d, heads):
    """Numbers that autograd keeps of softmax(q k^T / sqrt(d / heads)) v, an int: with the weights written out.

    q, k, v [batch, heads, n, d / heads]
    """
    raise NotImplementedError("count what the backward pass needs here")


def memory(parameters, trained):
    """Bytes of fine-tuning in half precision with AdamW and float32 copies, by part.

    parameters in all, of which so many are trained
    -> {"weights": int, "gradients": int, "optimizer": int, "copy": int}
    """
    raise NotImplementedError("write the memory table here")
