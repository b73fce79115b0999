"""What maintainers run: benchmarks, pictures, publishing a network."""
