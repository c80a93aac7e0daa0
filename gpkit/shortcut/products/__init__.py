"""The gradients in wide weights, whose products are added in place: penalty, and difference."""
