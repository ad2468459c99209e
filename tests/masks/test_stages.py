"""Masks of several sizes in files: fitted in one pass, found again, never mixed up."""

import pytest
import torch
import zoo

from grass_lib.errors import UsageError
from grass_lib.gradients import causal_loss
from grass_lib.masks import fit_factored, stages
from grass_lib.masks.stages import fit_stages, stage_files
from grass_lib.specs import StageSpec

N = 40
SIZES = [StageSpec.parse(f"selective_mask-{k}*{k}") for k in (2, 3)]
GIVEN = {"model": "abc", "data": "def"}


@pytest.fixture
def model():
    return zoo.make_model("text")


@pytest.fixture
def loader():
    (ids,) = zoo.make_samples("text", N)
    return [{"input_ids": part, "labels": part} for part in ids.split(8)]


def loss(model, batch):
    return causal_loss(lambda **inputs: model(inputs["input_ids"]), batch)


def files_in(folder, **changes):
    chosen = {"method": "energy", "seed": 0, "provenance": GIVEN, **changes}
    return stage_files(folder, SIZES, **chosen)


def run(model, loader, files, **changes):
    options = {"method": "energy", "provenance": GIVEN, "progress": False, **changes}
    return fit_stages(model, loss, loader, files, **options)


def test_masks_are_those_of_one_size_alone(model, loader, tmp_path):
    found = run(model, loader, files_in(tmp_path))
    for stage, kept in found.items():
        alone = fit_factored(model, loss, loader, k=stage.dims, method="energy", progress=False)
        assert kept.masks.keys() == alone.keys()
        assert all(torch.equal(kept.masks[key].indices, alone[key].indices) for key in alone)
        assert kept.mean("held_out_correlation") == pytest.approx(kept.mean("energy_correlation"))
        assert kept.mean("overlap_energy") == 1.0


def test_a_pass_is_made_only_for_sizes_that_have_no_file(model, loader, tmp_path, monkeypatch):
    files = files_in(tmp_path)
    first = run(model, loader, {SIZES[0]: files[SIZES[0]]})
    both = run(model, loader, files)
    assert [both[stage].reused for stage in SIZES] == [True, False]
    assert both[SIZES[0]].masks["blocks.0.up/input"].provenance == first[SIZES[0]].masks["blocks.0.up/input"].provenance

    def fail(*args, **options):
        raise AssertionError("another pass")

    monkeypatch.setattr(stages, "collect", fail)
    assert all(found.reused for found in run(model, loader, files).values())


@pytest.mark.parametrize(
    "change", [{"method": "random"}, {"seed": 1}, {"recipe": "paper"}, {"provenance": {**GIVEN, "model": "other"}}]
)
def test_masks_of_another_origin_have_other_files_and_are_refused(model, loader, tmp_path, change):
    files = files_in(tmp_path)
    assert not set(files.values()) & set(files_in(tmp_path, **change).values())
    run(model, loader, files)
    with pytest.raises(UsageError, match="expected"):
        run(model, loader, files, **change)


def test_masks_of_thinner_factors_are_refused(model, loader, tmp_path):
    run(model, loader, files_in(tmp_path), rank=4)
    with pytest.raises(UsageError, match="another rank_limit: expected rank_limit 8"):
        run(model, loader, files_in(tmp_path), rank=8)


def test_flat_sizes_are_refused(model, loader, tmp_path):
    with pytest.raises(UsageError, match="k_out, k_in"):
        run(model, loader, {StageSpec.parse("selective_mask-4"): tmp_path / "a"})
