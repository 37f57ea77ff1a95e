"""What others write and read: Kaldi's tables, audio files, s3prl's checkpoints, ONNX."""
