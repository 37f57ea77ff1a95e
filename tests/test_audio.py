"""formats/audio.py: files as people have them are decoded exactly, or an error of one line."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import speech

from formats import audio
from formats.audio import (
    Recording,
    count_left_out,
    describe_speakers,
    find_audio,
    read_blocks,
    read_fbank,
    speakers_of,
)
from formats.fbank import fbank, fbank_settings
from utils import BadUtterance, UserError

RATE = 16000
FILES = Path(__file__).parent / "audio"  # written by sox and ffmpeg, see make_files.sh there


def read(path, start=0.0, end=None, **options):
    """All samples of a file, or of a segment of it."""
    recording = Recording("utt", str(path), start=start, end=end)
    return np.concatenate([*read_blocks(recording, RATE, **options)])


def write(path, samples, rate=RATE, **kw):
    soundfile.write(path, samples, rate, **kw)
    return str(path)


# Reading files ------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_its_16_bit_integers(tmp_path):
    extremes = np.array([-32768, -32767, -1, 0, 1, 32767], np.int16)
    samples = np.concatenate([extremes, speech()])
    kinds = [{"subtype": name} for name in ("PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")]
    formats = ("WAVEX", "RF64", "W64", "AIFF", "AU", "NIST", "CAF", "FLAC")
    kinds += [{"format": name} for name in formats]
    kinds += [{"format": "FLAC", "subtype": "PCM_24"}, {"format": "AU", "endian": "LITTLE"}]
    for kw in [*kinds, {"endian": "BIG"}]:
        found = read(write(tmp_path / "a.wav", samples / 32768, **kw))  # whatever its name
        assert found.dtype == np.float32 and np.array_equal(found, samples), kw


def test_files_of_other_writers_give_what_these_decode():
    """sox's and ffmpeg's own files, and what these tools read in them."""

    def decoded(name):
        return np.fromfile(FILES / f"{name}.s16", "<i2")

    names = ["sox.wav", "sox.sph", "sox.aiff", "sox.au", "sox.w64", "sox-pipe.wav", "ffmpeg.flac"]
    for name in names:
        assert np.array_equal(read(FILES / name), decoded("sox")), name
    for name in ("ffmpeg.mp3", "ffmpeg.ogg"):  # ffmpeg rounds to integers, and ends Ogg early
        expected = decoded(name)
        assert np.abs(read(FILES / name)[: len(expected)] - expected).max() < 0.6, name
    opus = read(FILES / "ffmpeg.opus", resample=True)
    assert len(opus) == 6400 and np.corrcoef(opus, decoded("sox"))[0, 1] > 0.99
    left = read(FILES / "stereo.flac", resample=True, channel=0)
    assert len(left) == 6400 and np.abs(left - decoded("stereo")).max() < 2  # sox dithers
    assert len(read(FILES / "ffmpeg-cbr.mp3")) == 36 * 576  # no header says so
    for name in ("ffmpeg-pipe.wav", "ffmpeg-pipe.au"):  # 2^32 - 1 bytes by their headers
        assert np.array_equal(read(FILES / name), decoded("sox")), name


def test_a_part_of_a_file_in_blocks_of_any_size(tmp_path, monkeypatch):
    for name in ("a.wav", "a.flac", "a.ogg", "a.mp3"):
        path = write(tmp_path / name, speech(2))
        whole = read(path)
        for size in (100, 12345, 1 << 20):
            monkeypatch.setattr(audio, "BLOCK_SIZE", size)
            for start, end in [(0.0, 1.0), (0.501, 1.23456), (1.5, None), (1.9, 2.3)]:
                expected = whole[int(start * RATE) : end and int(end * RATE)]
                assert np.array_equal(read(path, start, end), expected), (path, size, start, end)
    for start, end in [(2.1, 2.2), (1.0, 2.6)]:
        with pytest.raises(BadUtterance, match=r"a\.wav: utterance utt: .* but the file has 2 s"):
            read(tmp_path / "a.wav", start, end)


def test_all_segments_of_a_file_are_read_in_one_pass(tmp_path, monkeypatch):
    """Even of an MP3, in which seeking is not exact: it is decoded forward, once."""
    samples_read, read_samples = [], soundfile.SoundFile.read

    def counting(self, frames=-1, **kw):
        samples = read_samples(self, frames, **kw)
        samples_read.append(len(samples))
        return samples

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    for name in ("a.mp3", "a.flac"):
        path = write(tmp_path / name, speech(4))
        whole = read(path)
        segments = {"utt-0": 3, "utt-1": 0, "utt-2": 1, "utt-3": 2}  # in the order of their ids
        recordings = [Recording(utt, path, start=t, end=t + 0.5) for utt, t in segments.items()]
        samples_read.clear()
        ((position, job),) = audio.audio_jobs(recordings, fbank_settings())
        found = {
            utt: np.concatenate([*read_frames()])
            for utt, _, read_frames in pickle.loads(pickle.dumps(job))([])
        }
        assert position == 4 and sum(samples_read) <= 3.5 * RATE
        assert list(found) == ["utt-1", "utt-2", "utt-3", "utt-0"]
        for utt, start in segments.items():
            part = whole[start * RATE :][: RATE // 2]
            assert np.array_equal(found[utt], fbank(part, fbank_settings()))


def test_resampled_in_blocks(tmp_path, monkeypatch):
    """A tone stays, another that the new rate cannot hold goes."""
    low, high = (np.sin(2 * np.pi * f * np.arange(48000) / 48000) * 8000 for f in (440, 9000))
    path = write(tmp_path / "a.wav", np.rint(low + high).astype(np.int16), 48000)
    whole = read(path, resample=True)
    assert whole.dtype == np.float32 and len(whole) == 16000
    assert np.abs(whole - low[::3])[200:-200].max() < 2
    monkeypatch.setattr(audio, "BLOCK_SIZE", 1000)
    np.testing.assert_allclose(read(path, resample=True), whole, atol=0.01)


def test_rates_and_channels_are_rejected_with_the_flags_that_help(tmp_path):
    path = write(tmp_path / "a.flac", np.stack([speech(), -speech()], axis=1), 8000)
    rejected(path, "8000 Hz, expected 16000 Hz: .*--resample; it has 2 channels.*--channel K")
    rejected(path, "2 channels, expected 1: .*with --channel K", resample=True)
    rejected(path, "no channel 2: it has 2", resample=True, channel=2)
    left, right = (read(path, resample=True, channel=k) for k in (0, 1))
    assert np.array_equal(left, -right)
    assert np.array_equal(read(write(tmp_path / "a.wav", speech()), channel=0), speech())


def rejected(path, reason, **options):
    """The error starts with the file's name, is one line, and matches reason."""
    with pytest.raises(BadUtterance, match=reason) as caught:
        read(path, **options)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def set_size(path, size):
    """Let a WAV's header state `size` bytes of samples."""
    content = bytearray(path.read_bytes())
    content[40:44] = struct.pack("<I", size)
    path.write_bytes(content)


@pytest.mark.parametrize("stated, seconds", [(32726, 1.0), (2**32 - 1, 1.0), (8000, 0.25)])
def test_a_wav_of_another_length_than_its_header_states_is_read_with_a_warning(
    tmp_path, stated, seconds
):
    path = Path(write(tmp_path / "a.wav", speech()))
    set_size(path, stated)
    notes = []
    assert np.array_equal(read(path, notes=notes), speech()[: round(seconds * RATE)])
    assert notes == [
        f"{path}: its header states {stated} bytes of samples, but the file holds 32000: "
        f"{seconds:.2f} s were read"
    ]


def test_other_chunks_around_the_samples_of_a_wav_give_no_warning(tmp_path):
    for samples in (speech()[:1000], speech()[:1001]):  # the latter with a byte of padding
        path, notes = Path(write(tmp_path / "a.wav", samples, subtype="PCM_U8")), []
        content, expected = path.read_bytes(), read(path)
        chunk = b"LIST" + struct.pack("<I", 5) + b"INFO?\0"  # 5, and one of padding
        for before, after in [(b"", b""), (b"", chunk), (chunk, chunk), (b"", bytes(5))]:
            path.write_bytes(content[:36] + before + content[36:] + after)
            assert np.array_equal(read(path, notes=notes), expected)
        assert notes == []


def test_a_wav_that_was_written_to_a_pipe_is_rejected_with_the_way_out(tmp_path):
    path = Path(write(tmp_path / "it's.wav", speech()))
    set_size(path, 0)
    rejected(path, r"states 0 bytes .* holds 32000.*sox --ignore-length '.*its?.*OUT\.wav")


def test_a_flac_that_was_written_to_a_pipe_is_read(tmp_path):
    path = Path(write(tmp_path / "a.flac", speech()))
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the length has 36 bits
    content[22:26] = bytes(4)
    path.write_bytes(content)
    assert np.array_equal(read(path), speech())


def test_damaged_in_the_middle(tmp_path):
    for kw in ({"format": "FLAC"}, {"format": "OGG"}, {"format": "OGG", "subtype": "OPUS"}):
        path = Path(write(tmp_path / "a.wav", speech(4), **kw))
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
        rejected(path, "decoded|decoding ended after")
    path = Path(write(tmp_path / "a.flac", speech()))
    path.write_bytes(path.read_bytes()[:-5000])
    rejected(path, "cannot be decoded")


def test_what_libsndfile_cannot_decode_is_rejected_with_what_helps(tmp_path):
    path, sphere = tmp_path / "a.wav", (FILES / "sox.sph").read_bytes()
    path.write_bytes(sphere.replace(b"-s3 pcm", b"-s26 pcm,embedded-shorten-v2.00"))
    rejected(path, r"Shorten.*: sph2pipe -f wav \S*a\.wav OUT\.wav")
    path.write_bytes(b"")
    rejected(path, r"the file is empty \(0 bytes\)")
    caf = Path(write(tmp_path / "a.caf", speech())).read_bytes()
    place = caf.index(b"data") + 4
    unknown_length = caf[:place] + b"\xff" * 8 + caf[place + 8 :]
    mpeg_4 = (FILES / "ffmpeg.m4a").read_bytes()
    for content in (unknown_length, mpeg_4, b"fLaC", b"RIFF", b"NIST_1A\n", b"hello\n" * 99):
        path.write_bytes(content)
        rejected(path, r"cannot be decoded.* unknown length .*ffmpeg -i \S*a\.wav OUT\.wav")


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    rejected(tmp_path / "gone.wav", "No such file or directory$")
    monkeypatch.chdir(tmp_path)
    rejected("gone.wav", f"relative paths start from {tmp_path}")


def test_samples_out_of_range_are_rejected(tmp_path):
    path, samples = tmp_path / "a.wav", speech().astype(np.float32)
    for subtype in ("FLOAT", "DOUBLE"):  # 16-bit values in a floating-point file
        reason = rf"samples up to {np.abs(samples).max():g}, expected -1 to 1"
        rejected(write(path, samples, subtype=subtype), reason)
    for bad in (np.nan, -np.inf, 1e38):  # the last overflows in 16-bit range
        samples[700] = bad
        rejected(write(path, samples, subtype="FLOAT"), "NaN or infinite")
    loud = write(path, np.full(500, 1.5), subtype="FLOAT")  # an overshoot is none
    assert np.array_equal(read(loud), np.full(500, 49152, np.float32))


# Finding files ------------------------------------------------------------------------------------


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_find_audio_lists_a_tree_by_id_and_what_it_ignores(tmp_path):
    touch(tmp_path, "in/84/1/84-1-1.flac", "in/84/1/84-1-0.flac", "in/103/4/103-4-0.FLAC")
    touch(tmp_path, "in/z.b.Wav", "elsewhere/85/c.mp3")
    (tmp_path / "in" / "84" / "y.wav").symlink_to(tmp_path / "in" / "z.b.Wav")
    (tmp_path / "in" / "85").symlink_to("../elsewhere/85")
    expected = {
        ".hidden": "hidden",
        "._z.wav": "hidden",
        "84/LICENSE": "no extension",
        "84/1/84-1.trans.txt": ".txt",
        "84/Thumbs.db": ".db",
        "84/.DS_Store": "hidden",
        "84/.nfs0001": "hidden",
        "84/loop": "a link to a folder above it",
    }
    touch(tmp_path / "in", ".hidden/x.wav", *[*expected][1:-1])
    (tmp_path / "in" / "84" / "loop").symlink_to(tmp_path / "in")
    found, left_out = find_audio(tmp_path / "in")
    assert [(recording.utt_id, recording.speaker) for recording in found] == [
        *[("103-4-0", "103"), ("84-1-0", "84"), ("84-1-1", "84"), ("c", "85"), ("y", "84")],
        ("z.b", None),
    ]
    assert all(os.path.isfile(recording.path) for recording in found)
    assert {*left_out} == {f"{tmp_path}/in/{name}: {why}" for name, why in expected.items()}
    counts = "1 .db, 1 .txt, 1 a link to a folder above it, 4 hidden, 1 no extension"
    assert count_left_out(left_out) == counts
    assert find_audio(found[0].path) == ([found[0]._replace(speaker=None)], [])


def test_two_files_with_one_id_are_rejected_with_the_flag_that_helps(tmp_path):
    touch(tmp_path, "in/id1/a/1.wav", "in/id1/b/1.wav", "in/1.wav")
    with pytest.raises(UserError, match=r"1\.wav and \S*1\.wav: .* id 1: .*--ids_from_paths"):
        find_audio(tmp_path / "in")
    found, _ = find_audio(tmp_path / "in", ids_from_paths=True)
    ids = {recording.utt_id: recording.speaker for recording in found}
    assert ids == {"1": None, "id1-a-1": "id1", "id1-b-1": "id1"}
    touch(tmp_path, "in/id1-a/1.wav")
    with pytest.raises(UserError, match="two files .*id1-a-1: rename one"):
        find_audio(tmp_path / "in", ids_from_paths=True)
    # VCTK has two microphones; other corpora both FLAC and WAV.
    touch(tmp_path, "a/1.wav", "a/1.flac", "a/2_mic1.flac", "a/2_mic2.flac")
    for ids_from_paths in (False, True):
        with pytest.raises(UserError, match=r" id (a-)?1: .*--pattern '\*\.(flac|wav)'"):
            find_audio(tmp_path / "a", ids_from_paths=ids_from_paths)
    for pattern, utt_id in [("*.wav", "1"), ("*_mic1.flac", "2_mic1")]:
        found, ignored = find_audio(tmp_path / "a", pattern=pattern)
        assert [recording.utt_id for recording in found] == [utt_id]
        assert count_left_out(ignored) == "3 --pattern does not match"


def test_names_with_spaces_and_accents_can_be_given_a_speaker(tmp_path, caplog):
    touch(tmp_path, "in/my recording 1.wav", "in/cafe\u0301.wav")  # decomposed, as on macOS
    (tmp_path / "utt2spk").write_text("my_recording_1 anna\ncaf\u00e9 bert\n", encoding="utf-8")
    found, _ = find_audio(tmp_path / "in")
    speakers = speakers_of(found, tmp_path / "in", tmp_path / "utt2spk")
    assert speakers == {"my_recording_1": "anna", "caf\u00e9": "bert"}
    assert caplog.messages == [f"{tmp_path}/in: spaces in 1 file names are '_' in their ids"]


def test_speakers_are_known_or_asked_for(tmp_path, caplog):
    touch(tmp_path, "p225/x/a.wav", "p225/y/b.wav")
    assert speakers_of(find_audio(tmp_path)[0], tmp_path) == {"a": "p225", "b": "p225"}
    assert "of one speaker, p225: if they are not, use --utt2spk FILE" in caplog.text
    touch(tmp_path, "p226/c.wav")
    speakers = speakers_of(find_audio(tmp_path)[0], tmp_path)
    assert speakers == {"a": "p225", "b": "p225", "c": "p226"}
    touch(tmp_path, "d.wav")
    message = r"d\.wav: the speaker of utterance d, .*, or use --this or --that"
    with pytest.raises(UserError, match=message):
        speakers_of(find_audio(tmp_path)[0], tmp_path, ways_out="--this or --that")
    (tmp_path / "utt2spk").write_text("a x\nb y\nc y\n")
    with pytest.raises(UserError, match=r"d\.wav: .* utterance d, .* not in \S*utt2spk"):
        speakers_of(find_audio(tmp_path)[0], tmp_path, tmp_path / "utt2spk")
    (tmp_path / "wav.scp").write_text("a a.wav\nb b.wav\n")
    (tmp_path / "utt2spk").write_text("a x\n")
    with pytest.raises(
        UserError, match=r"utterance b, .* not in \S*/utt2spk: add it there, or use"
    ):
        speakers_of(find_audio(tmp_path)[0], tmp_path)
    assert describe_speakers("a" * 3 + "b") == "2 (a, b), 2 utterances each"
    assert describe_speakers("dcba") == "4 (a, b, c, ...), 1 utterances each"


@pytest.mark.parametrize(
    "names, below",
    [
        (["train-clean-360/84/1/a.flac", "dev-clean/85/1/b.flac"], "dev-clean"),  # LibriSpeech
        (["train/audio/1/1/a.flac", "train/audio/2/1/b.flac"], "train"),  # MLS
        (["clips/a.mp3", "clips/b.mp3"], "clips"),  # Common Voice
        (["podcast/P1/a.opus", "youtube/Y1/b.opus"], "podcast"),  # GigaSpeech
        (["TRAIN/DR1/FABC0/a.wav", "TEST/DR1/MABC0/b.wav"], "TEST"),  # TIMIT
        (["corpus/1/1/a.wav", "corpus/2/1/b.wav"], "corpus"),
    ],
)
def test_parts_of_a_corpus_are_not_taken_for_speakers(tmp_path, names, below):
    touch(tmp_path, *names)
    recordings, _ = find_audio(tmp_path)
    message = rf"such as {tmp_path}/{below}, or use --utt2spk FILE"
    with pytest.raises(UserError, match=message):
        speakers_of(recordings, tmp_path)
    speakers = tmp_path / "utt2spk"
    speakers.write_text("a 1\nb 2\n")
    assert speakers_of(recordings, tmp_path, speakers) == {"a": "1", "b": "2"}


def test_find_audio_rejects_what_holds_none(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="gone: no such"):
        find_audio(tmp_path / "gone")
    touch(tmp_path, "a.txt")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(UserError, match=r"no audio files: .*\.wav \.flac.*ignored: 1 \.txt"):
            find_audio(path)
    touch(tmp_path, "b.wav", "locked/x.wav")
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)  # root may read everything
    with pytest.raises(PermissionError, match="locked"):
        find_audio(tmp_path)
    bad = []
    found, _ = find_audio(tmp_path, bad=bad)
    assert [recording.utt_id for recording in found] == ["b"]
    assert len(bad) == 1 and "Permission denied" in bad[0]


def test_names_that_cannot_be_ids_are_rejected_or_skipped(tmp_path):
    names = ("a\\b.wav", os.fsdecode(b"caf\xe9.wav"), "bell\7.wav")
    touch(tmp_path, *names)
    with pytest.raises(UserError, match="utterance id .* cannot be a file name"):
        find_audio(tmp_path)
    bad = []
    assert find_audio(tmp_path, bad=bad) == ([], []) and len(bad) == len(names)


def test_a_kaldi_data_directory(tmp_path):
    """Recordings, segments of them, speakers, and the sides of a call."""
    sound = np.stack([speech(3), speech(3, seed=1)], axis=1)
    call = write(tmp_path / "a call.flac", sound)
    tables = {
        "wav.scp": f"rec-A {call}\nrec-B {call}\n\n",
        "segments": "b rec-A 0.5 1.25\na rec-B 2.00 -1\n",
        "utt2spk": "a anna\nb bert\n",
        "reco2file_and_channel": "rec-A rec A\nrec-B rec B\n",
    }
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
    found, left_out = find_audio(tmp_path)
    assert left_out == []
    assert speakers_of(found, tmp_path) == {"a": "anna", "b": "bert"}
    for channel in (None, 1):  # the flag does not overrule the tables
        a, b = (np.concatenate([*read_blocks(one, RATE, channel=channel)]) for one in found)
        assert np.array_equal(a, sound[32000:, 1]) and np.array_equal(b, sound[8000:20000, 0])
    for name in ("segments", "utt2spk"):
        (tmp_path / name).unlink()
    found, _ = find_audio(tmp_path)
    assert [recording.utt_id for recording in found] == ["rec-A", "rec-B"]
    assert np.array_equal(np.concatenate([*read_blocks(found[1], RATE)]), sound[:, 1])
    (tmp_path / "reco2file_and_channel").write_text("rec-A f 1\nrec-B f 2\n")  # NIST's numbers
    assert [recording.channel for recording in find_audio(tmp_path)[0]] == [0, 1]
    with pytest.raises(UserError, match="--utt2spk"):
        speakers_of(found, tmp_path)
    with pytest.raises(UserError, match="--ids_from_paths"):
        find_audio(tmp_path, ids_from_paths=True)
    (tmp_path / "segments").write_text("a rec-A 0 1 1\nb rec-A 1 2 0\nc rec-A 2 3\n")
    assert [recording.channel for recording in find_audio(tmp_path)[0]] == [1, 0, 0]


@pytest.mark.parametrize(
    "name, line, reason",
    [
        ("wav.scp", "r sph2pipe -f wav a.sph |", r"wav\.scp:2: recording r: pipes, .*not supp"),
        ("wav.scp", "r data_wav.ark:2", r"wav\.scp:2: recording r: .*archives .*not supp"),
        ("wav.scp", "alone", r"wav\.scp:2: expected a recording and its file, found 'alone'"),
        ("segments", "a r 0 1", r"segments:1: utterance a: r is not in wav\.scp"),
        ("segments", "a rec 1 0", r"segments:1: utterance a: expected 0 <= start < end"),
        ("segments", "a rec 0 nan", r"segments:1: utterance a: expected 0 <= start < end"),
        ("segments", "../a rec 0 1", r"segments:1: utterance id"),
        ("segments", "a rec 0", r"segments:1: expected an utterance and a recording and its st"),
        ("segments", "a rec 0 1\na rec 1 2", r"segments:2: a has .*segments:1"),
        ("segments", "a rec 0 1 A", r"segments:1: utterance a: .* a channel, from 0, found"),
        ("reco2file_and_channel", "rec f 0", r"channel:1: expected a channel A, B, .*found '0'"),
        ("segments", "", "segments: this table is empty"),
        ("utt2spk", "\n", "utt2spk: this table is empty"),
    ],
)
def test_a_data_directorys_faults_are_named_by_line(tmp_path, name, line, reason):
    (tmp_path / "wav.scp").write_text("rec a.wav\n")
    with open(tmp_path / name, "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=reason):
        find_audio(tmp_path)


def test_log_mel_frames_of_a_file(tmp_path):
    path, settings = write(tmp_path / "a.flac", speech(2)), fbank_settings()
    frames = read_fbank(Recording("utt", path), settings)
    assert np.array_equal(frames, fbank(speech(2).astype(np.float32), settings))
    with pytest.raises(UserError, match=r"a\.flac: utterance utt: its 160 samples are fewer than"):
        read_fbank(Recording("utt", path, start=1, end=1.01), settings)
