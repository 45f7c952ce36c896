"""What turns pictures, clips and captions into what the cache keeps."""
