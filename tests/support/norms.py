"""Norm layers whose affine map and statistics are not those of their beginning."""


def disturbed(layer):
    """Return a layer whose affine map and statistics are not those of its beginning."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return layer
