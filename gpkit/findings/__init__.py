"""The checks that are made without being asked: before the first step, and when a net is new.

Each says what it has found as a `gpkit.finding.Finding`. Penalties ask ``derivatives``: which
operations of a graph have none, or a wrong one; ``samples``: whether they depend on each other;
``estimate``: whether a form bends it; ``trained``: whether the penalty depends on a trained
parameter; ``seen`` remembers the nets that were looked at. ``located`` and ``watch`` find the
module that made a node. The callbacks ask ``trainer``, ``sharding`` and ``monitor``. The checks of
``gpkit.doctor`` ask the same functions, of a net that they try.
"""
