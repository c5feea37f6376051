"""What shops run today, on a stream of events: the lists that an adapted one has to beat in `stream` and in `slate`."""
