"""Many random configurations by hand: `python -m tests.property.run --number 20000 --seed 1`."""

from __future__ import annotations

import argparse
import random
import time
import traceback
from collections import Counter

import torch

from tests.property.check import check, followed
from tests.property.config import draw, parse
from tests.property.refusals import kind_of, refusal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=1000, help="of configurations")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--only", help="one configuration, as it was printed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only:
        print(check(parse(args.only)))
        return
    rng, began = random.Random(args.seed), time.time()
    kinds: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    example: dict[str, str] = {}
    axes: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for i in range(args.number):
        if i % 1000 == 999:
            print(f"{i + 1}: {dict(kinds)}", flush=True)
        c = draw(rng)
        try:
            outcome = check(c)
        except Exception as error:
            kinds["failed"] += 1
            last = "" if isinstance(error, AssertionError) else traceback.format_exc(limit=-3)
            print(f"FAILED {i}: {type(error).__name__}: {error}\n{last}", flush=True)
            continue
        kinds[outcome.kind] += 1
        if outcome.kind == "refused":
            refused[kind_of(outcome.message)] += 1
            example.setdefault(kind_of(outcome.message), repr(c))
            try:
                end = followed(c, outcome)
                ends[end.kind if end.kind != "refused" else f"refused: {end.message}"] += 1
            except Exception as error:
                print(f"FAILED, as advised, {i}: {error}\nfrom {c!r}\n", flush=True)
        elif outcome.kind == "same":
            for name in ("wrt", "scope", "order", "form", "norm", "at", "estimator", "reduce",
                         "forward", "of", "net", "dtype", "call"):  # fmt: skip
                axes[f"{name}={getattr(c, name)}"] += 1
    print(
        f"{args.number} configurations, seed {args.seed}, {time.time() - began:.0f} s: "
        f"{dict(kinds)}"
    )
    for message, count in refused.most_common():
        why = "" if refusal(message) else " (NOT KNOWN)"
        print(f"{count:6d} refused{why}: {message}\n       {example[message]}")
    print("where the advice of the refusals ended:")
    for end, count in ends.most_common():
        print(f"{count:6d} {end}")
    print("compared, by axis:")
    for name, count in sorted(axes.items()):
        print(f"{count:6d} {name}")


if __name__ == "__main__":
    main()
