"""Taylor mode has its rules wherever it is used, whatever else was imported before."""

import subprocess
import sys

CODE = """
import gpkit, torch
x = torch.full((2, 1), 0.5)
print(gpkit.directional_derivative(torch.sin, x, torch.ones(2, 1), order=2).sum().item())
net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Tanh())
print(gpkit.r1(estimator=gpkit.taylor())(net, real=x).item() > 0)
"""


def test_a_process_that_imports_gpkit_alone_has_the_rules():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    value, acts = done.stdout.split()
    assert abs(float(value) + 2 * 0.479425538604203) < 1e-6  # -sin(1/2), twice
    assert acts == "True"
