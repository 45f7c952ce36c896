"""What models of one kind share."""
