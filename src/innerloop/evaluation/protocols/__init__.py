"""One file for each way to judge: it reads the data, asks every arm at every moment, and returns an `Outcome`."""
