"""``python -m gpkit.report DIR``: the runs of a sweep, in tables, plots and a page.

``read`` finds the runs. ``groups`` puts those together that differ in the seed alone, and compares
them with the baseline. ``tables`` writes Markdown and CSV, ``plots`` the figures, ``page`` HTML.
"""
