"""Speed and memory of one artifact on this machine."""
