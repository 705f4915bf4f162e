"""Studies of the two methods: sweeps of runs, their cost, and the pages of results."""
