"""bsprof's own speed as pytest-benchmark suites: `pytest benchmarks/suites`."""
