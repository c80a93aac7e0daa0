"""The application: ``python train.py`` and ``gpkit-train``. Hydra is used here and nowhere else.

``cli`` runs a command, ``overrides`` reads and explains what was typed, ``build`` makes the module,
the nets and the callbacks of a config, ``train`` runs a job and writes its results.
"""
