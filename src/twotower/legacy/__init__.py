"""Interface of the original teaching project: `DSSMTrainable`, and the scripts `main.py`, `data_download.py` and
`data_processing.py`.

Frames hold one row per interaction with the features of both sides. They are split into the distinct users and
the distinct items they name, and then trained like any other dataset.
"""
