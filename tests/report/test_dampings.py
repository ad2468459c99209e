"""The table of absolute against relative damping."""

from pathlib import Path

from grass_lib.report.dampings import damping_table
from grass_lib.report.published import published_rows
from grass_lib.report.schema import load_record

MEASURED = Path(__file__).parents[2] / "book" / "measured"


def _records(*names: str):
    return [load_record(MEASURED / name / "record.json") for name in names]


def test_without_a_run_it_names_the_command():
    assert "grass run mlp_mnist --scale paper -p convention=paper" in damping_table([])
    assert "Not run yet" in damping_table(_records("mlp_mnist-paper"))


def test_both_conventions_stand_beside_the_published_values():
    records = _records("mlp_mnist-paper", "mlp_mnist-paper-absolute")
    text = damping_table(records)
    by_spec = {(row["spec"], row["damping_convention"]): row for record in records for row in record.results}
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if "`" in line
    }
    measured = {spec for spec, _ in by_spec}
    published = [
        row for row in published_rows("mlp_mnist") if row["projection"] in measured and "fjlt" not in row["projection"]
    ]
    assert len(lines) == len(published) == 9
    same = 0
    for row in published:
        absolute, relative = by_spec[row["projection"], "paper"], by_spec[row["projection"], "relative"]
        expected = [
            f"{row['damping']:g}", f"{absolute['damping']:g}", f"{row['lds']:.4f}",
            f"{absolute['lds']['mean']:.4f}", f"{relative['lds']['mean']:.4f}",
        ]  # fmt: skip
        assert lines[f"`{row['projection']}`"] == expected
        same += row["damping"] == absolute["damping"]
    assert f"{same} of 9 rows" in text
