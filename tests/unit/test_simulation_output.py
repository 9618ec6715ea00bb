"""What the simulation prints and writes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.simulation import plots
from tests.simulation.__main__ import main
from tests.simulation.parameters import Parameters
from tests.simulation.runs import Job, collect, plan
from tests.simulation.tables import loss_table, table, variants_table
from tests.simulation.world import simulate


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    parameters = Parameters(executors=10, warm_up_s=10.0, window_s=20.0, tail_s=0.0, observers=2, newcomer_every_s=5.0)
    figures = simulate(parameters)
    groups = [("sizes", "traffic"), ("sizes", "deaths"), ("loss", "10"), ("variants", "as it is")]
    return collect([(Job(group, name, parameters), figures) for group, name in groups])


def test_the_tables_have_a_row_for_each_figure(results: dict[str, Any]) -> None:
    lines = table(results).splitlines()
    assert lines[:2] == ["| executors | 10 |", "|---|---|"]
    assert all(line.count("|") == 3 for line in lines)
    assert loss_table(results).splitlines()[-1].startswith("| 10 | 0 |")
    assert variants_table(results).splitlines()[-1].startswith("| as it is | 10 |")


def test_results_survive_json_and_can_be_drawn_from(
    results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(plots, "importlib", type("Nothing", (), {"import_module": staticmethod(missing)}))
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(results))
    assert main(["--from-json", str(saved), "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr()
    assert table(results) in output.out
    assert "pip install matplotlib" in output.err
    assert json.loads((tmp_path / "out" / "simulation.json").read_text()) == json.loads(json.dumps(results))


def test_the_project_does_not_need_matplotlib() -> None:
    assert importlib.import_module("tests.simulation.plots").HOW_TO_GET_MATPLOTLIB


def test_every_asked_for_run_is_planned() -> None:
    jobs = plan([10, 40, 1000], seed=7, window_s=60.0, scenarios=frozenset({"loss", "variants"}))
    assert {(job.parameters.executors, job.name) for job in jobs if job.group == "sizes"} == {
        (size, name) for size in (10, 40, 1000) for name in ("traffic", "deaths")
    }
    assert sorted({job.parameters.executors for job in jobs if job.group == "loss"}) == [40, 1000]
    assert all(job.parameters.seed == 7 for job in jobs)
    assert [job.group for job in plan([10], 1, 60.0, frozenset())] == ["sizes", "sizes"]
