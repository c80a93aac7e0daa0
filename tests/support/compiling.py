"""torch.compile in tests: where it can run, what it has compiled, and what is compared."""

import shutil

import pytest

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile needs a compiler"
)


def losses_and_gradients(module, batches):
    results = []
    for batch in batches:
        module.zero_grad()
        loss = module.penalized_loss(batch)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in module.parameters())])
    return results


class Graphs:
    """A backend that counts what is compiled and what is run of it."""

    def __init__(self):
        self.compiled = self.run = 0

    def __call__(self, graph, inputs):
        self.compiled += 1

        def run(*args):
            self.run += 1
            return graph(*args)

        return run
