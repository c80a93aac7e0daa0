"""A classifier of digits that is harder to fool, by a penalty on its gradient in the input.

The same net is trained with and without the penalty. Both are attacked by one step along the sign
of the gradient (FGSM), with pixels between 0 and 1.

    python examples/robust_classifier.py        # about 6 seconds

It prints the accuracy on clean test digits (about 0.97 for both), and under the attack
(about 0.17 without the penalty, 0.37 with it).
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import gpkit

torch.set_num_threads(1)
digits = load_digits()
X = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # [1797, 1, 8, 8]
Y = torch.tensor(digits.target)
order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
train_set, test_set = order[:1200], order[1200:]


def train(penalty):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(25):
        for i in train_set[torch.randperm(len(train_set))].split(100):
            x, y = X[i].requires_grad_(), Y[i]
            losses = F.cross_entropy(net(x), y, reduction="none")  # one for each digit: [B]
            optimizer.zero_grad()
            (losses.mean() + penalty(losses, x)).backward()
            optimizer.step()
    return net


def accuracy(net, epsilon):
    x, y = X[test_set].requires_grad_(), Y[test_set]
    (g,) = torch.autograd.grad(F.cross_entropy(net(x), y), x)
    attacked = (x + epsilon * g.sign()).clamp(0, 1)
    return (net(attacked).argmax(1) == y).float().mean().item()


for title, penalty in {"without": gpkit.none(), "with": gpkit.input_grad_norm(weight=0.3)}.items():
    net = train(penalty)
    print(f"clean accuracy {title} the penalty {accuracy(net, 0.0):.3f}")
    print(f"attacked accuracy {title} the penalty {accuracy(net, 0.15):.3f}")
