"""LightningModules and callbacks that train with gradient penalties and log gradient norms.

- ``module``: `PenalizedModule` trains any net on a loss and penalties.
- ``gan``: `GANModule` trains a critic and a generator.
- ``callback``: `GradientPenaltyCallback` adds penalties to any LightningModule.
- ``monitor``: `GradientNormMonitor` logs gradient norms of any LightningModule.

They share ``watch`` (forward hooks, and reruns of a training step), ``recording`` (scalars and
histograms), ``norms``, ``batches``, ``refusals`` (one error for all findings) and ``compat`` (all
private API of Lightning).

To add a feature:

1. a folder of its own, with one class for users, exported in its ``__init__.py`` and in
   ``gpkit/__init__.py``; features do not import each other;
2. what it logs of penalties comes from ``recording``, so that the names are the same everywhere;
3. private API goes into ``compat``, with the reason and a test;
4. tests in ``tests/lightning/<feature>``, against a loop written by hand.

Penalties act on a loss and are logged in a few lines:

>>> import gpkit, torch
>>> from gpkit.lightning.recording import penalty_scalars
>>> from gpkit.sums import as_sum
>>> penalties, net = as_sum(gpkit.weight_grad_norm(weight=0.1)), torch.nn.Linear(2, 1)
>>> loss = net(torch.ones(4, 2)).square().mean()
>>> terms = penalties.act(loss, net)
>>> total = penalties.total(loss, terms, net.parameters)
>>> [name.removeprefix("penalty/weight_grad_norm") for name in penalty_scalars(penalties, terms)]
['', '/weight', '/norm']
"""
