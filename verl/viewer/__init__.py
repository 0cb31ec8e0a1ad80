"""Shows a training run in a browser: its curves, its answers, and what the update made of each token.

In:  a run's folder. Out: one HTML file that needs nothing else. Nothing here is read by training.
"""
