"""The model: items to vectors, tasks to parameters, and the releases that hold both. torch lives here."""
