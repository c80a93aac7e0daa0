"""The public names: to `help`, to `import *`, to a typing error. See tests/typing for types."""

import builtins
import pydoc
from pathlib import Path

import pytest

import gpkit


def test_type_checkers_and_the_interpreter_see_the_same_names():
    text = Path(gpkit.__file__).read_text()
    block = text.partition("if TYPE_CHECKING:")[2].partition("else:")[0]
    imports = [line.split() for line in block.splitlines() if line.strip().startswith("from gpkit")]
    typed = {(words[1], words[3]) for words in imports}
    assert all(words[3] == words[5] for words in imports)  # `X as X`: an explicit re-export
    assert typed == {(module, name) for name, module in gpkit._HOME.items()}
    assert set(gpkit.__all__) == set(gpkit._HOME) - {"compile", "sum"}
    # `bench` is a package that can be called
    assert all(getattr(gpkit, n).__name__.rpartition(".")[2] == n for n in gpkit._HOME)


def test_help_lists_every_name_by_kind():
    text = pydoc.plain(pydoc.render_doc(gpkit))
    described = text.partition("DESCRIPTION")[2].partition("PACKAGE CONTENTS")[0]
    words = set(described.replace(",", " ").replace(".", " ").split())
    assert set(gpkit._HOME) <= words


def test_star_import_leaves_the_builtins_alone():
    names = {}
    exec("from gpkit import *", names)
    assert "r1" in names
    assert not {n for n in names if hasattr(builtins, n) and not n.startswith("__")}


def test_a_misspelt_name_is_told_with_the_nearest_one():
    with pytest.raises(AttributeError, match=r"no attribute 'wgangp' \(did you mean 'wgan_gp'\?\)"):
        _ = gpkit.wgangp
