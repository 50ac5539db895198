"""What is proved: NumPy and SciPy, float64, no clock, file, device or global seed."""
