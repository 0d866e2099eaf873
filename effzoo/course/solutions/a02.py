def operations(n, d, heads, hidden):
    """Operations of one layer on one example of n positions, two for each multiplication."""
    width = d // heads
    return {
        "projections": 4 * (2 * n * d * d),
        "attention": heads * 2 * (2 * n * n * width),
        "feed-forward": 2 * (2 * n * d * hidden),
    }


def crossover(d, hidden):
    """4 n^2 d > 8 n d^2 + 4 n d hidden, that is n > 2 d + hidden."""
    return 2 * d + hidden + 1


def parameters(layers, d, hidden, vocabulary, positions):
    """Parameters of a decoder like GPT-2: embeddings, layers with biases and two norms each, a last norm."""
    projections = 4 * (d * d + d)
    feed_forward = d * hidden + hidden + hidden * d + d
    norm = 2 * d
    return (vocabulary + positions) * d + layers * (projections + feed_forward + 2 * norm) + norm


def kept(batch, n, d, heads):
    """q, k and v for the products, and the weights, which the softmax and the second product share."""
    return 3 * batch * n * d + batch * heads * n * n


def memory(parameters, trained):
    """Bytes of fine-tuning in half precision with AdamW and float32 copies, by part."""
    moments = 2 * 4
    return {"weights": 2 * parameters, "gradients": 2 * trained, "optimizer": moments * trained, "copy": 4 * trained}
