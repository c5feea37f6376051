"""The chance that a click is followed by a purchase of its item: `innerloop evaluate conversion`."""
