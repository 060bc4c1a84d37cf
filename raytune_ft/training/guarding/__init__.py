"""What watches over training: memory, disk, time, signals, and workers that are lost."""
