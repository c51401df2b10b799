"""The demo: the whole loop, run once on this machine, and what it did on one page."""
