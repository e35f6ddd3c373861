"""Figures that can be believed: every case is checked against float64 before it is timed.."""
