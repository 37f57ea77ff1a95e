"""formats/audio.py: files as people have them are decoded to the bit, or refused in one line."""

import os
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import speech

from formats import audio
from formats.audio import (
    Recording,
    count_left_out,
    find_audio,
    read_blocks,
    read_fbank,
    speakers_of,
)
from formats.fbank import fbank, fbank_settings
from utils import UserError

RATE = 16000


FILES = Path(__file__).parent / "audio"  # written by sox and ffmpeg, see make_files.sh there


def read(path, **options):
    """All samples of a file."""
    return np.concatenate([*read_blocks(Recording("utt", str(path)), RATE, **options)])


def write(path, samples, rate=RATE, **kw):
    soundfile.write(path, samples, rate, **kw)
    return str(path)


# Reading files ------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_its_16_bit_integers(tmp_path):
    extremes = np.array([-32768, -32767, -1, 0, 1, 32767], np.int16)
    samples = np.concatenate([extremes, speech()])
    kinds = [{"subtype": name} for name in ("PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")]
    kinds += [{"format": name} for name in audio.FORMATS[1:9]]
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


def test_wav_with_other_chunks_around_the_samples(tmp_path):
    path, samples = tmp_path / "a.wav", speech()[:1001]
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", None))
        file.writeframes(samples.tobytes())
    content, chunk = path.read_bytes(), b"LIST" + struct.pack("<I", 5) + b"INFO?\0"  # 5, and a pad
    path.write_bytes(content[:36] + chunk + content[36:] + chunk)
    assert np.array_equal(read(path), samples)


def test_a_part_of_a_file_in_blocks_of_any_size(tmp_path, monkeypatch):
    names = ("a.wav", "a.flac", "a.ogg", "a.mp3")
    files = [write(tmp_path / name, speech(2)) for name in names]
    for path in files:
        whole = read(path)
        for size in (100, 12345, 1 << 20):
            monkeypatch.setattr(audio, "BLOCK_SIZE", size)
            for start, end in [(0.0, 1.0), (0.501, 1.23456), (1.5, None), (1.9, 2.3)]:
                recording = Recording("utt", path, start=start, end=end)
                expected = whole[int(start * RATE) : end and int(end * RATE)]
                found = np.concatenate([*read_blocks(recording, RATE)])
                assert np.array_equal(found, expected), (path, size, start, end)
    for start, end in [(2.1, 2.2), (1.0, 2.6)]:
        with pytest.raises(UserError, match=r"a\.wav: utterance utt: from .* but the file has 2 s"):
            [*read_blocks(Recording("utt", files[0], start=start, end=end), RATE)]


def test_resampled_in_blocks_as_whole(tmp_path, monkeypatch):
    """Against a tone that the other rate cannot hold, too."""
    time = np.arange(48000) / 48000
    tones = [np.sin(2 * np.pi * hertz * time) * 8000 for hertz in (440, 9000)]
    path = write(tmp_path / "a.wav", np.rint(sum(tones)).astype(np.int16), 48000)
    whole = read(path, resample=True)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) * 8000
    assert whole.dtype == np.float32 and len(whole) == 16000
    assert np.abs(whole - expected)[200:-200].max() < 2
    monkeypatch.setattr(audio, "BLOCK_SIZE", 1000)
    np.testing.assert_allclose(read(path, resample=True), whole, atol=0.01)


def test_rates_and_channels_are_refused_with_the_flags_that_help(tmp_path):
    path = write(tmp_path / "a.flac", np.stack([speech(), -speech()], axis=1), 8000)
    refused(path, "8000 Hz, expected 16000 Hz; 2 channels.*: .*--resample and --channel K")
    refused(path, "2 channels, expected 1: .*with --channel K", resample=True)
    refused(path, "no channel 2, only 2", resample=True, channel=2)
    left, right = (read(path, resample=True, channel=k) for k in (0, 1))
    assert np.array_equal(left, -right)
    assert np.array_equal(read(write(tmp_path / "a.wav", speech()), channel=0), speech())


def refused(path, reason, **options):
    """The message starts with the file's name, is one line, and matches reason."""
    with pytest.raises(UserError, match=reason) as caught:
        read(path, **options)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_was_cut_is_refused(tmp_path, capfd):
    """Wherever it was cut, whatever it is; libsndfile believes most of these."""
    formats = ["WAV", "RF64", "WAVEX", "W64", "AIFF", "AU", "NIST", "CAF", "FLAC", "MP3", "OGG"]
    kinds = [{"format": name} for name in formats]
    kinds += [{"endian": "BIG"}, {"format": "AU", "endian": "LITTLE"}]
    kinds += [{"format": "OGG", "subtype": "OPUS"}, {"format": "AIFF", "subtype": "FLOAT"}]
    for kw in kinds:
        path = Path(write(tmp_path / "a.wav", speech(4) / 32768, **kw))
        whole = path.read_bytes()
        shares = [int(len(whole) * share) for share in (0.1, 0.35, 0.7, 0.99)]
        for size in (16, 40, 1030, *shares, len(whole) - 1):
            path.write_bytes(whole[:size])
            refused(path, "truncated|decoded")
    assert capfd.readouterr().err == "", "decoders talk past the error line"


def test_both_numbers_of_a_file_that_was_cut(tmp_path):
    for kw, numbers in [
        ({"format": "NIST"}, "6000 of the 16000 samples"),
        ({"format": "W64"}, "12000 of the 32000 bytes"),
        ({}, "12000 of the 32000 bytes"),
    ]:
        path = Path(write(tmp_path / "a.wav", speech(), **kw))
        path.write_bytes(path.read_bytes()[: 12000 - 32000])
        refused(path, f"truncated: {numbers}")


def test_damaged_in_the_middle(tmp_path):
    for kw in ({"format": "FLAC"}, {"format": "OGG"}, {"format": "OGG", "subtype": "OPUS"}):
        path = Path(write(tmp_path / "a.wav", speech(4), **kw))
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
        refused(path, "decoded|truncated")


def test_what_was_written_to_a_pipe_is_refused_with_the_way_out(tmp_path):
    for name in ("ffmpeg-pipe.wav", "ffmpeg-pipe.au"):
        refused(FILES / name, rf"12800 of the 4294967295 .*sox --ignore-length \S*{name} OUT\.wav")
    path = Path(write(tmp_path / "it's.wav", speech()))
    content = bytearray(path.read_bytes())
    content[40:44] = bytes(4)
    path.write_bytes(content)
    refused(
        path, r"says 0 bytes of samples, and 32000 follow.*sox --ignore-length '.*its?.*OUT\.wav"
    )
    path = Path(write(tmp_path / "a.flac", speech()))
    content = bytearray(path.read_bytes())
    for total in (0, 2**36 - 1, 2**36 - 2, RATE + 1):  # the first two: written to a pipe
        content[21] = content[21] & 0xF0 | total >> 32  # 36 bits, after 4 + 4 + 13.5 bytes
        content[22:26] = struct.pack(">I", total & 0xFFFFFFFF)
        path.write_bytes(content)
        unknown = total in (0, 2**36 - 1)
        refused(path, r"how long .* sox \S*a\.flac OUT" if unknown else "decoded|truncated")


def test_what_libsndfile_cannot_decode_is_refused_with_the_tool_that_can(tmp_path):
    refused(FILES / "ffmpeg.m4a", r"MPEG-4 audio.*: ffmpeg -i \S*ffmpeg\.m4a OUT\.wav")
    # It would stop after 0.7 of 1.2 s: all frames are taken to be as long as the first.
    refused(FILES / "ffmpeg-vbr.mp3", r"11016 of 18432 samples; .* ffmpeg -i \S*vbr\.mp3 OUT\.flac")
    sphere = (FILES / "sox.sph").read_bytes()
    path, shorten = tmp_path / "a.wav", b"sample_coding -s26 pcm,embedded-shorten-v2.00\nend_head"
    assert b"end_head" in sphere
    for content in (sphere.replace(b"end_head", shorten), b"ajkg\x02\xfb"):
        path.write_bytes(content)
        refused(path, r"Shorten.*: sph2pipe -f wav \S*a\.wav OUT\.wav")
    refused(write(tmp_path / "b.wav", speech(), format="VOC"), r"VOC.*: sox \S*b\.wav OUT")
    for content in (
        b"",
        b"fLaC",
        b"RIFF",
        b".snd",
        b"ID3",
        b"NIST_1A\n",
        b"hello\n" * 99,
        bytes(4096),
    ):
        path.write_bytes(content)
        refused(path, "cannot be decoded|truncated|header says 0")
    refused(tmp_path / "gone.wav", "No such file")
    os.mkfifo(tmp_path / "pipe.wav")  # opened, it would be waited for
    refused(tmp_path / "pipe.wav", "not a regular file")


def test_samples_that_mean_nothing_are_refused(tmp_path):
    for bad in (np.nan, np.inf, -np.inf, 1e38):  # the last overflows in 16-bit range
        samples = speech().astype(np.float32) / 32768
        samples[700] = bad
        refused(write(tmp_path / "a.wav", samples, subtype="FLOAT"), "NaN or infinite")
    for subtype in ("FLOAT", "DOUBLE"):  # 16-bit values in a floating-point file
        path = write(tmp_path / "a.wav", speech().astype(np.float32), subtype=subtype)
        refused(path, rf"floating-point samples up to {np.abs(speech()).max():g}, expected -1 to 1")
    loud = write(tmp_path / "a.wav", np.full(500, 1.5), subtype="FLOAT")  # an overshoot is none
    assert np.array_equal(read(loud), np.full(500, 49152, np.float32))


# Finding files ------------------------------------------------------------------------------------


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_find_audio_lists_a_tree_by_id_and_tells_what_it_leaves_out(tmp_path):
    touch(tmp_path, "in/84/121123/84-121123-0001.flac", "in/84/121123/84-121123-0000.flac")
    touch(tmp_path, "in/103/1240/103-1240-0000.FLAC", "in/z.b.Wav", "in/84/1/84-1.trans.txt")
    touch(tmp_path, "in/.hidden/x.wav", "in/._z.wav", "in/84/LICENSE", "elsewhere/85/c.mp3")
    (tmp_path / "in" / "84" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "84" / "y.wav").symlink_to(tmp_path / "in" / "z.b.Wav")
    (tmp_path / "in" / "85").symlink_to("../elsewhere/85")
    found, left_out = find_audio(tmp_path / "in")
    assert {recording.utt_id: recording.speaker for recording in found} == {
        "103-1240-0000": "103",
        "84-121123-0000": "84",
        "84-121123-0001": "84",
        "c": "85",
        "y": "84",
        "z.b": None,
    }
    assert all(os.path.isfile(recording.path) for recording in found)
    assert [recording.utt_id for recording in found] == sorted(r.utt_id for r in found)
    expected = {".hidden": "hidden", "._z.wav": "hidden", "84/LICENSE": "no ending"}
    expected |= {"84/loop": "a link to a folder around it", "84/1/84-1.trans.txt": ".txt"}
    assert {*left_out} == {f"{tmp_path}/in/{name}: {why}" for name, why in expected.items()}
    counts = "1 .txt, 1 a link to a folder around it, 2 hidden, 1 no ending"
    assert count_left_out(left_out) == counts
    assert find_audio(found[0].path) == ([found[0]._replace(speaker=None)], [])


def test_ids_from_paths(tmp_path):
    touch(tmp_path, "id1/a/00001.wav", "id1/b/00001.wav", "id2/a/00001.wav", "00001.wav")
    with pytest.raises(UserError, match=r"00001\.wav and \S*00001\.wav: two .* --ids_from_paths"):
        find_audio(tmp_path)
    found, _ = find_audio(tmp_path, ids_from_paths=True)
    ids = {recording.utt_id: recording.speaker for recording in found}
    assert ids == {"00001": None, "id1-a-00001": "id1", "id1-b-00001": "id1", "id2-a-00001": "id2"}
    touch(tmp_path, "id1-a/00001.wav")
    with pytest.raises(UserError, match="two files .*id1-a-00001: rename one"):
        find_audio(tmp_path, ids_from_paths=True)


def test_speakers_are_known_or_asked_for(tmp_path):
    touch(tmp_path, "p225/a.wav", "p226/b.wav")
    assert speakers_of(find_audio(tmp_path)[0]) == {"a": "p225", "b": "p226"}
    touch(tmp_path, "c.wav")
    with pytest.raises(UserError, match=r"c\.wav: utterance c: .*--utt2spk.*--cmvn utterance"):
        speakers_of(find_audio(tmp_path)[0])


def test_find_audio_refuses_what_holds_none(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="gone: no such"):
        find_audio(tmp_path / "gone")
    touch(tmp_path, "a.txt")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(UserError, match=r"no audio file: .*\.wav \.flac.*left out: 1 \.txt"):
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


def test_names_that_cannot_be_ids_are_refused(tmp_path):
    for name in ("a\\b.wav", os.fsdecode(b"caf\xe9.wav"), "new\nline.wav"):
        touch(tmp_path, f"x/{name}")
        with pytest.raises(UserError, match="utterance id .* cannot be a file name"):
            find_audio(tmp_path)
        (tmp_path / "x" / name).unlink()


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
    assert speakers_of(found) == {"a": "anna", "b": "bert"}
    samples = [np.concatenate([*read_blocks(recording, RATE)]) for recording in found]
    assert np.array_equal(samples[0], sound[32000:, 1])
    assert np.array_equal(samples[1], sound[8000:20000, 0])
    for name in ("segments", "utt2spk"):
        (tmp_path / name).unlink()
    found, _ = find_audio(tmp_path)
    assert [recording.utt_id for recording in found] == ["rec-A", "rec-B"]
    assert np.array_equal(np.concatenate([*read_blocks(found[1], RATE)]), sound[:, 1])
    with pytest.raises(UserError, match="--utt2spk"):
        speakers_of(found)
    with pytest.raises(UserError, match="--ids_from_paths"):
        find_audio(tmp_path, ids_from_paths=True)


@pytest.mark.parametrize(
    "name, line, reason",
    [
        ("wav.scp", "r sph2pipe -f wav a.sph |", r"wav\.scp:2: recording r: is a pipe"),
        ("wav.scp", "alone", r"wav\.scp:2: expected a recording and its file, found 'alone'"),
        ("segments", "a r 0 1", r"segments:1: utterance a: r is not in wav\.scp"),
        ("segments", "a rec 1 0", r"segments:1: utterance a: expected 0 <= start < end"),
        ("segments", "a rec 0 nan", r"segments:1: utterance a: expected 0 <= start < end"),
        ("segments", "../a rec 0 1", r"segments:1: utterance id"),
        ("segments", "a rec 0", r"segments:1: expected an utterance and a recording and its st"),
        ("segments", "a rec 0 1\na rec 1 2", r"segments:2: a has .*segments:1"),
        ("reco2file_and_channel", "rec f 1", r"channel:1: expected a channel A, B, .*found '1'"),
        ("utt2spk", "a s\na t", r"utt2spk:2: a has 't' here, and 's' in \S*utt2spk:1"),
    ],
)
def test_a_data_directorys_faults_are_named_by_line(tmp_path, name, line, reason):
    (tmp_path / "wav.scp").write_text("rec a.wav\n")
    with open(tmp_path / name, "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=reason):
        find_audio(tmp_path)


def test_log_mel_frames_of_a_file(tmp_path, monkeypatch):
    path, settings = write(tmp_path / "a.flac", speech(2)), fbank_settings()
    whole = fbank(speech(2).astype(np.float32), settings)
    for size in (100, 12345, 1 << 20):
        monkeypatch.setattr(audio, "BLOCK_SIZE", size)
        assert np.array_equal(read_fbank(Recording("utt", path), settings), whole)
    with pytest.raises(UserError, match=r"b\.wav: 399 samples are fewer than one window \(400"):
        read_fbank(Recording("utt", write(tmp_path / "b.wav", speech()[:399])), settings)
