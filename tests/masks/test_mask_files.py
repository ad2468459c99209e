"""Masks of all layers in one file: what comes back, and what is refused."""

import pytest
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import save_file

from grass_lib.errors import UsageError
from grass_lib.gradients import FactoredGradients, cross_entropy, find_layers
from grass_lib.masks import fit_factored, load_masks, save_masks
from grass_lib.projection import Mask

ORIGIN = {"model": "abc", "data": "def"}


@pytest.fixture
def made(tmp_path):
    model = zoo.make_model("mlp")
    loader = zoo.make_loader(zoo.make_samples("mlp", 24))
    masks = fit_factored(
        model, cross_entropy, loader, k=(2, 3), method="energy", seed=4, provenance=ORIGIN, progress=False
    )
    save_masks(tmp_path / "masks.safetensors", masks)
    return model, masks, tmp_path / "masks.safetensors"


def test_what_was_saved_comes_back(made):
    model, masks, file = made
    expect = {**ORIGIN, "seed": "4", "spec": "selective_mask-2*3", "method": "energy"}
    loaded = load_masks(file, expect=expect, layers=find_layers(model, "linear"))
    assert list(loaded) == list(masks) == ["hidden/output", "hidden/input", "head/output", "head/input"]
    for name, mask in masks.items():
        assert torch.equal(loaded[name].indices, mask.indices)
        assert torch.equal(loaded[name].scores, mask.scores)
        assert (loaded[name].p, loaded[name].provenance) == (mask.p, mask.provenance)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    FactoredGradients(model, cross_entropy, sparsification="selective_mask-2*3", masks=loaded)


def test_a_random_mask_has_no_scores(tmp_path):
    save_masks(tmp_path / "m.safetensors", {"a/output": Mask(torch.tensor([1, 3]), 5)})
    assert load_masks(tmp_path / "m.safetensors")["a/output"].scores is None


def test_masks_of_another_model_are_refused_with_both_fingerprints(made):
    _, _, file = made
    with pytest.raises(UsageError, match=r"another model: expected model xyz.*has abc"):
        load_masks(file, expect={"model": "xyz"})
    with pytest.raises(UsageError, match=r"expected checkpoint 3.*no such entry"):
        load_masks(file, expect={"checkpoint": "3"})


def test_other_layers_and_sizes_are_refused(made):
    model, _, file = made
    with pytest.raises(UsageError, match=r"lacks mix/input, mix/output; it has hidden/input, hidden/output"):
        load_masks(file, layers=find_layers(zoo.make_model("tied"), ["mix", "head"]))
    wider = torch.nn.ModuleDict({"hidden": torch.nn.Linear(7, 5), "head": torch.nn.Linear(5, 3)})
    with pytest.raises(UsageError, match=r"expected 8 coordinates for 'hidden/input'.*made for 7"):
        load_masks(file, layers=find_layers(wider, "linear"))
    with pytest.raises(UsageError, match="lacks none; it has head/input, head/output"):
        load_masks(file, layers=find_layers(model, ["hidden"]))


def test_damage_is_named(made, tmp_path):
    _, masks, file = made
    with safe_open(file, framework="pt") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    others = (set(range(3)) - set(masks["head/output"].indices.tolist())) | {int(masks["head/output"].indices[0])}
    tensors["head/output/indices"] = torch.tensor(sorted(others))
    save_file(tensors, tmp_path / "edited.safetensors", metadata)
    with pytest.raises(UsageError, match=r"edited.*'head/output'"):
        load_masks(tmp_path / "edited.safetensors")
    del tensors["hidden/input/indices"]
    save_file(tensors, tmp_path / "short.safetensors", metadata)
    with pytest.raises(UsageError, match="short"):
        load_masks(tmp_path / "short.safetensors")
    (tmp_path / "text.safetensors").write_text("no mask")
    with pytest.raises(UsageError, match="not a readable"):
        load_masks(tmp_path / "text.safetensors")
    masks["head/output"].save(tmp_path / "single.safetensors")
    with pytest.raises(UsageError, match="a single mask"):
        load_masks(tmp_path / "single.safetensors")
    with pytest.raises(UsageError, match="does not exist"):
        load_masks(tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match="does not exist"):
        save_masks(tmp_path / "no" / "m.safetensors", masks)
    with pytest.raises(UsageError, match="no masks"):
        save_masks(tmp_path / "m.safetensors", {})
