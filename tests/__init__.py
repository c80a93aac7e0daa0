"""The tests lie as the package does: a folder of gpkit has its tests in the folder of its name.

``support/`` holds what several of them need; it is on the path, so ``import oracles`` finds it.
"""
