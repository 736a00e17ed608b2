"""The clock, the recorder, the one step loop, the environment."""
