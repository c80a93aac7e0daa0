"""Who imports whom in gpkit, read from its source, which is not run.

    python docs/imports.py [checkout] [--json] [--draw imports.svg]

A module is a file. An arrow goes from a module to one that it imports, also inside of a function
or for type checkers only. The imports of an ``__init__.py`` from its own package are left out,
because they only pass names on. A module that imports nothing is on floor 0; any other is one floor
above the highest that it imports. The modules of a circle are on one floor. The files directly in
gpkit/ are the folder "gpkit".
"""

import argparse
import ast
import json
from collections import Counter
from pathlib import Path

LONG, FULL, SHORT = 330, 14, 40  # lines of a file, files of a folder, lines of a file
Graph = dict[str, set[str]]  # each module with some of the others


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules that one of them imports."""
    init = path.name == "__init__.py"
    package = name.split(".") if init else name.split(".")[:-1]
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            full = [f"{base}.{alias.name}" for alias in node.names]
            names += [n if n in known else base for n in full]
    return {n for n in names if n in known and n != name and not (init and f"{name}." in n)}


def reached(graph: Graph) -> Graph:
    """Return what each module reaches by a chain of imports: itself too, if it is in a circle."""
    reach = {a: set(to) for a, to in graph.items()}
    for middle in graph:
        for to in reach.values():
            to |= reach[middle] if middle in to else set()
    return reach


def floors(graph: Graph, reach: Graph) -> dict[str, int]:
    """Return the floor of each module."""
    found: dict[str, int] = {}
    for a in sorted(graph, key=lambda a: len(reach[a] | {a})):  # what it imports comes first
        circle = {a} | {b for b in reach[a] if a in reach[b]}
        below = set().union(*(graph[b] for b in circle)) - circle
        found[a] = 1 + max((found[b] for b in below), default=-1)
    return found


def survey(root: Path) -> dict:
    """Return all that is told of a checkout."""
    known, home = {}, {}
    for path in sorted((root / "gpkit").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        known[name], home[name] = path, "/".join(parts[1:-1]) or "gpkit"
    graph = {name: imported(name, path, known) for name, path in known.items()}
    lines = {a: len(path.read_text(encoding="utf-8").splitlines()) for a, path in known.items()}
    reach = reached(graph)
    floor = floors(graph, reach)
    chain = [max(sorted(floor), key=lambda a: floor[a])]
    while at := floor[chain[-1]]:
        chain.append(min(b for b in reach[chain[-1]] if floor[b] == at - 1))
    circles = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    across = Counter((home[a], home[b]) for a in graph for b in graph[a] if home[a] != home[b])
    files = Counter(home.values())
    users = {b: [a for a in graph if b in graph[a]] for b in graph}
    small = [a for a in graph if lines[a] < SHORT and known[a].name != "__init__.py"]
    return {
        "modules": len(graph),
        "of these, __init__.py": sum(path.name == "__init__.py" for path in known.values()),
        "arrows": sum(map(len, graph.values())),
        "floors": 1 + max(floor.values()),
        "a longest chain, by floors (of a circle, one module)": {a: floor[a] for a in chain},
        "circles": {", ".join(c): len(c) for c in sorted(circles, key=len)},
        "arrows between folders": {f"{a} -> {b}": n for (a, b), n in sorted(across.items())},
        f"files over {LONG} lines": {a: n for a, n in lines.items() if n > LONG},
        f"folders with more than {FULL} files": {f: n for f, n in files.items() if n > FULL},
        f"files under {SHORT} lines that one other file uses": {
            f"{a}, used by {users[a][0]}": lines[a] for a in small if len(users[a]) == 1
        },
        "graph": {
            a: {"folder": home[a], "floor": floor[a], "imports": sorted(graph[a])} for a in graph
        },
    }


def draw(nodes: dict, file: Path) -> None:
    """Draw what has arrows: floor 0 lowest, circles red, an arrow pale if longer chains say it."""
    import matplotlib.pyplot as plt

    graph = {a: set(node["imports"]) for a, node in nodes.items()}
    pairs, reach = [(a, b) for a in graph for b in graph[a]], reached(graph)
    linked = sorted({a for pair in pairs for a in pair}, key=lambda a: (nodes[a]["folder"], a))
    near = {a: [b for b in graph if b in graph[a] or a in graph[b]] for a in linked}
    at: dict[str, tuple[float, float]] = {}
    for _ in range(40):  # each time every row is ordered by the middles of its neighbours
        top = 0.0
        for floor in range(1 + max(node["floor"] for node in nodes.values())):
            xs = {a: [at[b][0] for b in near[a] if b in at] or [0.5] for a in linked}
            row = [a for a in linked if nodes[a]["floor"] == floor]
            row.sort(key=lambda a: sum(xs[a]) / len(xs[a]))
            deep = -(-len(row) // 12)  # a long row is broken, with its modules in turn up and down
            at |= {a: ((i + 0.5) / len(row), top + i % deep) for i, a in enumerate(row)}
            top += deep + 0.4
    colors = [*plt.cm.tab20.colors[:6:2], *plt.cm.tab20.colors[8::2], *plt.cm.tab20b.colors[::4]]
    hues = {f: colors[i % 14] for i, f in enumerate(sorted({n["folder"] for n in nodes.values()}))}
    figure, ax = plt.subplots(figsize=(16.5, 11.7), layout="constrained")  # A3
    ax.set(xlim=(0, 1), ylim=(-0.5, top - 0.8), xticks=[], yticks=[], frame_on=False)
    for a, b in pairs:
        ring, longer = a in reach[b], any(b in reach[c] for c in graph[a] - {b})
        look = {"color": "red" if ring else hues[nodes[a]["folder"]], "lw": 0.8}
        look |= {"alpha": 0.3 if longer and not ring else 0.9, "shrinkA": 6, "shrinkB": 7}
        look |= {"arrowstyle": "-|>,head_width=.15,head_length=.3"}
        ax.annotate("", at[b], at[a], arrowprops={"connectionstyle": "arc3,rad=.08", **look})
    for a, spot in at.items():
        hue = hues[nodes[a]["folder"]]
        box = {"boxstyle": "round,pad=.3", "fc": [0.6 + 0.4 * part for part in hue], "ec": hue}
        box |= {"ec": "red", "lw": 1.8} if a in reach[a] else {}
        ax.text(*spot, a.split(".")[-1], ha="center", va="center", size=7, bbox=box, zorder=9)
    marks = [plt.Rectangle((0, 0), 1, 1, color=hue) for hue in hues.values()]
    figure.legend(marks, hues, loc="outside lower center", ncols=14, fontsize=9)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    raw, here = argparse.RawDescriptionHelpFormatter, Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("checkout", nargs="?", type=Path, default=here, help="its root")
    parser.add_argument("--json", action="store_true", help="print JSON, with all arrows")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw it, as .svg or .png")
    options = parser.parse_args()
    told = survey(options.checkout.resolve())
    if options.draw:
        draw(told["graph"], options.draw)
    if options.json:
        print(json.dumps(told, indent=1))
    shown = {} if options.json else {t: v for t, v in told.items() if t != "graph"}
    for title, value in shown.items():
        print(f"{title}: {value if isinstance(value, int) else len(value)}")
        for line, number in value.items() if isinstance(value, dict) else ():
            print(f"    {line}: {number}")
