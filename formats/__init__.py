"""What others write: Kaldi's tables, audio files, s3prl's checkpoints."""
