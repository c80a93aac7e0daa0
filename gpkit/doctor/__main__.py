"""``python -m gpkit.doctor model=mlp penalty=r1``; ``--help`` lists the options."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from hydra import initialize_config_dir
from rich.console import Console

from gpkit.app.data import built, loader_of
from gpkit.app.overrides import CONFIG_DIR, explain
from gpkit.doctor.diagnose import diagnose
from gpkit.doctor.report import Report, joined, table, verdict
from gpkit.lightning.batches import Batch, entries, unpack
from gpkit.lightning.gan.samples import conditioned, first, unpack_samples


def main(words: Sequence[str] | None = None) -> None:
    """Diagnose the net and the penalties of a config. Exits with 1 if something stops training."""
    parser = argparse.ArgumentParser("python -m gpkit.doctor", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="as for train.py: model=..., penalty=...")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--share",
        type=float,
        default=0.1,
        help="of the loss's gradient that a weight is suggested for",
    )
    parser.add_argument("--no-costs", action="store_true", help="do not measure time and memory")
    options = parser.parse_intermixed_args(words)
    logging.getLogger("hydra").addHandler(logging.NullHandler())  # errors are said in one line here
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3", job_name="doctor"):
            try:
                report = diagnosed(
                    options.overrides, share=options.share, costs=not options.no_costs
                )
            except Exception as error:
                raise ValueError(explain(error, options.overrides)) from error
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if options.json:
        print(json.dumps(report.to_dict()))
    else:
        console = Console()
        console.print(verdict(report.findings), highlight=False)
        if report.findings:
            console.print(table(report))
    sys.exit(0 if report.ok else 1)


def diagnosed(overrides: Sequence[str], **options: Any) -> Report:
    """Return the report on a config's nets and penalties, on its first batch.

    Raises:
        ValueError: if the config has no penalty.
    """
    _, data, module = built(overrides)
    batch = next(iter(loader_of(data, "train")))
    module.train()
    groups = (module.penalties, getattr(module, "generator_penalties", {}))
    if not any(p.weight for penalties in groups for p in penalties.values()):
        raise ValueError("there is no penalty: use penalty=r1, or another one of configs/penalty")
    found = _of_pair(module, batch, options) if hasattr(module, "critic") else []
    if not found and hasattr(module, "net"):
        found = _of_net(module, batch, options)
    return joined(found)


def _of_net(module: Any, batch: Any, options: dict[str, Any]) -> list[Report]:
    """Return a report for each penalty of a `PenalizedModule`."""
    found = []
    for name, penalty in module.penalties.items():
        needs = module.needs[name]
        keys = {key for _, key in needs.given if not callable(key)}
        read: Batch = unpack(batch, module.net, module.inputs, module.target, keys)
        inputs = read.kwargs if read.kwargs and not read.args else read.args
        # The module gives input penalties the loss of each sample by itself.
        loss = module.per_sample_loss if needs.per_sample else module.loss
        given = entries(needs.given, batch)
        example = (inputs, read.y, read.env) if needs.environments else (inputs, read.y)
        found.append(diagnose(module.net, {name: penalty}, example, loss=loss, **given, **options))
    return found


def _of_pair(module: Any, batch: Any, options: dict[str, Any]) -> list[Report]:
    """Return a report for the penalties of a `GANModule`'s critic, and one for its generator's."""
    real, y, _ = unpack_samples(batch, conditional=module.conditional)
    z = module.latents(len(first(real)))
    fake = conditioned(module.generator, y)(z).detach()
    labels = () if y is None else (y,)
    nets = (
        (module.critic, module.penalties, ((real, *labels), None), fake),
        (module.generator, module.generator_penalties, ((z, *labels), None), None),
    )
    return [
        diagnose(net, penalties, example, fake=fakes, **options)
        for net, penalties, example, fakes in nets
        if penalties
    ]


if __name__ == "__main__":
    main()
