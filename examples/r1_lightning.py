"""R1 in a LightningModule of your own: lazy, inside of a training step that you wrote.

A GAN learns points on a ring. The penalty acts on every 4th step with 4 times the weight.
`gpkit.register_penalty` puts its step count and its seed in the module's checkpoints.

    python examples/r1_lightning.py        # about 8 seconds

It prints the mean radius of the samples (the ring has 1), its standard deviation (about 0.15 so
early; 0.05 in the data), the largest empty sector in degrees (about 1: no part of the ring is
missed), and the critic's squared slope on real points (below 0.1).
"""

import logging
import math
import warnings

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader

import gpkit

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")
torch.set_num_threads(1)
pl.seed_everything(0, verbose=False)


def net(inputs, outputs):
    layers = nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, outputs)
    return nn.Sequential(*layers)


class RingGAN(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = net(4, 2), net(2, 1)
        gpkit.register_penalty(self, "r1", gpkit.r1(weight=1.0, every=4))

    def training_step(self, real, batch_idx):
        of_generator, of_critic = self.optimizers()
        fake = self.generator(torch.randn(len(real), 4))
        loss = softplus(-self.critic(real)).mean() + softplus(self.critic(fake.detach())).mean()
        of_critic.zero_grad()
        self.manual_backward(loss + self.r1(self.critic, real=real))
        of_critic.step()
        of_generator.zero_grad()
        self.manual_backward(softplus(-self.critic(fake)).mean())
        of_generator.step()

    def configure_optimizers(self):
        make = torch.optim.Adam
        return [
            make(part.parameters(), lr=3e-3, betas=(0.0, 0.99))
            for part in (self.generator, self.critic)
        ]


angle = 2 * math.pi * torch.rand(4096)
ring = torch.stack([angle.cos(), angle.sin()], 1) * (1 + 0.05 * torch.randn(4096, 1))
module = RingGAN()
quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar"], False)
trainer = pl.Trainer(max_epochs=16, accelerator="cpu", enable_model_summary=False, **quiet)
trainer.fit(module, DataLoader(ring, 128, shuffle=True))

with torch.no_grad():
    samples = module.generator(torch.randn(4000, 4))
radius = samples.norm(dim=1)
angles = torch.atan2(samples[:, 1], samples[:, 0]).sort().values
gaps = torch.diff(angles, append=angles[:1] + 2 * math.pi)
slopes = module.r1.terms(module.critic, real=ring).norms
print(f"mean radius {radius.mean():.2f}")
print(f"standard deviation of the radius {radius.std():.2f}")
print(f"largest empty sector {gaps.max() * 180 / math.pi:.0f}")
print(f"squared slope on real points {slopes.square().mean():.3f}")
