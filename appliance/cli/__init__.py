"""The command line: one file a topic; `main.py` ties them and turns every failure into one sentence."""
