#!/bin/sh -e
# Make the files of this folder, which test_audio.py reads, with sox and ffmpeg and nothing of ours:
# 0.4 s of a gliding tone, as each tool writes it, and *.s16, what the tools decode of it.
cd "$(dirname "$0")"
glide='synth 0.4 sine 300:1500 synth 0.4 sine amod 7 gain -6'
sox -R -n -r 16000 -b 16 -c 1 sox.wav $glide
for kind in sph aiff au w64; do sox -R sox.wav sox.$kind; done
sox -R sox.wav -t wav - | cat > sox-pipe.wav
sox -R sox.wav sox.s16
ffmpeg="ffmpeg -y -loglevel error -bitexact"
$ffmpeg -i sox.wav -q:a 5 ffmpeg.mp3
$ffmpeg -i sox.wav -c:a libvorbis ffmpeg.ogg
$ffmpeg -i sox.wav -c:a libopus -ar 48000 ffmpeg.opus
$ffmpeg -i sox.wav ffmpeg.flac
$ffmpeg -i sox.wav -c:a aac ffmpeg.m4a
$ffmpeg -i sox.wav -f wav - | cat > ffmpeg-pipe.wav
$ffmpeg -i sox.wav -f au - | cat > ffmpeg-pipe.au
for kind in mp3 ogg; do $ffmpeg -i ffmpeg.$kind -f s16le ffmpeg.$kind.s16; done
# Without a header that says how long it is, and with frames of different lengths.
sox -R -n -r 16000 -c 1 quiet.wav synth 0.5 sine 300 gain -50
sox -R -n -r 16000 -c 1 loud.wav synth 0.7 whitenoise gain -3
sox -R quiet.wav loud.wav long.wav
$ffmpeg -i long.wav -q:a 1 -write_xing 0 -id3v2_version 0 ffmpeg-vbr.mp3
$ffmpeg -i long.wav -b:a 24k -write_xing 0 -id3v2_version 0 ffmpeg-cbr.mp3
rm long.wav quiet.wav loud.wav
# Two channels at 48 kHz, 440 Hz on the left and 880 on the right; the left one at 16 kHz.
sox -R -n -r 48000 -b 16 -c 2 stereo.wav synth 0.4 sine 440 sine 880 gain -6
sox -R stereo.wav stereo.flac
sox -R stereo.wav stereo.s16 remix 1 rate -h 16000
rm stereo.wav
