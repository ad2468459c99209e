import pytest

from grass_lib.cluster.settings import load_settings
from grass_lib.errors import UsageError

EXPERIMENTS = ("mlp_mnist", "gpt2_wikitext")


@pytest.fixture(autouse=True)
def no_file_elsewhere(monkeypatch):
    monkeypatch.delenv("GRASS_SLURM", raising=False)


def load(folder, text="", *typed):
    if text:
        (folder / "slurm.toml").write_text(text)
    return load_settings(folder, typed, EXPERIMENTS)


def test_the_more_particular_table_wins_and_the_command_line_over_all(tmp_path):
    text = """
partition = "gpu"
setup = ["module load cuda"]
sbatch = {exclude = "node1", exclusive = true}
[paper]
time = "8:00:00"
[mlp_mnist]
time = "0:20:30"
gpus = 0
[mlp_mnist.paper]
cpus = 3
setup = ["export A=1"]
sbatch = {exclude = "node2"}
"""
    settings = load(tmp_path, text, "memory=9G", "setup=export B=2", "sbatch.mail-type=END")
    small = settings.resources("mlp_mnist", "paper")
    assert (small.partition, small.minutes, small.gpus, small.cpus, small.memory) == ("gpu", 21, "0", 3, "9G")
    assert small.setup == ("module load cuda", "export A=1", "export B=2")
    assert dict(small.sbatch) == {"exclude": "node2", "exclusive": "", "mail-type": "END"}
    large = settings.resources("gpt2_wikitext", "paper")
    assert (large.minutes, large.gpus, large.cpus) == (480, "1", 8)
    assert settings.resources("mlp_mnist", "embedded").cpus == 2
    assert "partition=gpu, time=0:21:00, gpus=0" in small.shown()
    assert hash(small) != hash(large), "what groups jobs into arrays"


def test_defaults_need_no_file_and_the_file_may_be_elsewhere(tmp_path, monkeypatch):
    assert load(tmp_path).resources("mlp_mnist", "embedded").gpus == "0"
    assert load(tmp_path).resources("mlp_mnist", "paper").gpus == "1"
    (tmp_path / "mine.toml").write_text("qos = 'long'")
    monkeypatch.setenv("GRASS_SLURM", str(tmp_path / "mine.toml"))
    assert load(tmp_path, "qos = 'short'").resources("mlp_mnist", "paper").qos == "long"
    monkeypatch.setenv("GRASS_SLURM", str(tmp_path / "none.toml"))
    with pytest.raises(UsageError, match=r"GRASS_SLURM is .*not a file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("given", "seen"),
    [("90", 90), ("0:00:01", 1), ("1-02:00:00", 1560), ("00:30:00", 30)],
)
def test_times(tmp_path, given, seen):
    assert load(tmp_path, "", f"time={given}").resources("mlp_mnist", "paper").minutes == seen


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("partition", "expected NAME=VALUE such as --slurm partition=gpu"),
        ("partitoin=gpu", "no setting 'partitoin'.*did you mean 'partition'"),
        ("partition=a b", "partition is 'a b', expected a word"),
        ("time=4:00", "time is '4:00', expected hours:minutes:seconds"),
        ("time=0", "expected at least a minute"),
        ("gpus=two", "expected a number, with a type where wanted"),
        ("gpus=-1", "gpus is '-1'"),
        ("cpus=0", "expected a whole number >= 1"),
        ("cpus=1.5", "expected a whole number >= 1"),
        ("memory=64", "expected a number with M, G or T"),
        ("parallel=0", "expected a whole number >= 1"),
        ("setup=#SBATCH -p x", "options of sbatch are no lines of shell"),
        ("setup=", "expected lines of shell"),
        ("sbatch.array=1-3", "set by `grass` itself"),
        ("sbatch.mem=3G", "a setting of its own; give 'memory'"),
        ("sbatch.no-requeue=", "always queued again"),
        ("sbatch.x y=1", "expected a long option of sbatch"),
        ("sbatch=1", "expected a table"),
    ],
)
def test_wrong_settings_are_named(tmp_path, typed, message):
    with pytest.raises(UsageError, match=message):
        load(tmp_path, "", typed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partition = ", "cannot be read as TOML"),
        ("cpus = true", "slurm.toml, cpus is True"),
        ("[mlp_minst]\ncpus = 1", "expected one of embedded, paper, mlp_mnist, gpt2_wikitext"),
        ("[paper.mlp_mnist]\ncpus = 1", "no table inside this one"),
        ("[mlp_mnist.large]\ncpus = 1", "expected one of embedded, paper"),
        ("[mlp_mnist]\ncpu = 1", r"table \[mlp_mnist\], cpu: .*did you mean 'cpus'"),
        ('setup = "one\\ntwo"', "each a text of its own"),
        ("setup = [1]", "each a text of its own"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        load(tmp_path, text)


def test_twice_is_once_too_often(tmp_path):
    with pytest.raises(UsageError, match="given twice"):
        load(tmp_path, "", "cpus=1", "cpus=2")
