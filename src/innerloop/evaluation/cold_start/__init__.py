"""The ratings of users of whom little is known, and of items that nobody rated: `innerloop evaluate cold-start`."""
