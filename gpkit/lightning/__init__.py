"""gpkit for PyTorch Lightning."""
