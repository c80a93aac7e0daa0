"""Each finding: a net that shows it, and one that must not. The other findings are notes."""

import re
from pathlib import Path

import pytest
import torch
from diagnosed import CASES, x

import gpkit
from gpkit.finding import CODES

PAGE = Path(__file__).parents[2] / "docs" / "doctor.md"


def diagnosed(net, penalty, example, loss, **options):
    torch.manual_seed(0)
    options = {"loss": loss, "costs": False, **options}
    return gpkit.diagnose(net(), penalty(), (example or x)(), **options)


@pytest.mark.parametrize("name", CASES)
def test_it_is_found_where_it_is_and_nowhere_else(name):
    case = CASES[name]
    report = diagnosed(case.net, case.penalty, case.example, case.loss, **case.options)
    found = [f for f in report.findings if f.code == case.code and f.severity == case.severity]
    assert found, str(report)
    assert case.module in {f.module for f in found}, str(report)
    assert report.ok == (case.severity != "error")
    clean = diagnosed(
        case.other,
        case.other_penalty or case.penalty,
        case.other_example or case.example,
        case.other_loss or case.loss,
        **case.other_options,
    )
    assert not [f for f in clean.findings if f.code == case.code and f.severity == case.severity]
    assert clean.ok, str(clean)


def test_every_code_has_a_case():
    elsewhere = {
        "reached",  # test_numbers.py
        "partial-gradient",
        "compiled",  # test_prepare.py
        "trainer",  # tests/findings/test_trainer.py
    }
    assert {case.code for case in CASES.values()} | elsewhere == set(CODES)


def test_the_page_lists_the_codes():
    rows = re.findall(r"^\| `([\w-]+)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert dict(rows) == CODES
