"""Windows of pieces, MAESTRO from an archive that the tests write, chorales from the package."""

import hashlib
import io
import os
import zipfile
from collections import Counter

import mido
import numpy as np
import pytest
import torch

from grass_lib.errors import DataError, UsageError
from grass_lib.experiments.data import chorales, maestro, maestro_archive
from grass_lib.experiments.data.events import END, PAD, PITCH, as_notes, decode
from grass_lib.experiments.data.piece_cache import read_pieces, write_pieces
from grass_lib.experiments.data.windows import Piece, cut, event_windows, first_windows, round_robin

HEAD = "canonical_composer,canonical_title,split,year,midi_filename,audio_filename,duration\n"


def piece(name, n, split="train"):
    return Piece(name, name.upper(), split, np.arange(n) % 388)


def test_windows_follow_each_other_and_name_the_event_after_them():
    whole = piece("a", 23)
    windows = cut(whole, 5)
    assert [window.number for window in windows] == [0, 1, 2, 3, 4]
    joined = torch.cat([window.ids for window in windows])
    assert joined[:23].tolist() == whole.events.tolist()
    assert set(joined[23:].tolist()) == {PAD}
    assert [window.label for window in windows] == [5, 10, 15, 20, END]
    assert [window.label for window in cut(piece("b", 10), 5)] == [5, END]
    assert cut(piece("c", 0), 5) == []
    # Always the same: no window begins at random.
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(cut(whole, 5), windows, strict=True))
    with pytest.raises(UsageError, match="1 or more"):
        cut(whole, 0)


def test_first_windows_ask_for_no_more_pieces_than_they_need():
    asked = []

    def pieces():
        for name in "abcd":
            asked.append(name)
            yield piece(name, 12)

    found = first_windows(pieces(), 5, 5)
    assert [(window.piece, window.number) for window in found] == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    assert asked == ["a", "b"]
    with pytest.raises(DataError, match="expected 99"):
        first_windows(pieces(), 5, 99)


def test_round_robin():
    pieces = [piece("a", 5), piece("b", 23), piece("c", 9)]
    found = [(window.piece, window.number) for window in round_robin(pieces, 5, 7)]
    assert found == [("a", 0), ("b", 0), ("c", 0), ("b", 1), ("c", 1), ("b", 2), ("b", 3)]
    with pytest.raises(DataError, match="give 8 windows of 5 events; expected 9"):
        round_robin(pieces, 5, 9)


def test_hash_of_windows_sees_events_and_labels():
    words = {"source": "s", "licence": "l", "kind": "embedded", "rows": 1}
    first = cut(piece("a", 11), 5)
    hashes = {event_windows(first, first[:1], **words).sha256}
    hashes.add(event_windows(first[:2], first[:1], **words).sha256)
    hashes.add(event_windows(cut(piece("a", 12), 5), first[:1], **words).sha256)
    relabelled = [type(first[0])(first[0].ids, 7, "a", "A", 0), *first[1:]]
    hashes.add(event_windows(relabelled, first[:1], **words).sha256)
    assert len(hashes) == 4


def test_cache_gives_back_what_was_written_or_nothing(tmp_path):
    path, pieces = tmp_path / "deep" / "pieces.parquet", [piece("a", 11), piece("b", 300, "test")]
    assert read_pieces(path, "one") is None
    write_pieces(path, "one", pieces)
    for old, new in zip(pieces, read_pieces(path, "one"), strict=True):
        assert (old.name, old.title, old.split) == (new.name, new.title, new.split)
        assert np.array_equal(old.events, new.events)
    assert read_pieces(path, "two") is None
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    assert read_pieces(path, "one") is None
    path.write_bytes(b"no parquet")
    assert read_pieces(path, "one") is None


def song(seed, n):
    generator = np.random.default_rng(seed)
    track = mido.MidiTrack()
    for _ in range(n):
        note = int(generator.integers(40, 90))
        track.append(mido.Message("note_on", note=note, velocity=int(generator.integers(1, 128)), time=20))
        track.append(mido.Message("note_off", note=note, velocity=0, time=int(generator.integers(1, 99))))
    file, buffer = mido.MidiFile(), io.BytesIO()
    file.tracks.append(track)
    file.save(file=buffer)
    return buffer.getvalue()


ROWS = [
    *(("Bach", f"Fugue_{i}", "train", f"2004/t{i}.midi", 20 + i) for i in (3, 1, 2, 4)),
    *(("Liszt", f"Study_{i}", "test", f"2006/q{i}.midi", 15 * (i + 1)) for i in (2, 1)),
    ("Haydn", "Sonata", "validation", "2006/v.p0.midi", 10),
]


def write_archive(folder, rows=ROWS):
    (folder / "maestro").mkdir(exist_ok=True)
    path = folder / "maestro" / maestro_archive.ARCHIVE
    with zipfile.ZipFile(path, "w") as file:
        lines = [f"{who},{what},{split},2004,{name},,1.0\n" for who, what, split, name, _ in rows]
        file.writestr("maestro-v2.0.0/maestro-v2.0.0.csv", HEAD + "".join(lines))
        for *_, name, n in rows:
            file.writestr(f"maestro-v2.0.0/{name}", song(n, n))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRASS_DATA", str(tmp_path))
    monkeypatch.setenv("GRASS_RUNS", str(tmp_path / "runs"))
    for name, value in (("LENGTH", 16), ("N_TRAIN", 14), ("N_QUERY", 7)):
        monkeypatch.setattr(maestro, name, value)
    write_archive(tmp_path)
    return tmp_path


def test_maestro_windows_are_in_the_order_of_the_paths(folder):
    data = maestro.load_maestro(progress=False)
    assert data.train_ids.shape == (14, 16)
    assert [window.piece for window in data.train] == sorted(window.piece for window in data.train)
    assert data.train[0].title == "Bach: Fugue 1"
    places = [(window.piece, window.number) for window in data.queries]
    assert places[:4] == [("2006/q1.midi", 0), ("2006/q2.midi", 0), ("2006/q1.midi", 1), ("2006/q2.midi", 1)]
    assert (data.kind, data.rows) == ("subset", 7)
    assert "a subset of MAESTRO v2.0.0, 7 files (4 train, 1 validation, 2 test); 1 of them" in data.source
    assert "CC BY-NC-SA" in data.licence
    both = {(window.piece, window.number): window for window in data.train + data.queries}
    found = maestro.find_windows([*list(both)[::3], ("2004/none.midi", 0), ("2006/q1.midi", 999)])
    assert list(found) == list(both)[::3]
    assert all(torch.equal(found[place].ids, both[place].ids) for place in found)


def test_maestro_is_read_from_its_cache(folder, monkeypatch):
    first = maestro.load_maestro(progress=False)

    def fail(*args):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(maestro, "read_midi", fail)
        assert maestro.load_maestro(progress=False).sha256 == first.sha256
    # Another archive, another file of events.
    write_archive(folder, [*ROWS[:-1], ("Haydn", "Other", "validation", "2006/v.midi", 11)])
    maestro.load_maestro(progress=False)
    assert len(list((folder / "runs/shared/maestro").glob("*.parquet"))) == 2


@pytest.mark.parametrize(
    "row",
    [
        ("Bach", "Fugue", "training", "2004/x.midi", 9),
        ("", "Fugue", "train", "2004/x.midi", 9),
        ("Bach", "Fugue", "train", "../x.midi", 9),
        ("Bach", "Fugue", "train", "/x.midi", 9),
        ("Bach", "Fugue", "train", "2004/x.wav", 9),
        ("Bach", "Fugue", "train", "2004/t1.midi", 9),
    ],
)
def test_tables_that_cannot_be(row):
    lines = "".join(f"{who},{what},{split},2004,{name},,1.0\n" for who, what, split, name, _ in (*ROWS, row))
    with pytest.raises(DataError, match="line 9 of"):
        maestro.read_table((HEAD + lines).encode(), "x")
    with pytest.raises(DataError, match="cannot be read"):
        maestro.read_table(b"\xff\xfe\x00", "x")


def test_missing_or_broken_archives(folder, monkeypatch):
    assert maestro_archive.maestro_problems() == []
    before = maestro_archive.maestro_fingerprint()
    path = folder / "maestro" / maestro_archive.ARCHIVE
    assert before == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(b"x")
    with pytest.raises(DataError, match="expected a zip archive"):
        maestro.load_maestro(progress=False)
    path.unlink()
    assert "put the archive" in maestro_archive.maestro_problems()[0]
    assert maestro_archive.archive_here() is None
    for call in (maestro_archive.maestro_fingerprint, maestro.load_maestro):
        with pytest.raises(DataError, match="GRASS_DATA has no maestro/maestro-v2"):
            call()
    monkeypatch.delenv("GRASS_DATA")
    assert maestro_archive.maestro_fingerprint() == maestro_archive.SHA256
    assert maestro_archive.maestro_problems() == []


def test_kinds():
    assert maestro.kind_of(maestro_archive.SHA256, 3) == "official"
    assert maestro.kind_of("0" * 64, 1281) == "subset"
    assert maestro.kind_of("0" * 64, 1282) == "substitute"


def test_fetching_checks_size_and_content(tmp_path):
    source, target = tmp_path / "source", tmp_path / "new" / "archive.zip"
    source.write_bytes(b"music" * 1000)
    right = {"address": source.as_uri(), "sha256": hashlib.sha256(b"music" * 1000).hexdigest(), "size": 5000}
    for wrong in ({"sha256": "0" * 64}, {"size": 4999}, {"size": 5001}, {"address": (tmp_path / "no").as_uri()}):
        with pytest.raises(DataError, match="run with scale=embedded"):
            maestro_archive.fetch(target, progress=False, **{**right, **wrong})
        assert list(target.parent.iterdir()) == []
    maestro_archive.fetch(target, progress=False, **right)
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.skipif(not os.environ.get("GRASS_DATA"), reason="needs the archive of MAESTRO in GRASS_DATA")
def test_the_archive_at_hand_has_the_official_columns():
    path = maestro_archive.archive_here()
    if path is None:
        pytest.skip("GRASS_DATA has no MAESTRO")
    with maestro.open_archive(path, "x") as archive:
        splits = Counter(one.split for one in maestro.read_table(archive.read(maestro._TABLE), "x"))
    assert splits["train"] > splits["test"] > 0


@pytest.fixture(scope="module")
def pieces():
    return chorales.chorales()


def test_chorales_are_those_of_the_pinned_package(pieces):
    """The module checks the hash of the files; ten scores drawn at random had the notes that music21 reads in them."""
    assert chorales.chorales_fingerprint() == chorales._SHA256
    assert len(pieces) == 381
    assert sum(len(one.events) for one in pieces) == 219538
    first = decode(pieces[0].events)
    assert pieces[0].title == "J. S. Bach: chorale BWV 1.6"
    # BWV 1.6 begins with an upbeat of horn and voices on F major.
    assert set((first[first[:, 0] == 0][:, PITCH] % 12).tolist()) == {0, 5, 9}
    assert Counter(one.split for one in pieces) == {"train": 342, "test": 39}


def test_twins_are_on_one_side(pieces):
    split = {one.name.removeprefix("bwv").removesuffix(".mxl"): one.split for one in pieces}
    groups = (("10.7", "323"), ("154.3", "359"), ("158.4", "279"), ("20.11", "20.7"), ("227.1", "227.11"))
    for names in (*groups, ("244.15", "244.17", "244.44"), ("253", "414"), ("274", "62.6")):
        assert len({split[name] for name in names}) == 1
    starts = {}
    for one in pieces:
        pitches = decode(one.events)[:40, PITCH]
        starts.setdefault(tuple((pitches - pitches[0]).tolist()), set()).add(one.split)
    assert all(len(sides) == 1 for sides in starts.values())


def test_twins_at_another_pitch_and_speed():
    rows = [(10 * i, 10 * i + 9, 50 + i * i % 13, 64) for i in range(50)]
    slower = [(2 * on, 2 * off, pitch + 3, 64) for on, off, pitch, _ in rows]
    other = [*rows[:39], (390, 399, 90, 64)]
    assert chorales.twins([as_notes(rows), as_notes(other), as_notes(slower)]) == [0, 1, 0]


def test_windows_of_chorales(pieces, monkeypatch):
    monkeypatch.setattr(chorales, "chorales", lambda: pieces)
    data = chorales.load_chorales(length=64, n_train=512, n_query=100)
    assert (data.train_ids.shape, data.query_ids.shape) == ((512, 64), (100, 64))
    assert not {window.piece for window in data.train} & {window.piece for window in data.queries}
    assert len({(window.piece, window.number) for window in data.train}) == 512
    assert len({window.piece for window in data.queries}) == 39
    again = chorales.load_chorales(length=64, n_train=512, n_query=100)
    assert again.sha256 == data.sha256
    assert data.sha256 == "36064d93d54818b62df071081d50b72cd63f41b88d3325909e518aa84db5e079"
    with pytest.raises(DataError, match="expected 99,999 or more"):
        chorales.load_chorales(length=64, n_train=99_999, n_query=100)


def test_another_package_is_named(monkeypatch):
    monkeypatch.setattr(chorales, "_SHA256", "0" * 64)
    with pytest.raises(DataError, match="version that requirements"):
        chorales.chorales_fingerprint()
    monkeypatch.setattr(chorales, "_FOLDER", "music21/none")
    with pytest.raises(DataError, match="make setup"):
        chorales.chorales_fingerprint()
