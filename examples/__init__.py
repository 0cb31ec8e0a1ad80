"""Code of one's own for a run, each file to be copied and changed; README.md has a command for each."""
