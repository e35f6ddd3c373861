"""A tiny model folder and a file of preferences, as in every room that trains."""

from runfixtures import data_file, model_folder, one_thread

__all__ = ["data_file", "model_folder", "one_thread"]
