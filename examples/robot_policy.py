"""A discriminator and a policy for robotics, on recorded motions that the example makes itself.

As in adversarial motion priors, a discriminator D scores transitions of a joint: 1 for recorded
ones, -1 for clumsy ones. `gpkit.amp` keeps the style reward max(0, 1 - (D - 1)²/4) from being a
cliff. A policy imitates; `gpkit.lipschitz_policy` keeps noise of the sensors out of the motors.

    python examples/robot_policy.py        # about 6 seconds

It prints D's slope at recorded transitions (0.36 without the penalty, 0.18 with it), the shake of
actions per unit of sensor noise (5.3, 1.9), the error of the imitation (2.09, 2.12; the noise of
actions is 2), and the style reward of recorded and clumsy motion (0.87, 0.55).
"""

import torch
from torch import nn
from torch.distributions import Normal

import gpkit

torch.manual_seed(0)
DT = 0.02


def record(stiffness, noise, seed, episodes=20, steps=100):
    """Return states [N, 4], transitions [N, 8] and actions [N, 1] of some motions."""
    rng = torch.Generator().manual_seed(seed)
    phase, rows = 2 * torch.pi * torch.rand(episodes, generator=rng), []
    angle, velocity = phase.sin(), phase.cos()
    for _ in range(steps):
        action = stiffness * (phase.sin() - angle) + 8 * (phase.cos() - velocity)
        action = action + noise * torch.randn(episodes, generator=rng)
        state = torch.stack([angle, velocity, phase.sin(), phase.cos()], 1)
        velocity, phase = velocity + DT * action, phase + DT
        angle = angle + DT * velocity
        after = torch.stack([angle, velocity, phase.sin(), phase.cos()], 1)
        rows.append((state, torch.cat([state, (after - state) / DT], 1), action[:, None]))
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


def trained(inputs, total, steps=300):
    """Train a net on total(net, i), where i are the indices of a batch."""
    torch.manual_seed(0)
    hidden = nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU()
    net = nn.Sequential(*hidden, nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        total(net, torch.randint(len(states), (128,))).backward()
        optimizer.step()
    return net


states, recorded, actions = record(stiffness=40, noise=2.0, seed=0)
clumsy = record(stiffness=10, noise=6.0, seed=1)[1]
noisy = states + 0.02 * torch.randn_like(states)
amp = gpkit.amp(weight=2.0)  # (2/2) mean ‖∇D‖² on recorded transitions, + that on the clumsy
smooth = gpkit.lipschitz_policy(weight=0.005)  # 0.005 mean ‖∇_s log π(a|s)‖²

for title, on in {"without": 0.0, "with": 1.0}.items():

    def loss_of_critic(D, i, on=on):
        loss = (D(recorded[i]) - 1).square().mean() + (D(clumsy[i]) + 1).square().mean()
        return loss + on * amp(D, real=recorded[i], fake=clumsy[i])

    def loss_of_policy(policy, i, on=on):
        def log_probs(s):  # of the recorded actions, [B]
            return Normal(policy(s), 2.0).log_prob(actions[i]).sum(1)

        return -log_probs(states[i]).mean() + on * smooth(log_probs, states[i])

    D, policy = trained(8, loss_of_critic), trained(4, loss_of_policy)
    slope = gpkit.r1().terms(D, real=recorded).norms.mean()
    print(f"slope of D {title} the penalty {slope:.2f}")
    shake = (policy(noisy) - policy(states)).std() / 0.02
    print(f"shake of the policy {title} the penalty {shake:.1f}")
    print(f"error of the policy {title} the penalty {(policy(states) - actions).std():.2f}")

for title, motion in {"recorded": recorded, "clumsy": clumsy}.items():
    reward = (1 - (D(motion) - 1).square() / 4).clamp(min=0)
    print(f"style reward of {title} motion {reward.mean():.2f}")
