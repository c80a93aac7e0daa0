"""A signed distance field from points on a curve with their normals, by the eikonal term.

The net is told that the curve is where f = 0, and the direction of ∇f there: `target=` is
subtracted before the norm. That its slope is 1 everywhere in a box makes f a distance. The curve
is an ellipse here, whose distances are computed to compare with.

    python examples/signed_distance.py        # about 5 seconds

It prints the mean error of the distance in the box (about 0.005, where distances are 0.37 on
average), that of the slope, and the error of the distance without the eikonal term (about 0.1).
"""

import math

import torch
from torch import nn

import gpkit

torch.set_num_threads(1)
ANGLE = torch.linspace(0, 2 * math.pi, 1001)[:-1]
CURVE = torch.stack([0.6 * ANGLE.cos(), 0.3 * ANGLE.sin()], 1)
NORMALS = nn.functional.normalize(torch.stack([0.3 * ANGLE.cos(), 0.6 * ANGLE.sin()], 1))
STEPS = 350


def true_distance(x):
    inside = (x[:, 0] / 0.6) ** 2 + (x[:, 1] / 0.3) ** 2 < 1
    distance = torch.cdist(x, CURVE).min(1).values
    return torch.where(inside, -distance, distance)


def train(weight):
    torch.manual_seed(0)
    layers = nn.Linear(2, 64), nn.Softplus(10), nn.Linear(64, 64), nn.Softplus(10), nn.Linear(64, 1)
    net = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    normals = gpkit.GradientPenalty()  # mean ‖∇f - normal‖²
    eikonal = gpkit.eikonal(weight=weight)  # λ mean (‖∇f‖ - 1)²
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / STEPS)
        i = torch.randint(len(CURVE), (64,))
        loss = net(CURVE[i]).abs().mean() + normals(net, CURVE[i], target=NORMALS[i])
        optimizer.zero_grad()
        (loss + eikonal(net, 2 * torch.rand(128, 2) - 1)).backward()
        optimizer.step()
    return net


box = 2 * torch.rand(4000, 2, generator=torch.Generator().manual_seed(1)) - 1
net, without = train(1.0), train(0.0)
with torch.no_grad():
    errors = [(f(box).squeeze(1) - true_distance(box)).abs().mean() for f in (net, without)]
slopes = gpkit.eikonal().terms(net, box).norms
print(f"error of the distance {errors[0]:.3f}")
print(f"error of the slope {(slopes - 1).abs().mean():.3f}")
print(f"error of the distance without the term {errors[1]:.3f}")
