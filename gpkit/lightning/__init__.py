"""Lightning: modules and callbacks that train with penalties, and log gradient norms.

``module`` trains any net, ``gan`` a critic and a generator, ``callback`` adds penalties to somebody
else's LightningModule, ``monitor`` logs gradient norms. They share ``watch`` (hooks and replays),
``recording`` (what is logged), ``norms``, ``batches``, ``refusals``, and ``compat``, which holds
all private API of Lightning that is used. A new feature gets a folder of its own.
"""
