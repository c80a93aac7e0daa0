"""What a call gives besides the samples: `target`, `metric` and `sample_weight`.

``given`` holds them, ``entries`` fits them to the shape of a derivative, ``sample_weight`` has the
weighted mean, ``keys`` says where Lightning modules find them in a batch, and ``named`` reads
samples that are dicts.
"""
