"""The application: ``python train.py`` and ``gpkit-train``. Only this package imports Hydra.

``cli`` runs a command and reports an error in one line. ``overrides`` checks what a user typed and
explains errors. ``build`` makes the module, the nets and the callbacks of a config. ``train`` runs
one job and writes its results.
"""
