"""What `dora-dist plan` counts and predicts, against what processes hold and steps take."""
