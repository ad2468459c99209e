import hashlib
import io
import sys
import types
from importlib import metadata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from grass_lib.errors import DataError, UsageError
from grass_lib.experiments.data import cifar2, elpv, tiles


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch):
    monkeypatch.delenv("GRASS_DATA", raising=False)


def rows_of(n, seed=0, side=32, labels=range(10)):
    """Images of all ten classes in random order."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    return images, generator.permutation(np.resize(np.array(labels), n))


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=kind)
    return buffer.getvalue()


def write_split(folder, split, images, labels, kind="PNG"):
    (folder / "cifar2").mkdir(exist_ok=True)
    rows = [{"bytes": encoded(image, kind), "path": None} for image in images]
    table = pa.table({"img": rows, "label": pa.array(labels, pa.int64())})
    pq.write_table(table, folder / "cifar2" / f"{split}-00000-of-00001.parquet")


TRAIN, TEST = rows_of(60, 0), rows_of(40, 1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRASS_DATA", str(tmp_path))
    monkeypatch.setitem(cifar2.SIZES, "paper", (9, 5))
    monkeypatch.setitem(cifar2.ROWS, "train", 6)
    monkeypatch.setitem(cifar2.ROWS, "test", 4)
    write_split(tmp_path, "train", *TRAIN)
    write_split(tmp_path, "test", *TEST)
    return tmp_path


def test_embedded_tiles_are_cut_from_two_photographs():
    photos = cifar2.load_cifar2("embedded")
    n_train, n_query = cifar2.SIZES["embedded"]
    assert photos.train_x.shape == (n_train, 3, 32, 32)
    assert photos.query_images.shape == (n_query, 32, 32, 3)
    assert (photos.rows, photos.kind, photos.classes) == (n_train + n_query, "embedded", ("palace", "flower"))
    assert photos.train_y.bincount().min() > 0.4 * n_train
    assert photos.query_y.bincount().min() > 0.3 * n_query
    assert "CC BY" in photos.credit
    assert "texture" in photos.source


def test_no_pixel_is_in_two_tiles_and_queries_come_from_the_right_quarter():
    train, train_y, query, query_y = tiles.load_tiles(390, 130)
    assert train_y.dtype == query_y.dtype == np.int64
    assert len({image.tobytes() for image in np.concatenate([train, query])}) > 500  # all but tiles of plain sky
    for label, (path, sha256) in enumerate(tiles._FILES):
        photograph = tiles._pixels(tiles.package_file("scikit-learn", path, sha256)).astype(int)
        for images, labels, columns in ((train, train_y, range(0, 480)), (query, query_y, range(480, 640))):
            image = images[labels == label][0].astype(int)
            found = [
                left
                for top in range(0, 427 - 31, 32)
                for left in range(0, 640 - 31, 32)
                if (photograph[top : top + 32, left : left + 32] == image).all()
            ]
            assert found
            assert all(left in columns and left + 31 in columns for left in found)
    with pytest.raises(DataError, match="130 query tiles; expected 131"):
        tiles.load_tiles(10, 131)


def test_networks_see_neither_colour_nor_brightness_of_a_tile():
    photos = cifar2.load_cifar2("embedded")
    assert (photos.train_images[..., 0] != photos.train_images[..., 2]).any()
    assert torch.equal(photos.train_x[:, 0], photos.train_x[:, 2])
    images = photos.train_images.numpy()
    darker = tiles.without_colour((images // 2).astype(np.uint8))
    contrasted = images.astype(float).mean(axis=3).std(axis=(1, 2)) > 20
    assert np.abs(darker.astype(int) - tiles.without_colour(images))[contrasted].mean() < 6
    flat = tiles.without_colour(np.full((1, 32, 32, 3), 77, np.uint8))
    assert (flat == 128).all()


def test_embedded_ignores_the_data_folder(monkeypatch):
    monkeypatch.setenv("GRASS_DATA", "/nowhere")
    assert cifar2.load_cifar2("embedded").kind == "embedded"
    assert cifar2.data_problems("embedded") == []


def test_missing_or_other_package(monkeypatch):
    monkeypatch.setattr(tiles, "_FILES", ((tiles._FILES[0][0], "0" * 64),))
    with pytest.raises(DataError, match=r"scikit-learn has SHA-256 8378.*expected 0000"):
        cifar2.load_cifar2("embedded")
    monkeypatch.setattr(tiles, "_PACKAGE", "no-such-package")
    assert "pip install no-such-package" in cifar2.data_problems("embedded")[0]


def test_paper_takes_the_first_cats_and_dogs_of_the_folder(folder):
    photos = cifar2.load_cifar2("paper")
    for images, y, (source, labels), count in (
        (photos.train_images, photos.train_y, TRAIN, 9),
        (photos.query_images, photos.query_y, TEST, 5),
    ):
        chosen = np.flatnonzero((labels == 3) | (labels == 5))[:count]
        assert np.array_equal(images, source[chosen])
        assert y.tolist() == [int(labels[place] == 5) for place in chosen]
    expected = photos.train_images.permute(0, 3, 1, 2).double() / 127.5 - 1
    torch.testing.assert_close(photos.train_x.double(), expected, atol=1e-6, rtol=0)
    assert (photos.rows, photos.kind, photos.source) == (14, "official", "GRASS_DATA/cifar2")
    assert photos.classes == ("cat", "dog")
    assert str(folder) not in repr((photos.source, photos.sha256))


def test_recompressed_images_are_called_so(folder):
    images, labels = TRAIN
    chosen = np.isin(labels, (3, 5))
    write_split(folder, "train", images[chosen], labels[chosen], "JPEG")
    photos = cifar2.load_cifar2("paper")
    assert photos.kind == "recompressed"
    assert "compressed once more as JPEG" in photos.source
    assert not np.array_equal(photos.train_images, images[chosen][:9])


def test_files_with_other_numbers_of_images_are_substitutes(folder):
    write_split(folder, "train", *rows_of(70, 0))
    assert cifar2.load_cifar2("paper").kind == "substitute"


def test_fingerprint_follows_the_files(folder):
    before = cifar2.data_fingerprint("paper")
    assert cifar2.data_fingerprint("paper") == before
    write_split(folder, "test", *rows_of(40, 2))
    assert cifar2.data_fingerprint("paper") != before
    assert cifar2.data_problems("paper") == []


def test_missing_folder_or_file(folder, monkeypatch):
    (folder / "cifar2" / "test-00000-of-00001.parquet").unlink()
    for read in (cifar2.load_cifar2, cifar2.data_fingerprint):
        with pytest.raises(DataError, match=r"no file cifar2/test-00000-of-00001\.parquet.*Put them there"):
            read("paper")
    monkeypatch.setenv("GRASS_DATA", str(folder / "none"))
    assert "not a folder" in cifar2.data_problems("paper")[0]


@pytest.mark.parametrize("content", [b"", b"not parquet", b"PAR1" + bytes(100) + b"PAR1"])
def test_corrupt_file(folder, content):
    (folder / "cifar2" / "train-00000-of-00001.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"cifar2/train-00000-of-00001\.parquet cannot be read.*Fetch it again"):
        cifar2.load_cifar2("paper")


@pytest.mark.parametrize(
    "columns",
    [
        {"image": [{"bytes": b"", "path": None}] * 20, "label": [3] * 20},
        {"img": [{"bytes": b"xx", "path": None}] * 20, "label": [3] * 20},
        {"img": [{"bytes": None, "path": None}] * 20, "label": [3] * 20},
        {"img": [{"bytes": b"xx", "path": None}] * 20, "fine_label": [3] * 20},
    ],
)
def test_other_columns_or_broken_images(folder, columns):
    pq.write_table(pa.table(columns), folder / "cifar2" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match="cannot be read"):
        cifar2.load_cifar2("paper")


def test_too_few_cats_and_dogs(folder):
    write_split(folder, "train", *rows_of(40, labels=range(6, 10)))
    with pytest.raises(DataError, match=r"split train, has 0 cats and dogs .*expected 9"):
        cifar2.load_cifar2("paper")


def test_images_of_another_size(folder):
    write_split(folder, "train", *rows_of(60, side=28))
    with pytest.raises(DataError, match="expected 32x32 in colour"):
        cifar2.load_cifar2("paper")


class FakeTable:
    """As much of a data set of the hub as is asked for."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __getitem__(self, name):
        assert name == "label"
        return self.labels.tolist()

    def select(self, places):
        return [{"img": Image.fromarray(self.images[place])} for place in places]


def fake_hub(monkeypatch, load):
    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setitem(cifar2.SIZES, "paper", (9, 5))


def test_hub_gives_the_same_as_the_folder(folder, monkeypatch):
    from_folder = cifar2.load_cifar2("paper")
    monkeypatch.delenv("GRASS_DATA")
    asked = []

    def load(name, split):
        asked.append((name, split))
        return FakeTable(*(TRAIN if split == "train" else TEST))

    fake_hub(monkeypatch, load)
    from_hub = cifar2.load_cifar2("paper")
    assert asked == [("uoft-cs/cifar10", "train"), ("uoft-cs/cifar10", "test")]
    assert from_hub.sha256 == from_folder.sha256
    assert (from_hub.kind, from_hub.source) == ("official", "uoft-cs/cifar10 on the hub")


def test_hub_that_cannot_be_reached(monkeypatch):
    def load(name, split):
        raise ConnectionError("no network")

    fake_hub(monkeypatch, load)
    with pytest.raises(DataError, match=r"ConnectionError: no network.*Set GRASS_DATA.*scale=embedded"):
        cifar2.load_cifar2("paper")
    assert cifar2.data_fingerprint("paper") == "hub:uoft-cs/cifar10"


def test_offline_without_a_folder_is_a_problem(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "GRASS_DATA is not set" in cifar2.data_problems("paper")[0]


def test_unknown_scale_or_data():
    for call in (cifar2.load_cifar2, cifar2.data_fingerprint, cifar2.data_problems):
        with pytest.raises(UsageError, match="scale is 'huge'; expected one of embedded, paper"):
            call("huge")
        with pytest.raises(UsageError, match="data is 'elpv'; expected one of '' at scale paper"):
            call("paper", "elpv")


def test_elpv_that_is_not_installed_says_how(monkeypatch):
    monkeypatch.setattr(elpv, "PACKAGE", "no-such-package")
    with pytest.raises(DataError, match=r"CC BY-NC-SA.*pip install no-such-package==1.0.0.post1.*leave data empty"):
        cifar2.load_cifar2("embedded", "elpv")
    assert len(cifar2.data_problems("embedded", "elpv")) == 1


def test_elpv_takes_the_cells_that_experts_agree_on(tmp_path, monkeypatch):
    folder = tmp_path / "elpv_dataset" / "data"
    (folder / "images").mkdir(parents=True)
    lines = []
    for number, probability in enumerate([0.0, 1.0, 0.3333333333333333, 0.0, 1.0, 0.6666666666666666, 0.0]):
        Image.new("L", (300, 300), 10 * number).save(folder / "images" / f"cell{number}.png")
        lines.append(f"images/cell{number}.png  {probability}  mono")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    sha256 = hashlib.sha256((folder / "labels.csv").read_bytes()).hexdigest()
    monkeypatch.setattr(elpv, "_LABELS_SHA256", sha256)
    monkeypatch.setattr(
        metadata, "distribution", lambda name: types.SimpleNamespace(locate_file=lambda p: tmp_path / p)
    )
    monkeypatch.setitem(cifar2.SIZES, "embedded", (3, 2))
    photos = cifar2.load_cifar2("embedded", "elpv")
    levels = torch.cat([photos.train_images, photos.query_images])[:, 5, 5, 0].tolist()
    assert sorted(levels) == [0, 10, 30, 40, 60]
    labels = torch.cat([photos.train_y, photos.query_y]).tolist()
    assert [int(level in (10, 40)) for level in levels] == labels
    assert "NC-SA" in photos.credit
    monkeypatch.setitem(cifar2.SIZES, "embedded", (4, 2))
    with pytest.raises(DataError, match="5 cells with a sure label; expected 6"):
        cifar2.load_cifar2("embedded", "elpv")
