"""What every test shares: one thread, for nets so small that threads would only wait."""

import logging

import torch

torch.set_num_threads(1)
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # "GPU available: False" and so on
