"""From folders of files to batches of features: manifest, buckets, cache, order."""
