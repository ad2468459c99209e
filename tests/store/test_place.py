from pathlib import Path

import pytest
import torch

from grass_lib.errors import UsageError
from grass_lib.store import GradientStore
from grass_lib.store.place import store_folder


def create(path):
    return GradientStore.create(path, layers={"a": 2}, n_samples=1, fingerprint={})


def test_folders_that_are_there_or_may_be_made_pass(tmp_path):
    for path in (tmp_path, str(tmp_path / "new" / "one"), Path()):
        assert store_folder(path) == Path(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "message"), [("", "is ''"), ("  ", "is '  '"), (None, "is a NoneType"), (3, "is a int")]
)
def test_what_names_no_folder_is_refused(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=rf"store {message}.*expected the path of a folder"):
        store_folder(path)
    with pytest.raises(UsageError, match=rf"path {message}.*expected the path of a folder"):
        create(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", ["", "deep/er"])
def test_files_are_refused_and_kept(inside, tmp_path):
    file = tmp_path / "weights.pt"
    file.write_bytes(b"mine")
    for call in (store_folder, create):
        with pytest.raises(UsageError, match=r"weights\.pt.* a file; expected the path of a folder"):
            call(file / inside)
    assert file.read_bytes() == b"mine"


def test_a_store_that_is_there_passes(tmp_path):
    store = create(tmp_path / "store")
    store.write(0, {"a": torch.ones(1, 2)})
    assert create(store_folder(store.path)).missing() == []


def test_names_that_are_too_long_are_left_to_the_system(tmp_path):
    assert store_folder(tmp_path / ("a" * 300)).name == "a" * 300
