"""Trainers that other libraries bring, plugged into `Monitor`; each module imports its library when it is used."""
