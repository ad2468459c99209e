"""`make cuda`: explains itself without a GPU, and prepares the sources correctly."""

import io
import tarfile
from pathlib import Path

import pytest
import torch

from grass_lib import cuda_setup
from grass_lib.errors import GrassError


def _archive(folder: Path, name: str, setup: str) -> None:
    data = setup.encode()
    with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo(f"{name}/setup.py")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_why_and_succeeds(caplog):
    with caplog.at_level("INFO"):
        assert cuda_setup.main([]) == 0
    assert "were not built" in caplog.text
    assert "CPU build" in caplog.text or "no GPU" in caplog.text


def test_fixed_architecture_is_replaced(tmp_path):
    setup = tmp_path / "setup.py"
    setup.write_text('import os\nos.environ["TORCH_CUDA_ARCH_LIST"] = "7.0+PTX"\n')
    assert cuda_setup.use_architecture(setup, "9.0")
    assert setup.read_text() == 'import os\nos.environ["TORCH_CUDA_ARCH_LIST"] = "9.0"\n'


def test_a_setup_without_the_line_is_left_alone(tmp_path):
    setup = tmp_path / "setup.py"
    setup.write_text("x = 1\n")
    assert not cuda_setup.use_architecture(setup, "9.0")
    assert setup.read_text() == "x = 1\n"


def test_sources_from_a_folder(tmp_path):
    sources, work = tmp_path / "sources", tmp_path / "work"
    sources.mkdir()
    work.mkdir()
    for package in cuda_setup.PACKAGES:
        _archive(sources, package.replace("==", "-"), "y = 2\n")
    folders = cuda_setup.fetch_sources(work, sources)
    assert [folder.name for folder in folders] == ["sjlt-0.1.7", "fast_jl-0.1.3"]
    assert all((folder / "setup.py").read_text() == "y = 2\n" for folder in folders)


def test_missing_source_is_named(tmp_path):
    with pytest.raises(GrassError, match=r"sjlt-0\.1\.7\.tar\.gz is not in"):
        cuda_setup.fetch_sources(tmp_path, tmp_path)


def test_pins_agree_with_the_requirement_files():
    root = Path(__file__).parents[1]
    cuda = [
        line for line in (root / "requirements-cuda.txt").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert cuda == list(cuda_setup.PACKAGES)
    main_file = (root / "requirements.txt").read_text()
    assert all(f'{package} ; extra == "cuda"' in main_file for package in cuda_setup.PACKAGES)
