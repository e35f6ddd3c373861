"""Triton device code, its launch configurations and its launchers; what calls them is `mmrlhf.ops`."""
