"""What the processes that train one model say to each other."""
