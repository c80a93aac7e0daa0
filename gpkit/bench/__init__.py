"""What penalties and estimators cost and how exact they are, on a net and a machine of your own.

``python -m gpkit.bench model=mlp penalty=r1`` takes the options of ``train.py``; `gpkit.benchmark`
takes a net. ``variants`` makes the estimators, ``steps`` the training steps, ``measure`` times
them.
"""
