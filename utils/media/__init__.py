"""Media files as tensors: what is in a file, and how it comes to the size of a bucket."""
