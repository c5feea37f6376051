"""The items shown at a click-out, ranked from strictly earlier actions: `innerloop evaluate slate`."""
