"""Tables of the names that publishers and other programs give to a model's tensors; one file per model."""
