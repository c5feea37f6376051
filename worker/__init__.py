"""The processes: command line, worker pool, embedded services, demo. Start them by `innerloop`."""
