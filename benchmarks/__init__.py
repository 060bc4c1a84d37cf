"""One script per table of docs/benchmarks.md."""
