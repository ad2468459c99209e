"""Mask files: the round trip, every check and damaged files."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from grass_lib.errors import GrassError, UsageError
from grass_lib.masks.files import save_masks
from grass_lib.projection import Mask, build_projector


def example(**changes) -> Mask:
    fields = {"indices": torch.tensor([1, 4, 9]), "p": 12, "scores": torch.tensor([0.5, 2.0, 1.0])}
    return Mask(**{**fields, "provenance": {"method": "energy", "seed": "3"}, **changes})


def test_round_trip(tmp_path):
    mask, path = example(), tmp_path / "mask.safetensors"
    mask.save(path)
    loaded = Mask.load(str(path))
    assert torch.equal(loaded.indices, mask.indices)
    assert torch.equal(loaded.scores, mask.scores)
    assert (loaded.p, loaded.k, loaded.provenance) == (12, 3, {"method": "energy", "seed": "3"})
    assert loaded.fingerprint == mask.fingerprint
    assert [file.name for file in tmp_path.iterdir()] == ["mask.safetensors"]
    x = torch.randn(2, 12)
    assert torch.equal(build_projector("selective_mask-3", 12, mask=path)(x), x[:, [1, 4, 9]])


SAVES = {"one": lambda path: example().save(path), "several": lambda path: save_masks(path, {"a/output": example()})}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"m\.safetensors \(\d+ bytes\) could not be written: the disk .* is full; free some space"),
        (errno.EROFS, r"m\.safetensors .* could not be written: Read-only file system; make the folder writable"),
    ],
)
@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_a_refusal_of_the_file_system_is_explained_and_leaves_nothing(save, code, message, tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(code, os.strerror(code))

    path = tmp_path / "m.safetensors"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(GrassError, match=message):
        save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
    assert path.read_bytes() == b"before"


def test_without_scores(tmp_path):
    example(scores=None).save(tmp_path / "m")
    assert Mask.load(tmp_path / "m").scores is None


def test_fingerprint_is_of_the_kept_coordinates():
    assert example().fingerprint == example(scores=None, provenance={}).fingerprint
    assert len(example().fingerprint) == 64
    assert example().fingerprint != example(p=13).fingerprint
    assert example().fingerprint != example(indices=torch.tensor([1, 4, 8])).fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": torch.tensor([1, 9, 4])}, "9 is followed by 4 at position 1"),
        ({"indices": torch.tensor([1, 4, 4])}, "4 is followed by 4"),
        ({"indices": torch.tensor([-1, 4, 9])}, "run from -1 to 9; expected 0 to 11"),
        ({"indices": torch.tensor([1, 4, 12])}, "run from 1 to 12; expected 0 to 11"),
        ({"indices": torch.tensor([1.0, 4.0, 9.0])}, "expected an int64 tensor"),
        ({"indices": torch.tensor([[1, 4, 9]])}, "expected an int64 tensor of shape (k,)"),
        ({"indices": [1, 4, 9]}, "mask indices are list"),
        ({"indices": torch.tensor([], dtype=torch.int64), "scores": None}, "keeps no coordinate"),
        ({"p": 0}, "mask p is 0"),
        ({"scores": torch.tensor([1.0])}, "expected floats (3,)"),
        ({"scores": torch.tensor([1, 2, 3])}, "expected floats (3,)"),
        ({"provenance": {"seed": 3}}, "expected strings"),
    ],
)
def test_fields_are_checked(changes, message):
    with pytest.raises(UsageError) as caught:
        example(**changes)
    assert message in str(caught.value)


def test_wrong_size_for_the_spec_or_the_model():
    with pytest.raises(UsageError, match="keeps 3 coordinates, and the spec needs 4"):
        build_projector("selective_mask-4", 12, mask=example())
    with pytest.raises(UsageError, match="keeps 3 coordinates, and the spec needs 4"):
        build_projector("selective_grass_2-2", 12, mask=example())
    with pytest.raises(UsageError, match=r"made for p=12 coordinates, and the input has p=13"):
        build_projector("selective_mask-3", 13, mask=example())


def test_expected_provenance():
    example().check(3, 12, {"method": "energy"})
    with pytest.raises(UsageError, match="has method='energy', and 'learned' was expected"):
        example().check(3, 12, {"method": "learned"})
    with pytest.raises(UsageError, match="has model=None, and 'a' was expected"):
        example().check(3, 12, {"model": "a"})


def test_edited_file_is_refused_with_both_fingerprints(tmp_path):
    mask, path = example(), tmp_path / "mask.safetensors"
    mask.save(path)
    metadata = {"p": "12", "fingerprint": mask.fingerprint, "provenance": "{}"}
    other = example(indices=torch.tensor([1, 4, 10]))
    save_file({"indices": other.indices}, path, metadata)
    with pytest.raises(UsageError) as caught:
        Mask.load(path)
    assert mask.fingerprint in str(caught.value)
    assert other.fingerprint in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "it lacks p, fingerprint, provenance"),
        ({"p": "12", "fingerprint": "0"}, "it lacks provenance"),
        ({"p": "twelve", "fingerprint": "0", "provenance": "{}"}, "unreadable metadata"),
        ({"p": "12", "fingerprint": "0", "provenance": "{"}, "unreadable metadata"),
        ({"p": "12", "fingerprint": "0", "provenance": "[]"}, "expected an object"),
    ],
)
def test_other_safetensors_files(tmp_path, metadata, message):
    path = tmp_path / "other.safetensors"
    save_file({"indices": torch.tensor([1])}, path, metadata)
    with pytest.raises(UsageError, match=message):
        Mask.load(path)


def test_damaged_and_missing_files(tmp_path):
    path = tmp_path / "mask.safetensors"
    with pytest.raises(UsageError, match="does not exist"):
        Mask.load(path)
    example().save(path)
    assert set(load_file(path)) == {"indices", "scores"}
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UsageError, match="not a readable safetensors file"):
        Mask.load(path)
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="not a readable safetensors file"):
        Mask.load(path)
    with pytest.raises(UsageError, match="does not exist; make it first"):
        example().save(tmp_path / "no" / "mask.safetensors")
