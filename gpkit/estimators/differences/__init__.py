"""How finite differences step: the length, and the difference in the weights."""
