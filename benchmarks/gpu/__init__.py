"""The GPU acceptance suite: what bsprof promises of a CUDA device, each promise held against a limit on the device.

`python -m benchmarks.gpu` from the repository's root; `--list` says what is checked, `--rehearse` runs the
same code without a GPU.
"""
