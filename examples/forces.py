"""Forces of a molecule: a net of the energy, trained on energies and on their derivatives.

Three atoms in the plane attract and repel each other in pairs (a Morse potential). The force is
F = -∂E/∂x, so the penalty is λ mean ‖∂E_net/∂x - (-F)‖²: `target=` is subtracted before the norm.
The force of the net is exact for its energy: it is conservative.

    python examples/forces.py        # about 6 seconds

It prints the mean size of a force, 1.39 in each component, and the mean error of a component at
new positions: after training on energies alone (about 0.46), and on energies and forces (0.15).
"""

import torch
from torch import nn

import gpkit

torch.set_num_threads(1)
PAIRS = torch.tensor([[0, 1], [0, 2], [1, 2]])


def distances(x):  # [B, 3 atoms, 2] -> [B, 3 pairs]
    return (x[:, PAIRS[:, 0]] - x[:, PAIRS[:, 1]]).norm(dim=2)


def true_energy(x):
    return (1 - torch.exp(-1.5 * (distances(x) - 1))).square().sum(1)


def data(n, seed):
    """Return positions near a triangle of side 1, energies, and forces -∂E/∂x."""
    rng = torch.Generator().manual_seed(seed)
    triangle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.866]])
    x = (triangle + 0.2 * torch.randn(n, 3, 2, generator=rng)).requires_grad_()
    energy = true_energy(x)
    return x.detach(), energy.detach(), -gpkit.derivative(energy, x).detach()


class Energy(nn.Module):
    """It sees the distances alone, so that it does not change if the molecule moves or turns."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
        )

    def forward(self, x):
        return self.layers(distances(x)).squeeze(1)  # [B]


def train(weight):
    torch.manual_seed(0)
    net, (x, energy, forces) = Energy(), data(60, seed=1)
    penalty = gpkit.GradientPenalty(weight=weight)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 500)
        loss = (net(x) - energy).square().mean()
        optimizer.zero_grad()
        (loss + penalty(net, x, target=-forces)).backward()
        optimizer.step()
    return net


x, _, forces = data(500, seed=2)
print(f"mean size of a force {forces.abs().mean():.3f}")
for title, weight in {"energies": 0.0, "energies and forces": 0.1}.items():
    net, z = train(weight), x.clone().requires_grad_()
    found = -gpkit.derivative(net(z), z)
    print(f"error after {title} {(found - forces).abs().mean():.3f}")
