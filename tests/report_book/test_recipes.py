"""The two recipes of ResNet-9 + CIFAR-2 side by side, from records only; lines of one method by mask."""

from pathlib import Path

import numpy as np
import pytest
from book_fixtures import toy_record

from grass_lib.experiments.resnet9_protocol import RECIPES
from grass_lib.report.figures import lds_figure, time_figure
from grass_lib.report.interactive import lds_figure_html
from grass_lib.report.ledger import ledger_rows
from grass_lib.report.lines import lines
from grass_lib.report.recipes import (
    accuracy_figure,
    accuracy_note,
    accuracy_text,
    ceiling_text,
    recipe_note,
    recipe_section,
    recipe_text,
)
from grass_lib.report.record import RunRecord

LABELS = np.array([0, 1, 1, 0, 1])
ACCURACY = np.array([[0.6, 0.8], [0.4, 0.6], [0.8, np.nan]])


def row(sparsification: str, projection: str, mean: float) -> dict:
    lds = {"mean": mean, "interval": [mean - 0.1, mean + 0.1], "n_models": 3, "n_queries": 5, "n_undefined": 0}
    return {
        "attributor": "trak",
        "sparsification": sparsification,
        "projection": projection,
        "spec": projection if sparsification == "identity" else f"{sparsification}->{projection}",
        "k": int(projection.rpartition("-")[2]),
        "lds": lds,
        "noise_ceiling": {"mean": 0.6, "interval": [0.5, 0.7]},
        "damping": 0.1,
        "damping_convention": "relative",
        "projection_seconds": 0.5,
        "backend": "torch",
        "operator": projection.split("-")[0],
    }


def record(recipe: str, lds: float, shift: float = 0.0) -> RunRecord:
    return toy_record(
        f"resnet9-{recipe}",
        "paper",
        experiment="resnet9_cifar2",
        parameters={"recipe": recipe, "masks": "", "n_lds_models": 0, "n_trak_models": 0},
        results=[row("identity", "sjlt-2048", lds), row("random_mask-32768", "sjlt-2048", lds - 0.02)],
        data={"source": "here", "rows": 5500, "sha256": "0" * 64, "kind": "recompressed"},
        extra={"recipe": recipe_note(RECIPES["paper"][recipe]), "accuracy": accuracy_note(ACCURACY + shift, LABELS)},
    )


def test_accuracies_of_both_seeds_and_of_guessing() -> None:
    note = accuracy_note(ACCURACY, LABELS)
    assert note["first"] == [0.6, 0.4, 0.8]
    assert note["second"] == [0.8, 0.6]
    assert note["mean"] == pytest.approx(0.64)
    assert (note["lowest"], note["highest"], note["guessing"]) == (0.4, 0.8, 0.6)
    assert accuracy_text(note) == (
        "right on 64.0% of the queries on average, from 40.0% to 80.0% between networks; the larger class has 60.0%"
    )
    (axes,) = accuracy_figure(note).axes
    drawn = [sorted(float(x) for x in line.get_xdata()) for line in axes.lines[:2]]
    assert drawn == [[0.4, 0.6, 0.8], [0.6, 0.8]]
    one = accuracy_note(ACCURACY[:, :1], LABELS)
    assert one["second"] == []
    assert [tick.get_text() for tick in accuracy_figure(one).axes[0].get_yticklabels()] == ["first seeds"]


def test_recipes_in_words() -> None:
    assert recipe_text(RECIPES["paper"]["paper"]) == "10 epochs, batches of 64, constant rate 0.01"
    assert recipe_text(recipe_note(RECIPES["paper"]["one_cycle"])) == (
        "24 epochs, batches of 64, rate up to 0.05 and down again"
    )


def test_ceiling_in_words() -> None:
    rows = [row("identity", "sjlt-64", 0.2), row("identity", "fjlt-64", 0.3)]
    assert ceiling_text(rows) == ("highest LDS 0.300 (0.200 to 0.400), fjlt-64; noise ceiling 0.600 (0.500 to 0.700)")
    assert "no noise ceiling" in ceiling_text([{**rows[0], "noise_ceiling": None}])


def test_without_a_run_there_is_the_command_and_no_number() -> None:
    text = recipe_section([])
    assert "grass run resnet9_cifar2 --scale paper -p recipe=paper" in text
    assert "grass run resnet9_cifar2 --scale paper -p recipe=one_cycle" in text
    assert "0." not in text
    embedded = toy_record("small", experiment="resnet9_cifar2", extra={"accuracy": accuracy_note(ACCURACY, LABELS)})
    assert recipe_section([embedded]) == text


def test_one_recipe_is_shown_and_the_other_asked_for() -> None:
    text = recipe_section([record("paper", 0.14)])
    assert "| as documented | 10 epochs, batches of 64, constant rate 0.01 | 3 + 2 | 0.640 | 0.400 to 0.800 |" in text
    assert "0.140 (0.040 to 0.240), SJLT |" in text
    assert "Measured in `resnet9-paper` (as documented)." in text
    assert "-p recipe=one_cycle" in text
    assert "once both have been run" in text


def test_both_recipes_are_compared_in_words() -> None:
    text = recipe_section([record("one_cycle", 0.4, 0.1), record("paper", 0.14), record("paper", 0.9)])
    assert "right on 64.0% of the queries" in text
    assert "they are right on 74.0%, 40.0 points apart" in text
    assert "The best LDS goes from 0.140 to 0.400" in text
    assert "matters more than how gradients are compressed" in text
    assert "not run" not in text
    same = recipe_section([record("one_cycle", 0.15), record("paper", 0.14)])
    assert "matters more" not in same


def test_the_ledger_names_the_recipe() -> None:
    rows = [one for one in ledger_rows([record("one_cycle", 0.4)]) if one["run_id"] == "resnet9-one_cycle"]
    assert {one["data"] for one in rows} == {"recompressed"}
    assert all("recipe=one_cycle" in one["reason"] for one in rows)


MASKED = [
    row("random_mask-32768", "normal-64", 0.2),
    row("random_mask-4096", "normal-64", 0.1),
    row("selective_mask-4096", "normal-64", 0.3),
]


def test_one_line_for_each_mask() -> None:
    assert [(label, [one["lds"]["mean"] for one in rows]) for label, rows in lines(MASKED[:2])] == [
        ("random mask + normal, 4,096 kept", [0.1]),
        ("random mask + normal, 32,768 kept", [0.2]),
    ]
    assert [label for label, _ in lines([row("identity", "sjlt-64", 0.1)])] == ["SJLT"]


def test_figures_have_a_line_and_a_legend_entry_for_each_mask(tmp_path: Path) -> None:
    rows = [row("identity", "sjlt-64", 0.1), *MASKED]
    labels = ["SJLT", *(label for label, _ in lines(MASKED[:2])), "selective mask + normal"]
    for figure in (lds_figure(rows), time_figure(rows)):
        legend = figure.axes[0].get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == labels
        drawn = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
        small, large = (drawn[label].lines[0] for label in labels[1:3])
        assert small.get_linestyle() != large.get_linestyle()
        assert small.get_markersize() < large.get_markersize()
    fragment = lds_figure_html(rows)
    assert all(label in fragment for label in labels)
    figure.savefig(tmp_path / "figure.png")


def test_an_lds_above_its_ceiling_is_explained() -> None:
    assert "noise ceiling is no contradiction" not in recipe_section([record("paper", 0.14), record("one_cycle", 0.4)])
    assert "noise ceiling is no contradiction" in recipe_section([record("paper", 0.7), record("one_cycle", 0.4)])
