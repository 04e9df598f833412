"""What runs, checks, times and judges the contenders of `bench/cpu.py`."""
