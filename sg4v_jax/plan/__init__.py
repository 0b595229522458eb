"""What a run needs of a TPU pod, from the compiler alone: no TPU is involved."""
