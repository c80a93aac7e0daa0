"""Will this net take this penalty, and will it train anything? Asked before training starts.

``gpkit.diagnose(net, penalty, example)`` runs all checks of ``diagnose.CHECKS`` on a copy of the
net, and reports every finding at once; ``python -m gpkit.doctor model=mlp penalty=r1`` does it with
the options of ``train.py``. ``gpkit.prepare(net)`` returns a copy in which known obstacles are
replaced by layers of the same function.

A check is a function of a `Trial`, which holds the net, one penalty, and the samples, and yields
findings. To add one: write it in the file of its subject in ``checks``, name it in
``diagnose.CHECKS``, give its code a line in ``gpkit/finding.py`` and in docs/doctor.md, and add to
the table of tests/doctor/test_findings.py a net that shows it and one that must not.
"""
