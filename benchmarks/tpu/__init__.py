"""The cycles of a program that the TPU's compiler has scheduled, without a TPU; see `benchmarks.tpu_compile`."""
