"""Every architecture by every job: right, or refused for an expected reason."""

import importlib.util
from pathlib import Path

import pytest
from zoo.building import LINES
from zoo.cells import outcome
from zoo.jobs import JOBS
from zoo.table import expected, in_part, known_wrong, reasons

CELLS = [(name, job) for name in LINES for job in JOBS]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("zoo")


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        everything = metafunc.config.getoption("zoo") == "all"
        chosen = [c for c in CELLS if (everything or in_part(*c)) and c not in known_wrong()]
        metafunc.parametrize("cell", [pytest.param(c, id=f"{c[0]}-{c[1]}") for c in chosen])


def test_a_cell_is_right_or_refused_as_expected(cell, place):
    found, wanted = outcome(*cell, place), expected().get(cell)
    if wanted is None:
        assert found.word == "right", f"{found}\n{found.details}"
    else:
        assert wanted.meets(str(found)), f"expected {wanted.word}: {wanted.begins}\ngot {found}\n{found.details}"


def test_the_part_that_the_suite_runs_has_every_architecture_and_every_job():
    part = [cell for cell in CELLS if in_part(*cell)]
    assert {name for name, _ in part} == set(LINES) and {job for _, job in part} == set(JOBS)
    assert len(part) < 0.4 * len(CELLS)


def test_every_line_of_the_tables_means_something():
    used = {reason.name for reason in expected().values()}
    assert used == set(reasons()), "a reason that no cell has, or the other way round"
    for name, job in (*expected(), *known_wrong()):
        assert name in LINES and job in JOBS, (name, job)
    assert not known_wrong() & set(expected()), "wrong and expected at once"


def test_the_page_of_the_docs_is_made_of_these_tables():
    here = Path(__file__).parents[2] / "docs"
    spec = importlib.util.spec_from_file_location("what_works", here / "what_works.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (here / "what-works.md").read_text("utf-8") == module.page(), "run: python docs/what_works.py"
