"""Each user's next event, in global time, from strictly earlier events: `innerloop evaluate stream`."""
