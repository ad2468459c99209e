"""Events against an independent computation; MIDI and MusicXML that the tests write; archives that are refused."""

import io
import stat
import zipfile

import mido
import numpy as np
import pytest

from grass_lib.errors import DataError
from grass_lib.experiments.data import archive
from grass_lib.experiments.data.archive import open_archive
from grass_lib.experiments.data.events import (
    END,
    EVENTS,
    LOUDNESS,
    ONSET,
    PAD,
    PITCH,
    RELEASE,
    VOCABULARY,
    as_notes,
    decode,
    describe,
    encode,
)
from grass_lib.experiments.data.midi import read_midi
from grass_lib.experiments.data.musicxml import read_musicxml, read_mxl


def random_notes(seed, n=40):
    generator = np.random.default_rng(seed)
    onsets = np.sort(generator.integers(0, 300, n))
    releases = onsets + generator.integers(0, 230, n)
    columns = (onsets, releases, generator.integers(55, 70, n), generator.integers(1, 128, n))
    return as_notes([tuple(row) for row in np.stack(columns, axis=1).tolist()])


def sounding(notes):
    """For every step and pitch whether it sounds: what was struck last counts, the longest where several were."""
    grid = np.zeros((int(notes[:, RELEASE].max()) + 1, 128), dtype=bool)
    for pitch in set(notes[:, PITCH].tolist()):
        mine = notes[notes[:, PITCH] == pitch]
        for step in range(len(grid)):
            begun = mine[mine[:, ONSET] <= step]
            if len(begun):
                last = begun[begun[:, ONSET] == begun[:, ONSET].max()]
                grid[step, pitch] = step < max(last[:, RELEASE].max(), last[0, ONSET] + 1)
    return grid


def walk(events):
    """Onsets with their level, read one event at a time by the published layout of the vocabulary."""
    time, level, onsets, on, grid = 0, None, [], {}, []
    for event in events:
        if event < 128:
            onsets.append((time, event, level))
            on[event] = time
        elif event < 256:
            grid.append((on.pop(event - 128), time, event - 128))
        elif event < 356:
            time += event - 255
        else:
            level = event - 356
    assert not on
    return onsets, grid


@pytest.mark.parametrize("seed", range(2))
def test_events_say_what_the_notes_say(seed):
    notes = random_notes(seed)
    events = encode(notes).tolist()
    assert min(events) >= 0
    assert max(events) < EVENTS
    onsets, spans = walk(events)
    loudest = {}
    for onset, _, pitch, velocity in notes.tolist():
        loudest[onset, pitch] = max(loudest.get((onset, pitch), 0), velocity)
    assert {(time, pitch): level for time, pitch, level in onsets} == {key: v // 4 for key, v in loudest.items()}
    grid = np.zeros_like(sounding(notes))
    for start, stop, pitch in spans:
        assert stop > start
        grid[start:stop, pitch] = True
    assert np.array_equal(grid, sounding(notes))


@pytest.mark.parametrize("seed", range(2))
def test_events_go_back_to_notes_and_to_the_same_events(seed):
    notes = random_notes(seed)
    events = encode(notes)
    back = decode(events)
    assert np.array_equal(encode(back), events)
    assert np.array_equal(sounding(back), sounding(notes))
    assert np.array_equal(back[:, LOUDNESS] % 4, np.full(len(back), 2))


def test_order_at_one_time_and_long_waits():
    notes = as_notes([(0, 10, 64, 80), (0, 10, 60, 80), (10, 260, 62, 83)])
    assert encode(notes).tolist() == [
        *(356 + 20, 60, 64),
        *(256 + 9, 128 + 60, 128 + 64, 62),
        *(355, 355, 256 + 49, 128 + 62),
    ]


def test_a_stretch_from_the_middle():
    notes = decode([128 + 40, 60, 256 + 4, PAD, END, 62, 256 + 1])
    assert notes[:, [ONSET, RELEASE, PITCH]].tolist() == [[0, 7, 60], [5, 7, 62]]
    assert set(notes[:, LOUDNESS].tolist()) == {16 * 4 + 2}
    assert decode([]).shape == (0, 4)
    for wrong in (-1, VOCABULARY):
        with pytest.raises(DataError, match="expected 0 to 389"):
            decode([wrong])
        with pytest.raises(DataError, match="expected 0 to 389"):
            describe(wrong)


def test_every_event_has_words_of_its_own():
    words = [describe(event) for event in range(VOCABULARY)]
    assert len(set(words)) == VOCABULARY
    assert (words[60], words[128 + 61], words[355]) == ("C4 begins", "C#4 ends", "1.00 s pass")
    assert (words[356], words[END], words[PAD]) == ("loudness 1 of 32", "the piece ends", "padding")


@pytest.mark.parametrize("row", [(-1, 3, 60, 64), (0, 3, 128, 64), (0, 3, 60, 200)])
def test_notes_out_of_range(row):
    with pytest.raises(DataError, match="expected MIDI numbers"):
        as_notes([row])


def midi_bytes(tracks, ticks=480, kind=1):
    file = mido.MidiFile(type=kind, ticks_per_beat=ticks)
    for messages in tracks:
        file.tracks.append(mido.MidiTrack(messages))
    buffer = io.BytesIO()
    file.save(file=buffer)
    return buffer.getvalue()


def key(kind, note, velocity, time, channel=0):
    return mido.Message(kind, note=note, velocity=velocity, time=time, channel=channel)


def pedal(value, time, channel=0):
    return mido.Message("control_change", control=64, value=value, time=time, channel=channel)


def test_midi_times_follow_the_tempo():
    tempo = [mido.MetaMessage("set_tempo", tempo=1_000_000, time=480), mido.MetaMessage("end_of_track", time=0)]
    keys = [
        key("note_on", 60, 90, 0),
        key("note_off", 60, 0, 480),
        key("note_on", 62, 50, 0),
        key("note_on", 62, 0, 240),
    ]
    # Half a second a beat at first, a whole second from the second beat on.
    assert read_midi(midi_bytes([tempo, keys]), "x").tolist() == [[0, 50, 60, 90], [50, 100, 62, 50]]


def test_sustain_pedal_holds_notes_of_its_channel():
    keys = [
        *(key("note_on", 60, 80, 0), pedal(100, 48), key("note_off", 60, 0, 48)),
        *(key("note_on", 64, 80, 0), key("note_off", 64, 0, 96), key("note_on", 64, 70, 96)),
        *(key("note_on", 50, 60, 0, channel=1), key("note_off", 50, 0, 48, channel=1)),
        *(pedal(10, 48), key("note_off", 64, 0, 96), key("note_on", 40, 9, 0, channel=9)),
    ]
    # 96 ticks are a tenth of a second.
    assert read_midi(midi_bytes([keys]), "x").tolist() == [
        *([0, 40, 60, 80], [10, 30, 64, 80]),
        *([30, 35, 50, 60], [30, 50, 64, 70]),
    ]


def test_hanging_notes_end_with_the_file():
    keys = [
        key("note_on", 60, 80, 0),
        pedal(127, 0),
        key("note_off", 60, 0, 96),
        mido.MetaMessage("end_of_track", time=96),
    ]
    assert read_midi(midi_bytes([keys]), "x").tolist() == [[0, 20, 60, 80]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as MIDI"),
        (b"no music at all", "cannot be read as MIDI"),
        (midi_bytes([[key("note_on", 60, 80, 0), key("note_off", 60, 0, 96)]])[:30], "cannot be read as MIDI"),
        (midi_bytes([[pedal(3, 0)]]), "holds no note"),
        (midi_bytes([[key("note_on", 60, 80, 0)]], kind=2), "format 2"),
        (midi_bytes([[key("note_on", 60, 80, 0), key("note_off", 60, 0, 2**27)]]), "lasts more than"),
    ],
)
def test_midi_files_that_are_none(content, message):
    with pytest.raises(DataError, match=message):
        read_midi(content, "song.midi")


SCORE = """<?xml version="1.0"?><score-partwise><part><measure>
<attributes><divisions>2</divisions></attributes><sound tempo="60"/>
<note><pitch><step>C</step><octave>4</octave></pitch><duration>2</duration><tie type="start"/></note>
<note><chord/><pitch><step>E</step><alter>-1</alter><octave>4</octave></pitch><duration>2</duration></note>
<note><grace/><pitch><step>D</step><octave>4</octave></pitch></note>
<backup><duration>2</duration></backup><forward><duration>1</duration></forward>
<note><pitch><step>G</step><octave>3</octave></pitch><duration>1</duration></note>
</measure><measure>
<note><pitch><step>C</step><octave>4</octave></pitch><duration>2</duration><tie type="stop"/></note>
<note><rest/><duration>1</duration></note>
<note><pitch><step>C</step><octave>4</octave></pitch><duration>1</duration></note>
</measure></part><part><measure><note><pitch><step>F</step><alter>1</alter><octave>2</octave></pitch><duration>3</duration>
</note></measure></part></score-partwise>"""
NOTES = [[0, 300, 42, 64], [0, 200, 60, 64], [0, 100, 63, 64], [50, 100, 55, 64], [250, 300, 60, 64]]


def mxl_bytes(score=SCORE, path="a.xml"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("META-INF/container.xml", f'<container><rootfile full-path="{path}"/></container>')
        file.writestr("a.xml", score)
    return buffer.getvalue()


def test_score_with_ties_chords_voices_and_parts():
    assert read_musicxml(SCORE.encode(), "x").tolist() == NOTES
    assert read_mxl(mxl_bytes(), "x").tolist() == NOTES
    # Without a tempo 96 quarters a minute; the duration of a quarter is then 62.5 steps.
    slower = read_musicxml(SCORE.replace('<sound tempo="60"/>', "").encode(), "x")
    assert slower[1].tolist() == [0, 125, 60, 64]


@pytest.mark.parametrize(
    "content",
    [b"", b"<score-partwise/>", b"<score-timewise><part/></score-timewise>", SCORE.replace(">2<", ">x<").encode()],
)
def test_scores_that_are_none(content):
    with pytest.raises(DataError, match="package again"):
        read_musicxml(content, "x")


def test_compressed_scores_that_are_none():
    for content in (b"PK", mxl_bytes(path="b.xml"), mxl_bytes(path="../a.xml")):
        with pytest.raises(DataError):
            read_mxl(content, "x")


def zipped(path, *entries, **content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for entry in entries:
            file.writestr(entry, b"x")
        for name, text in content.items():
            file.writestr(name, text)
    return path


def link(name, mode=stat.S_IFLNK):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (mode | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("../outside.midi", "names inside"),
        ("a/../../outside.midi", "names inside"),
        ("/etc/outside.midi", "names inside"),
        ("C:outside.midi", "names inside"),
        ("a\\..\\outside.midi", "names inside"),
        (link("linked.midi"), "a link or a device"),
        (link("pipe", stat.S_IFIFO), "a link or a device"),
    ],
)
def test_members_that_would_leave_the_archive_are_refused(tmp_path, entry, message):
    path = zipped(tmp_path / "a.zip", "fine.midi", entry)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message), open_archive(path, "the archive") as found:
        found.read("fine.midi")
    assert sorted(tmp_path.rglob("*")) == before


def test_sizes_are_bounded(tmp_path, monkeypatch):
    path = zipped(tmp_path / "a.zip", one="1" * 500, two="2" * 500)
    with open_archive(path, "a") as found:
        assert found.names == ("one", "two")
        assert found.read("one") == b"1" * 500
        with pytest.raises(DataError, match="no member 'three'"):
            found.read("three")
    for name, limit in (("MOST_MEMBERS", 1), ("LARGEST_MEMBER", 499), ("LARGEST_TOTAL", 999)):
        with monkeypatch.context() as patch:
            patch.setattr(archive, name, limit)
            with pytest.raises(DataError, match="at most"), open_archive(path, "a"):
                pass


def test_damaged_archives(tmp_path):
    path = zipped(tmp_path / "a.zip", one=bytes(range(256)) * 8)
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(content)
    with open_archive(path, "a") as found, pytest.raises(DataError, match="one"):
        found.read("one")
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match="expected a zip archive"), open_archive(path, "a"):
        pass
    with pytest.raises(DataError, match="cannot be read"), open_archive(tmp_path / "none.zip", "a"):
        pass


def test_a_member_larger_than_it_says_is_not_read_on(tmp_path):
    path = zipped(tmp_path / "a.zip", bomb="0" * 4000)
    content = bytearray(path.read_bytes())
    directory = content.rindex(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = (100).to_bytes(4, "little")
    path.write_bytes(content)
    with open_archive(path, "a") as found, pytest.raises(DataError, match="bomb"):
        found.read("bomb")
