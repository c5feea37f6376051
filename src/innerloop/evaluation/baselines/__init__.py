"""What shops run today: the methods that an adapted list has to beat."""
