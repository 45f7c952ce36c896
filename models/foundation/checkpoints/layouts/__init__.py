"""Tables of the names of tensors in files of publishers and other programs; one file per model."""
