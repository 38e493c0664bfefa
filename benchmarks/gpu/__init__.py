"""What a GPU shows: that the numbers are right, how fast a step is, and how good a real run. See `script`."""
