"""Models and data sets, one file each, found by registration."""
