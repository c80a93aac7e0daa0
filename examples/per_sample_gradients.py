"""The norm of each sample's gradient in the weights, in one backward pass: which labels are wrong?

A few labels of the digits are replaced by wrong ones. After some training the gradients of these
samples are long. The norms come from the inputs and outputs of the layers; a loop over the samples
gives the same.

    python examples/per_sample_gradients.py        # about 5 seconds

It prints the largest relative difference from the loop (about 1e-5, in float32), and the share of
wrong labels among the 60 samples with the longest gradients (about 0.87; 60 labels are wrong).
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import gpkit

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # [1797, 1, 8, 8]
y = torch.tensor(digits.target)
wrong = torch.randperm(len(y))[:60]
y[wrong] = (y[wrong] + torch.randint(1, 10, (60,))) % 10

net = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(288, 64), nn.SiLU(), nn.Linear(64, 10)
)
optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
for _ in range(12):
    for i in torch.randperm(len(x)).split(100):
        optimizer.zero_grad()
        F.cross_entropy(net(x[i]), y[i]).backward()
        optimizer.step()


def losses():
    return F.cross_entropy(net(x), y, reduction="none")  # [1797]


norms = gpkit.per_sample_grad_norm().terms(losses, net).norms

some = range(0, len(x), 90)
true = []
for i in some:
    grads = torch.autograd.grad(F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), net.parameters())
    true.append(torch.cat([g.reshape(-1) for g in grads]).norm())
difference = ((norms[list(some)] - torch.stack(true)) / torch.stack(true)).abs().max()

longest = norms.topk(len(wrong)).indices
print(f"largest relative difference from the loop {difference:.1e}")
print(f"share of wrong labels {torch.isin(longest, wrong).float().mean():.2f}")
