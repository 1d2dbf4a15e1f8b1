"""What the benchmark times, and what it is compared with."""
